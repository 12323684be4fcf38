"""Writes a `.m` model file tensor by tensor, holding no more than it is handed at a time."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dairllm.formats.model_header import encode_header
from dairllm.formats.model_layout import Tensor, tensor_layout
from dairllm.formats.quants import quantize
from dairllm.formats.replaced_file import replaced_file
from dairllm.graph.model import ModelSpec

__all__ = ["ModelWriter"]


class ModelWriter:
    """A model file in the making; a context manager.

    The file takes its name at the end of the block, if every tensor has been written; where the block is left by an exception there is
    no file (and an older one of that name stays).

    Attributes:
        path: the file to be.
        tensors: all tensors, in the order in which they must be written.

    Raises:
        FormatError: `spec` cannot be said in a header, or contradicts itself.
    """

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        self.path = Path(path)
        self.spec = spec
        self._header = encode_header(self.path, spec)
        self.tensors = tensor_layout(spec, len(self._header))
        self._waiting: Iterator[Tensor] = iter(self.tensors)
        self._header_written = False
        self._stack: AbstractContextManager[BinaryIO] = replaced_file(self.path)
        self._file: BinaryIO | None = None

    @property
    def nbytes(self) -> int:
        """Length of the file when it is complete."""
        last = self.tensors[-1]
        return last.offset + last.nbytes

    def __enter__(self) -> "ModelWriter":
        self._file = self._stack.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        missing = next(self._waiting, None)
        if kind is None and missing is not None:
            error = ValueError(f"{self.path} is not complete: {missing.label} has not been written")
            kind = ValueError
            self._stack.__exit__(kind, error, None)
            raise error
        self._stack.__exit__(kind, error, trace)

    def write_header(self) -> None:
        """Write the header; `write_tensor` does it where it has not been done."""
        if not self._header_written:
            self._out.write(self._header)
            self._header_written = True

    def write_tensor(self, name: str, data: npt.NDArray[Any] | Iterable[npt.NDArray[Any]], layer: int = 0, expert: int = 0) -> None:
        """Write the next tensor.

        Args:
            name: its name, which must be that of the next tensor in file order (as `layer` and `expert` must be).
            data: all of its rows, or pieces of some rows each. float32 [rows, n] (or [n]) is stored as the tensor's type says;
                uint8 [rows, row_bytes] is written as it is.

        Raises:
            ValueError: it is not this tensor's turn, or its data have another shape.
        """
        self.write_header()
        tensor = next(self._waiting, None)
        if tensor is None or (tensor.name, tensor.layer, tensor.expert) != (name, layer, expert):
            turn = tensor.label if tensor else "the end of the file"
            raise ValueError(f"the next tensor of {self.path} is {turn}, not {name} of layer {layer}, expert {expert}")
        rows = 0
        for piece in (data,) if isinstance(data, np.ndarray) else data:
            raw = _bytes(tensor, piece)
            rows += raw.shape[0]
            if rows > tensor.n_rows:
                break
            self._out.write(raw.data)
        if rows != tensor.n_rows:
            raise ValueError(f"{tensor.label} has {tensor.n_rows} rows, not {rows}")

    @property
    def _out(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("a ModelWriter is used in a with statement")
        return self._file


def _bytes(tensor: Tensor, piece: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Some rows as they are stored: uint8 [rows, row_bytes]."""
    rows = piece.reshape(1, -1) if piece.ndim == 1 else piece
    if rows.dtype == np.float32 and rows.shape[1] == tensor.n_columns:
        return quantize(tensor.float_type, rows)
    if rows.dtype == np.uint8 and rows.shape[1] == tensor.row_bytes:
        return np.ascontiguousarray(rows)
    raise ValueError(
        f"a row of {tensor.label} is {tensor.n_columns} float32 values or {tensor.row_bytes} bytes, not {rows.shape[1]} of {rows.dtype}"
    )
