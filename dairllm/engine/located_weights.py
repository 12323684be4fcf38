"""Weights of any node's share, located in a model file that this machine has: most in place, some copied.

In place is what lies together in the file: rows of a matrix, columns of all its rows, whole norms. Copied is what does not: rows or columns
of heads that lie apart, and a classifier slice that ends with padding. Where a file of the share has been prepared (`dairllm prepare`), all
matrices are in place there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dairllm.engine.allocation import aligned
from dairllm.engine.area import Area
from dairllm.engine.weights import WeightsFile, WeightView
from dairllm.errors import GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_layout import Slice, Tensor, part_slices
from dairllm.formats.model_slices import OutgoingWeight, sliced_weight
from dairllm.formats.share_file import ShareFile
from dairllm.graph.references import WeightReference
from dairllm.graph.slicing import Axis, Part
from dairllm.graph.types import NodeConfig, Op, OpCode, row_bytes

__all__ = ["LocatedWeight", "LocatedWeights"]

_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LocatedWeight:
    """One op's weight in the file.

    Attributes:
        tensors: one, or one of each expert, all alike.
        axis, slices: the part of the first of them; of the others it lies alike.
        n_rows: of the op, for each expert; the slices may have fewer, and zeros follow.
        row_bytes: of each.
    """

    tensors: tuple[Tensor, ...]
    axis: Axis
    slices: tuple[Slice, ...]
    n_rows: int
    row_bytes: int

    @property
    def nbytes(self) -> int:
        return len(self.tensors) * self.n_rows * self.row_bytes

    @property
    def in_place(self) -> bool:
        return len(self.slices) == 1 and self.slices[0].n_rows == self.n_rows

    @property
    def is_strided(self) -> bool:
        """In place, with bytes of others between its rows."""
        return self.in_place and self.slices[0].stride != self.slices[0].slice_row_bytes

    @property
    def expert_stride(self) -> int:
        """Bytes of the file from one expert to the next; 0 where there is one."""
        return self.tensors[1].offset - self.tensors[0].offset if len(self.tensors) > 1 else 0

    def held(self, row: int, expert: int) -> int:
        """Bytes from the first to the last, where rows and experts are so far apart."""
        return (len(self.tensors) - 1) * expert + (self.n_rows - 1) * row + self.row_bytes

    def slices_of(self, expert: int) -> tuple[Slice, ...]:
        return tuple(
            Slice(piece.offset + expert * self.expert_stride, piece.stride, piece.n_rows, piece.slice_row_bytes) for piece in self.slices
        )


class LocatedWeights:
    """All weights of a node's graph in a mapped model file, which must stay open while a program uses them.

    Nothing of what the references say is believed: each must name a tensor, and a part of it that is as large as the op's weight.

    Args:
        node: the configuration.
        references: one for each of its ops that has a weight.
        share: a file of this share of the model, its weights located.
        packed: columns of a matrix are copied together as well: half a row, then half a row that others read, takes twice the time to read
            of the same bytes in one piece. Where weights are paged that is what a file of the share is for.

    Raises:
        GraphError: a reference that no op needs, or an op without one; no such tensor or part of it; another type or size than the op's, or
            than that of the share.
    """

    def __init__(
        self,
        model: ModelFile,
        node: NodeConfig,
        references: Iterable[WeightReference],
        share: ShareFile | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._model, self._share = model, share
        self._file = Area.of(str(model.path), model.raw)
        ops: dict[tuple[str, int], Op] = {}
        for op in (op for segment in node.segments for op in segment.ops if op.weight_size.length):
            if (op.name, op.index) in ops:
                raise GraphError(f"two ops are called {op.name} in layer {op.index}: their weights cannot be told apart")
            ops[op.name, op.index] = op
        self._found: dict[tuple[str, int], LocatedWeight] = {}
        for reference in references:
            key = reference.name, reference.layer
            if key not in ops or key in self._found:
                problem = "is referred to twice" if key in ops else "is no weight of the configuration"
                raise GraphError(f"{reference.name} of layer {reference.layer} {problem}")
            self._found[key] = found = _locate(model, ops[key], reference.part)
            if share is not None and ops[key].code == OpCode.MATMUL:
                place = share.place(*key)
                if place is None or (place.n_rows, place.row_bytes) != (found.n_rows, found.row_bytes):
                    raise GraphError(f"{share.path} has another {reference.name} of layer {reference.layer} than the graph")
        lacking = next((f"{name} of layer {index}" for name, index in ops if (name, index) not in self._found), None)
        if lacking is not None:
            raise GraphError(f"nothing refers to {lacking}")
        self._copies: dict[tuple[str, int], int] = {}
        self.nbytes = 0
        """Of what is copied."""
        for key, found in self._found.items():
            copied = not found.in_place or (packed and found.is_strided)
            if copied and (share is None or share.place(*key) is None):
                self._copies[key] = self.nbytes
                self.nbytes += -(-found.nbytes // 64) * 64
        self._memory = np.zeros(0, np.uint8)
        self._copied = Area("the memory of copied weights", 0, self.nbytes)
        """Nowhere, until it is allocated."""

    def allocate(self) -> None:
        """Called once the owner has found `nbytes` to be allowed: copies what is not used in place. Reads the file: for a thread."""
        self._memory = aligned(self.nbytes)
        self._copied = self._copied._replace(address=self._memory.ctypes.data)
        for key, start in self._copies.items():
            for weight in self.experts(*key):
                step = max(1, _COPY_BYTES // weight.row_bytes)
                for first in range(0, weight.n_rows, step):
                    rows = min(step, weight.n_rows - first)
                    at = start + weight.offset + first * weight.row_bytes
                    weight.read(first, rows, self._memory.data[at : at + rows * weight.row_bytes])
                    self._model.forget()  # columns lie among those of others, which would count as held

    @property
    def matmul_file(self) -> WeightsFile:
        return self._model if self._share is None else self._share

    def view(self, op: Op) -> WeightView:
        found = self._found.get((op.name, op.index))
        if found is None:
            raise GraphError(f"op {op.name} of layer {op.index} needs a weight and announces none")
        what, share = f"weight {op.name} of layer {op.index}", self._share
        place = None if share is None else share.place(op.name, op.index)
        if share is not None and place is not None:
            held = found.held(place.row_bytes, place.expert_stride)
            file = Area(str(share.path), share.address, share.stamp.nbytes)
            return WeightView(file.part(what, place.offset, held), place.row_bytes, place.expert_stride, place.offset)
        copied = self._copies.get((op.name, op.index))
        if copied is None:
            piece = found.slices[0]
            held = found.held(piece.stride, found.expert_stride)
            return WeightView(self._file.part(what, piece.offset, held), piece.stride, found.expert_stride, piece.offset)
        expert = found.row_bytes * found.n_rows
        return WeightView(self._copied.part(what, copied, found.nbytes), found.row_bytes, expert)

    def located(self, name: str, index: int) -> LocatedWeight | None:
        """Where an op's weight is; None where no op has that weight."""
        return self._found.get((name, index))

    def names(self) -> Iterator[tuple[str, int]]:
        """(name, index) of every weight."""
        yield from self._found

    def experts(self, name: str, index: int, first: int = 0, stop: int | None = None) -> Iterator[OutgoingWeight]:
        """An op's weight as the op sees it, an expert at a time, from expert `first` on."""
        found = self._found[name, index]
        for expert, tensor in list(enumerate(found.tensors))[first:stop]:
            yield sliced_weight(self._model, tensor, found.slices_of(expert), found.axis, found.n_rows)


