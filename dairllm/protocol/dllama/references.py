"""References to weights on the wire: what a root of ours says, before the node configuration, to a worker of ours that has told its model.

    "refs", u32 count, then of each: str name, u32 layer, u32 axis (0 whole, 1 rows, 2 columns), u32 spans, of each u32 start, u32 stop

Spans count rows (outputs) or columns (inputs) of the whole tensor. None at all: the root's model is another, and its weights follow.
"""

import struct
from collections.abc import Sequence

from dairllm.errors import RemoteProtocolError
from dairllm.graph.references import WeightReference
from dairllm.graph.slicing import Axis, Part, Span
from dairllm.protocol.dllama.fields import bounded, read_string, write_string
from dairllm.protocol.dllama.limits import Limits
from dairllm.protocol.stream import Need, Parser

__all__ = ["read_references", "write_references"]

_WORD = b"refs"
_START = struct.Struct("<4sI")  # the word, how many
_PART = struct.Struct("<III")  # layer, axis, spans
_SPAN = struct.Struct("<II")
_AXES = (Axis.WHOLE, Axis.ROWS, Axis.COLUMNS)


def write_references(references: Sequence[WeightReference]) -> bytes:
    parts = [_START.pack(_WORD, len(references))]
    for reference in references:
        axis, spans = reference.part.axis, [span for span in reference.part.spans or () if span.size]
        parts += [write_string(reference.name), _PART.pack(reference.layer, _AXES.index(axis), len(spans))]
        parts += (_SPAN.pack(span.start, span.stop) for span in spans)
    return b"".join(parts)


def read_references(limits: Limits) -> Parser[tuple[WeightReference, ...]]:
    """Whether there are such tensors, and parts of them that fit the ops, is for the owner of the model to say."""
    word, count = _START.unpack((yield Need(_START.size, "references to weights")))
    if word != _WORD:
        raise RemoteProtocolError(f"expected references to weights ({_WORD!r}), found {word!r}")
    bounded(count, 0, limits.max_ops, "the number of references to weights")
    references = []
    for number in range(count):
        what = f"reference {number}"
        name, _ = yield from read_string(limits, f"the name of {what}")
        layer, axis, n_spans = _PART.unpack((yield Need(_PART.size, what)))
        bounded(axis, 0, len(_AXES) - 1, f"the axis of {what}")
        bounded(n_spans, 0, limits.max_spans if axis else 0, f"the number of spans of {what}")
        spans = [Span(*pair) for pair in _SPAN.iter_unpack((yield Need(n_spans * _SPAN.size, f"the spans of {what}")))]
        for span in spans:
            if span.size < 1:
                raise RemoteProtocolError(f"expected the spans of {what} to have a size, found {span.start}..{span.stop}")
        references.append(WeightReference(name, layer, Part(_AXES[axis], tuple(spans) if axis else None)))
    return tuple(references)
