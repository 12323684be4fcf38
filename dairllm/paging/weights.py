"""Weights under paging: matmuls read the mapping, norms lie in memory, rows of the embedding come when they are looked up."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dairllm.engine import system
from dairllm.engine.allocation import aligned
from dairllm.engine.area import Area
from dairllm.engine.weights import Weights, WeightsFile, WeightView
from dairllm.errors import EngineError
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import Op, OpCode, row_bytes
from dairllm.paging.mapping import FileMapping

__all__ = ["EmbeddingRows", "PagedWeights", "SmallReads"]


class SmallReads:
    """Reads of a few KiB, through a descriptor of their own: through the mapping a row would bring a whole block.

    Args:
        stamp: which file that was when its header was read.

    Raises:
        EngineError: from every method, where the file cannot be read, or is another one by now.
    """

    def __init__(self, path: Path, stamp: FileStamp) -> None:
        self._path, self._stamp = path, stamp
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EngineError(f"{path} cannot be opened: {error.strerror or error}") from None
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def check(self) -> None:
        """Raise EngineError where the open file was cut, or written to, since its header was read."""
        change = self._stamp.change(self._path, self._fd)
        if change is not None:
            raise EngineError(change)

    def read(self, offset: int, nbytes: int, address: int) -> None:
        """Bytes of the file to an address; the page cache keeps none of them."""
        try:
            came = system.read_into(self._fd, address, nbytes, offset)
        except OSError as error:
            raise EngineError(f"{self._path}, bytes {offset} to {offset + nbytes} cannot be read: {error.strerror or error}") from None
        if came < nbytes:
            raise EngineError(f"{self._path} ends at byte {offset + came}; {offset + nbytes} were expected")
        first = offset // system.PAGE * system.PAGE
        system.release_file(self._fd, first, -(-(offset + nbytes) // system.PAGE) * system.PAGE - first)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class EmbeddingRows:
    """Addresses for a whole embedding, of which only the rows of a pass are in memory."""

    def __init__(self, file: SmallReads, offset: int, row_bytes: int, n_rows: int) -> None:
        self._file, self._offset, self._row_bytes, self._n_rows = file, offset, row_bytes, n_rows
        self._nbytes = row_bytes * n_rows
        address, *self._region = system.reserve(self._nbytes)
        self.area = Area("the rows of the embedding", address, self._nbytes)
        system.advise(address, self._nbytes, "nohugepage")

    def load(self, tokens: Iterable[int]) -> int:
        """Bring the rows of tokens, and no others; how many bytes. Outside of the vocabulary the nearest row is meant, as in the kernel.

        Raises:
            EngineError: the file is shorter than it was, or the disk fails.
        """
        self._file.check()
        system.advise(self.area.address, self._nbytes, "dontneed")
        rows = {min(max(token, 0), self._n_rows - 1) for token in tokens}
        for row in rows:
            start = row * self._row_bytes
            self._file.read(self._offset + start, self._row_bytes, self.area.at(start, self._row_bytes))
        return len(rows) * self._row_bytes

    def close(self) -> None:
        system.unmap(*self._region)


class PagedWeights:
    """`dairllm.engine.weights.Weights` over a mapping.

    Args:
        places: where each op's weight lies in its file.
        mapping: on the file of the matmuls.
        model: whose file holds all else.

    Attributes:
        nbytes: memory beside the mapping.
        embedding: the table of the embedding op, where there is one.

    Raises:
        EngineError: the file cannot be read.
    """

    def __init__(self, places: Weights, mapping: FileMapping, model: ModelFile) -> None:
        self._places, self._mapping = places, mapping
        self._file = SmallReads(model.path, model.stamp)
        self._copies: list[NDArray[np.uint8]] = []
        self.nbytes = places.nbytes
        self.embedding: EmbeddingRows | None = None

    @property
    def matmul_file(self) -> WeightsFile | None:
        return self._places.matmul_file

    def view(self, op: Op) -> WeightView:
        place = self._places.view(op)
        if place.offset is None:
            return place
        if op.code == OpCode.MATMUL:
            mapping = Area(f"the mapping on {self._mapping.path}", self._mapping.address, self._mapping.nbytes)
            return place._replace(area=mapping.part(place.area.what, place.offset, place.area.nbytes))
        size = op.weight_size
        if op.code == OpCode.EMBEDDING:
            if self.embedding is None:
                self.embedding = EmbeddingRows(self._file, place.offset, row_bytes(size.float_type, size.x), size.y)
            return WeightView(self.embedding.area, place.row, place.expert)
        copy = aligned(size.nbytes)
        self._file.read(place.offset, size.nbytes, copy.ctypes.data)
        self._copies.append(copy)
        self.nbytes += copy.nbytes
        return WeightView(Area.of(place.area.what, copy), place.row, place.expert)

    def close(self) -> None:
        """No program that has these weights may be run any more."""
        if self.embedding is not None:
            self.embedding.close()
            self.embedding = None
        self._file.close()
