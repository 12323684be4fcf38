"""A `.m` model file, mapped: its header, its tensors, and views of their bytes.

The file is mapped, not read: a view costs nothing until its bytes are used, and the engine hands addresses within the map to its kernels.
Whoever uses addresses keeps the `ModelFile`.
"""

import mmap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.errors import FormatError
from dairllm.formats.file_kind import kind_of_folder, unreadable
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_header import MAX_HEADER_BYTES, Header, parse_header
from dairllm.formats.model_layout import Slice, Tensor, layout_bytes, node_slice, tensor_layout, walk_layout
from dairllm.formats.model_writer import ModelWriter
from dairllm.formats.quants import dequantize
from dairllm.graph.model import ModelSpec
from dairllm.graph.types import FloatType
from dairllm.machine import ask_for_huge_pages

__all__ = ["ModelFile", "ModelWriter", "Slice", "Tensor", "node_slice", "tensor_layout"]


class ModelFile:
    """An open model file; a context manager that closes it.

    Attributes:
        path: the file.
        spec: what the header says; `spec.seq_len` is the context length in use.
        file_seq_len: the context length that the header allows.
        header_bytes: where tensors begin.
        nbytes: length of the file.
        tensors: all of them, in file order.
        stamp: which file it is, and when it was last written.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, spec: ModelSpec, header: Header, stamp: FileStamp) -> None:
        self.path = path
        self.stamp = stamp
        self.spec = spec
        self.file_seq_len = header.spec.seq_len
        self.header_bytes = header.nbytes
        self.nbytes = len(mapped)
        self.tensors = tensor_layout(spec, header.nbytes)
        self._by_name = {(tensor.name, tensor.layer, tensor.expert): tensor for tensor in self.tensors}
        self._map: mmap.mmap | None = mapped
        self._raw: npt.NDArray[np.uint8] | None = np.frombuffer(mapped, np.uint8)

    @classmethod
    def open(cls, path: str | Path, *, max_seq_len: int | None = None) -> "ModelFile":
        """Map a model file and check its header and length.

        Args:
            path: the file.
            max_seq_len: context length to use, where it is less than the file's.

        Raises:
            FormatError: it cannot be opened, is no `.m` file, contradicts itself, or is shorter or longer than its header says.
        """
        path = Path(path)
        if path.exists() and not path.is_file():  # a pipe would wait for ever
            raise FormatError(path, None, "a .m model file", kind_of_folder(path) if path.is_dir() else "no plain file")
        try:
            with path.open("rb") as file:
                stamp = FileStamp.of(file.fileno())
                nbytes = stamp.nbytes
                header = parse_header(path, file.read(MAX_HEADER_BYTES), nbytes)
                _check_length(path, header, nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise unreadable(path, "a readable .m model file", error) from error
        spec = header.spec
        if max_seq_len is not None and max_seq_len < spec.seq_len:
            if max_seq_len < 1:
                raise ValueError(f"a context of {max_seq_len} positions")
            spec = replace(spec, seq_len=max_seq_len)
        return cls(path, mapped, spec, header, stamp)

    def close(self) -> None:
        """Give up the map. Its memory is unmapped as soon as no view of it is left, which may be at once."""
        mapped, self._map, self._raw = self._map, None, None
        if mapped is not None:
            with suppress(BufferError):  # a view is still in use: the last of them unmaps
                mapped.close()

    def __enter__(self) -> "ModelFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._map is None else f"{self.nbytes} bytes mapped"
        kind = f"{self.spec.arch.name.lower()} {self.spec.weight_type.name}"
        return f"<ModelFile {self.path.name}: {kind}, {len(self.tensors)} tensors, {state}>"

    @property
    def raw(self) -> npt.NDArray[np.uint8]:
        """uint8 view of the whole file, read-only.

        Raises:
            ValueError: the file has been closed.
        """
        if self._raw is None:
            raise ValueError(f"{self.path} has been closed")
        return self._raw

    def forget(self, offset: int = 0, nbytes: int | None = None) -> None:
        """Let go of the memory of part of the map, by default of all of it. Views stay good: what they need comes back from the file."""
        if self._map is not None:
            start = offset - offset % mmap.PAGESIZE
            stop = self.nbytes if nbytes is None else offset + nbytes
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def ask_for_huge_pages(self) -> None:
        """For those who will use the map in whole (`dairllm.machine.ask_for_huge_pages`)."""
        if self._map is not None:
            ask_for_huge_pages(self._map)

    def tensor(self, name: str, layer: int = 0, expert: int = 0) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: there is none.
        """
        try:
            return self._by_name[name, layer, expert]
        except KeyError:
            raise KeyError(f"{self.path} has no tensor {name!r} in layer {layer}, expert {expert}") from None

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """View of a tensor's bytes, read-only: float32 of its shape for F32, else uint8 [d, row_bytes].

        Tensors are not aligned in the file, so a float32 view may be unaligned: numpy copes with it, kernels must be told.
        """
        raw = self.raw[tensor.offset : tensor.offset + tensor.nbytes]
        if tensor.float_type == FloatType.F32:
            return raw.view("<f4").reshape(tensor.shape)
        return raw.reshape(tensor.n_rows, tensor.row_bytes)

    def values(self, tensor: Tensor) -> npt.NDArray[np.float32]:
        """A tensor's values as a float32 array of its shape: dequantized, and always a copy."""
        raw = self.raw[tensor.offset : tensor.offset + tensor.nbytes].reshape(tensor.n_rows, tensor.row_bytes)
        return dequantize(tensor.float_type, raw.copy()).reshape(tensor.shape)


def _check_length(path: Path, header: Header, nbytes: int) -> None:
    """Raise FormatError unless the file ends with its last tensor."""
    expected = layout_bytes(header.spec, header.nbytes)
    if nbytes > expected:
        found = f"{nbytes - expected} more bytes"
        raise FormatError(path, expected, f"the end of the file, whose header describes {expected} bytes", found)
    if nbytes < expected:
        torn = next(tensor for tensor in walk_layout(header.spec, header.nbytes) if tensor.offset + tensor.nbytes > nbytes)
        found = f"the end of the file after {nbytes - torn.offset} of them; {expected - nbytes} of its {expected} bytes are missing"
        raise FormatError(path, nbytes, f"{torn.nbytes} bytes of {torn.label} from byte {torn.offset} on", found)