def _locate(model: ModelFile, op: Op, part: Part) -> LocatedWeight:
    """A part of the tensor that bears the op's name, checked against the op's sizes."""
    size, label = op.weight_size, f"{op.name} of layer {op.index}"
    n_rows, columns = (size.x, size.y) if op.code == OpCode.MATMUL else (size.y, size.x)
    try:
        first = model.tensor(op.name, op.index)
        model.tensor(op.name, op.index, size.z - 1)  # before a list is made of them all
    except KeyError:
        raise GraphError(f"{model.path.name} has no {size.z} of {label}") from None
    if first.float_type != size.float_type:
        raise GraphError(f"{label} is {size.float_type.name} in the graph and {first.float_type.name} in {model.path.name}")
    try:
        width = row_bytes(size.float_type, columns)
    except ValueError as error:
        raise GraphError(f"{label}: {error}") from None
    slices = part_slices(first, part)
    if part.axis is Axis.COLUMNS:
        fits = bool(slices) and sum(piece.slice_row_bytes for piece in slices) == width and slices[0].n_rows == n_rows
    else:
        rows = sum(piece.n_rows for piece in slices)
        ends = not slices or slices[-1].offset + slices[-1].nbytes == first.offset + first.nbytes  # where padding may follow
        fits = first.row_bytes == width and (rows == n_rows or (rows < n_rows and ends and size.z == 1))
    if not fits:
        found = ", ".join(f"{piece.n_rows} x {piece.slice_row_bytes}" for piece in slices) or "nothing"
        raise GraphError(f"{label} has {n_rows} rows of {width} bytes in the graph; its part of {model.path.name} is {found}")
    tensors = tuple(model.tensor(op.name, op.index, expert) for expert in range(size.z))
    return LocatedWeight(tensors, part.axis, slices, n_rows, width)
