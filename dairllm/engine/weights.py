"""Where the weights of a node's ops are: in the mapped model file, or in memory that the wire fills.

Kernels take a raw address and strides, so a slice of a mapped file needs no copy.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from dairllm.engine.allocation import aligned
from dairllm.engine.area import Area
from dairllm.errors import GraphError, RemoteProtocolError
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import NodeConfig, Op, OpCode, row_bytes

__all__ = ["FileWeights", "WeightView", "Weights", "WeightsFile", "WireWeights"]


class WeightView(NamedTuple):
    """Rows of a weight.

    Attributes:
        area: what they lie in, from the first byte to the last.
        row: bytes from one to the next.
        expert: bytes from one expert to the next; 0 where there is one.
        offset: where the first byte lies in its file, with the same strides; None where the weight is in memory of its own. A matmul's
            file is the weights' `matmul_file`, any other op's the model's.
    """

    area: Area
    row: int
    expert: int
    offset: int | None = None

    def at(self, first: int, count: int, row_bytes: int, experts: int) -> int:
        """The address of row `first`, from which on `count` rows of so many bytes are read, of each expert.

        Raises:
            AreaError: they are not all there.
        """
        return self.area.at(first * self.row, row_bytes, (count, self.row), (experts, self.expert))


class WeightsFile(Protocol):
    """A file that weights lie in."""

    path: Path
    stamp: FileStamp

    def ask_for_huge_pages(self) -> None:
        """Before weights are used where they lie."""


class Weights(Protocol):
    """Both kinds. `nbytes` is what they hold in memory of their own."""

    nbytes: int

    @property
    def matmul_file(self) -> WeightsFile | None:
        """Where matmuls' weights lie: in the model's file or one of a node's share of it; None where all are in memory."""
        ...

    def view(self, op: Op) -> WeightView:
        """The weight of an op; GraphError where it has none."""
        ...


def _row(op: Op) -> int:
    """Bytes of one row: a matmul's rows have y inputs, an embedding's and a norm's x values."""
    size = op.weight_size
    return row_bytes(size.float_type, size.y if op.code == OpCode.MATMUL else size.x)


def _label(op: Op) -> str:
    return f"weight {op.name} of layer {op.index}"


class WireWeights:
    """Memory for everything that a root announced, filled as it arrives.

    Args:
        node: the configuration; each op with a weight gets weight_size.nbytes under (name, index).

    Raises:
        GraphError: two ops of one name and index, or a weight that is not a whole number of blocks.
    """

    def __init__(self, node: NodeConfig) -> None:
        self._places: dict[tuple[str, int], tuple[int, int]] = {}
        self._received: dict[tuple[str, int], int] = {}
        self.nbytes = 0
        for op in (op for segment in node.segments for op in segment.ops if op.weight_size.length):
            key = op.name, op.index
            if key in self._places:
                raise GraphError(f"two ops are called {op.name} in layer {op.index}: their weights cannot be told apart")
            try:
                _row(op)
                nbytes = op.weight_size.nbytes
            except ValueError as e:
                raise GraphError(f"the weight of {op.name} in layer {op.index}: {e}") from None
            self._places[key] = self.nbytes, nbytes
            self._received[key] = 0
            self.nbytes += -(-nbytes // 64) * 64
        self._memory = np.zeros(0, np.uint8)
        self._area = Area("the memory of weights", 0, self.nbytes)
        """Nowhere, until it is allocated."""

    @property
    def matmul_file(self) -> None:
        return None

    def allocate(self) -> None:
        """Called once the owner has found `nbytes` to be allowed."""
        self._memory = aligned(self.nbytes)
        self._area = self._area._replace(address=self._memory.ctypes.data)

    def into(self, name: str, index: int, offset: int, nbytes: int) -> memoryview:
        """The memory for `nbytes` of a weight from its byte `offset` on.

        Raises:
            RemoteProtocolError: no such weight, or it ends earlier.
        """
        place = self._places.get((name, index))
        if place is None:
            raise RemoteProtocolError(f"weight {name} of layer {index}: no op of the configuration has it")
        start, size = place
        if nbytes < 1 or offset + nbytes > size:
            raise RemoteProtocolError(f"weight {name} of layer {index}: bytes {offset} to {offset + nbytes} were announced; it has {size}")
        self._received[name, index] += nbytes
        return self._memory.data[start + offset : start + offset + nbytes]

    def missing(self) -> list[str]:
        """Weights that have not all come, for people."""
        return [
            f"{name} of layer {index}: {self._received[name, index]} of {size} bytes"
            for (name, index), (_, size) in self._places.items()
            if self._received[name, index] < size
        ]

    def view(self, op: Op) -> WeightView:
        place = self._places.get((op.name, op.index))
        if place is None:
            raise GraphError(f"op {op.name} of layer {op.index} needs a weight and announces none")
        row = _row(op)
        return WeightView(self._area.part(_label(op), *place), row, row * op.weight_size.x)


class FileWeights:
    """All of a model, for the graph of one node: views into its mapped file, which must stay open while a program uses them."""

    def __init__(self, model: ModelFile) -> None:
        self._model = model
        self._file = Area.of(str(model.path), model.raw)
        self.nbytes = 0

    @property
    def matmul_file(self) -> ModelFile:
        return self._model

    def view(self, op: Op) -> WeightView:
        first = self._model.tensor(op.name, op.index)
        expert = 0
        if op.weight_size.z > 1:
            expert = self._model.tensor(op.name, op.index, 1).offset - first.offset
        needed, found = op.weight_size.nbytes, first.nbytes * op.weight_size.z
        if needed != found:
            raise GraphError(f"op {op.name} of layer {op.index} needs {needed} bytes of weights; the file has {found}")
        held = (op.weight_size.z - 1) * expert + first.nbytes
        return WeightView(self._file.part(_label(op), first.offset, held), first.row_bytes, expert, first.offset)
