"""Where a node's weights lie in a file of its own (`dairllm.formats.share_file`): one after the other, as a pass needs them.

Of each layer q, k, v, wo, the gate where there are experts, then w1, w3, w2, of each expert in turn; at last the classifier's rows, with
the zeros that fill up the last nodes' slices. Norms and the embedding stay in the model's file: the ones are small, of the other a token
reads one row. Each slice is whole rows of the node's width, so slices of columns lie together, and so do those of heads that lie apart in
the model. A slice begins at a multiple of 64 bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_layout import Tensor, share_slices
from dairllm.formats.model_slices import OutgoingWeight, sliced_weight
from dairllm.graph.model import ModelSpec
from dairllm.graph.slicing import Axis, Share, weight_part

__all__ = ["PlacedSlice", "logits_rows", "share_layout"]

_ALIGNMENT = 64
_ORDER = ("block_matmul_w1", "block_matmul_w3", "block_matmul_w2")
"""A pass needs w2 last, the model's file has it between."""


@dataclass(frozen=True, slots=True)
class PlacedSlice:
    """A node's part of one tensor.

    Attributes:
        tensor: of the model's file.
        offset: from the first of all slices on.
        n_rows, row_bytes: as the node sees it; rows that the tensor has not are zeros.
    """

    tensor: Tensor
    offset: int
    n_rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    def weight(self, model: ModelFile, share: Share) -> OutgoingWeight:
        """Its bytes in the model's file.

        Raises:
            ValueError: the file has been closed.
        """
        slices, axis = share_slices(self.tensor, model.spec, share), weight_part(model.spec, share, self.tensor.name).axis
        return sliced_weight(model, self.tensor, slices, axis, self.n_rows)


def logits_rows(spec: ModelSpec, n_nodes: int) -> int:
    """Classifier rows of each of so many nodes."""
    return -(-spec.vocab_size // n_nodes)


def share_layout(spec: ModelSpec, tensors: Sequence[Tensor], share: Share, n_nodes: int) -> tuple[PlacedSlice, ...]:
    """All slices of a node of `n_nodes`, in their order.

    Args:
        tensors: of the model's file.

    Raises:
        GraphError: the share cuts a block, or goes beyond the model.
    """
    placed: list[PlacedSlice] = []
    offset = 0
    for tensor in _in_pass_order(tensors):
        slices, axis = share_slices(tensor, spec, share), weight_part(spec, share, tensor.name).axis
        if tensor.name == "final_matmul_logits":
            n_rows, width = logits_rows(spec, n_nodes), tensor.row_bytes
        elif axis is Axis.COLUMNS:
            n_rows, width = tensor.n_rows, sum(piece.slice_row_bytes for piece in slices)
        else:
            n_rows, width = sum(piece.n_rows for piece in slices), tensor.row_bytes
        placed.append(PlacedSlice(tensor, offset, n_rows, width))
        offset += -(-placed[-1].nbytes // _ALIGNMENT) * _ALIGNMENT
    return tuple(placed)


def _in_pass_order(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    waiting: dict[str, Tensor] = {}
    for tensor in tensors:
        if tensor.name == "embedding" or len(tensor.shape) == 1:
            continue
        if tensor.name not in _ORDER:
            yield tensor
            continue
        waiting[tensor.name] = tensor
        if len(waiting) == len(_ORDER):
            yield from (waiting[name] for name in _ORDER)
            waiting = {}
