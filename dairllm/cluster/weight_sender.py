"""A node's weights as the bytes that a link carries: headers and slices, one after the other, in pieces of a few MiB.

Blocking, for a thread: what the map of the file has not in memory is read from the disk meanwhile.
"""

from collections.abc import Iterator

from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import OutgoingWeight, outgoing_weights
from dairllm.graph.slicing import Share
from dairllm.protocol.dllama.codec import WeightHeader, encode_weight_header

__all__ = ["PIECE_BYTES", "SENDING_BYTES", "WeightSender"]

PIECE_BYTES = 4 << 20
"""Enough that a thread for each piece costs nothing; two of them are held for each worker."""
SENDING_BYTES = 4 * PIECE_BYTES
"""Held for each worker while weights are sent: two pieces, the file's pages that one is filled from, and what is read ahead of them."""


class WeightSender:
    """All weights of one node.

    Args:
        model: open, until the stream has ended.
        share: the node's.
        logits_rows: classifier rows of a node; where the share has fewer, zeros follow.
    """

    def __init__(self, model: ModelFile, share: Share, logits_rows: int) -> None:
        weights = [(_header(weight), weight) for weight in outgoing_weights(model, share, logits_rows)]
        self.piece_bytes = PIECE_BYTES + 2 * max(weight.row_bytes for _, weight in weights)
        self.nbytes = sum(len(header) + weight.nbytes for header, weight in weights)
        self.at_hand = ""
        """The weight that the last piece ended with,"""
        self.left = 0
        """and how many bytes of it are to follow."""
        self._parts, self._model = _walk(weights), model
        self._next = next(self._parts, None)

    def fill(self, piece: memoryview) -> int:
        """Write what comes next into `piece`, of `piece_bytes`; returns how much it is, 0 at the end."""
        filled = 0
        while self._next is not None:
            header, weight, first, rows = self._next
            size = rows * weight.row_bytes
            if filled + len(header) + size > len(piece):
                break
            piece[filled : filled + len(header)] = header
            filled += len(header)
            weight.read(first, rows, piece[filled : filled + size])
            filled += size
            self.at_hand, self.left = weight.name, (weight.n_rows - first - rows) * weight.row_bytes
            self._next = next(self._parts, None)
        self._model.forget()  # what was read stays in the page cache, but is not held by this process
        return filled


def _header(weight: OutgoingWeight) -> bytes:
    return encode_weight_header(WeightHeader(weight.name, weight.layer, weight.offset, weight.nbytes))


def _walk(weights: list[tuple[bytes, OutgoingWeight]]) -> Iterator[tuple[bytes, OutgoingWeight, int, int]]:
    """(header or nothing, weight, first row, rows) of each part, about a quarter of a piece at most."""
    for header, weight in weights:
        step = max(1, PIECE_BYTES // 4 // weight.row_bytes)
        for first in range(0, weight.n_rows, step):
            yield (b"" if first else header), weight, first, min(step, weight.n_rows - first)
