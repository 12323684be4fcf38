"""Weights that arrive although they are here: each byte is compared with the node's own file, and dropped.

A root of distributed-llama always sends them. What it sends goes through two small buffers: one is filled while the other is compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dairllm.engine.located_weights import LocatedWeight, LocatedWeights
from dairllm.errors import FormatError, RemoteProtocolError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import OutgoingWeight, file_offset
from dairllm.protocol.dllama.codec import WeightHeader

__all__ = ["CHECK_BYTES", "Arrived", "WeightCheck"]

PIECE_BYTES = 1 << 20
CHECK_BYTES = 8 * PIECE_BYTES
"""Memory for comparing: two buffers, what is read of the file, and the file's pages that it is read from."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Bytes of an op's weight, from its byte `start` on."""

    name: str
    index: int
    start: int
    data: memoryview


class WeightCheck:
    """The weights of one session.

    Args:
        weights: where they are in `model`.
    """

    def __init__(self, model: ModelFile, weights: LocatedWeights) -> None:
        self._model, self._weights = model, weights
        self._left = {key: self._located(*key).nbytes for key in weights.names()}
        self._buffers = [memoryview(bytearray(PIECE_BYTES)) for _ in range(2)]

    def pieces(self, header: WeightHeader) -> Iterator[Arrived]:
        """Room for the bytes that `header` announces, piece after piece. A piece must have been compared before the next but one is taken.

        Raises:
            RemoteProtocolError: no op has that weight, or it is smaller.
        """
        located, end = self._located(header.name, header.index), header.offset + header.nbytes
        if end > located.nbytes:
            what = f"weight {header.name} of layer {header.index}"
            raise RemoteProtocolError(f"{what}: bytes {header.offset} to {end} were announced; it has {located.nbytes}")
        self._left[header.name, header.index] -= header.nbytes
        for start in range(header.offset, end, PIECE_BYTES):
            self._buffers.reverse()
            yield Arrived(header.name, header.index, start, self._buffers[0][: min(PIECE_BYTES, end - start)])

    def compare(self, arrived: Arrived) -> None:
        """Compare a piece with the file. Reads it: for a thread.

        Raises:
            FormatError: the bytes are others than the file's; names the tensor and the first byte.
        """
        located = self._located(arrived.name, arrived.index)
        each, end = located.n_rows * located.row_bytes, arrived.start + len(arrived.data)
        for weight in self._weights.experts(arrived.name, arrived.index, arrived.start // each, -(-end // each)):
            first, stop = max(arrived.start - weight.offset, 0), min(end - weight.offset, each)  # within this expert
            theirs = arrived.data[weight.offset + first - arrived.start : weight.offset + stop - arrived.start]
            self._compare(located, weight, first, theirs)

    def missing(self) -> list[str]:
        """Weights that have not all come, for people."""
        return [f"{name} of layer {index}: {left} bytes" for (name, index), left in self._left.items() if left > 0]

    def _compare(self, located: LocatedWeight, weight: OutgoingWeight, first: int, theirs: memoryview) -> None:
        width = located.row_bytes
        top, bottom = first // width, -(-(first + len(theirs)) // width)
        own = np.empty((bottom - top) * width, np.uint8)
        weight.read(top, bottom - top, own.data)
        skipped = first - top * width
        same = own[skipped : skipped + len(theirs)] == np.frombuffer(theirs, np.uint8)
        expert = weight.offset // (located.n_rows * width)
        slices, tensor = located.slices_of(expert), located.tensors[expert]
        begin, end = (file_offset(slices, located.axis, *place) for place in ((top, 0), (bottom - 1, width - 1)))
        if begin is not None:
            self._model.forget(begin, (tensor.offset + tensor.nbytes if end is None else end + 1) - begin)
        if not same.all():
            place = first + int(same.argmin())
            at = file_offset(slices, located.axis, place // width, place % width)
            raise FormatError(
                self._model.path,
                at,
                f"what the root sends of {tensor.label}",
                "other bytes: one of the two files is torn, which `dairllm verify` tells, or they are different models",
            )

    def _located(self, name: str, index: int) -> LocatedWeight:
        found = self._weights.located(name, index)
        if found is None:
            raise RemoteProtocolError(f"weight {name} of layer {index}: no op of the configuration has it")
        return found
