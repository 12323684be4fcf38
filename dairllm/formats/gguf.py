"""A GGUF file: its metadata, its tensors, and their rows.

The `gguf` library (llama.cpp's own) reads the structure; this module checks what it finds, and reads tensors' bytes with plain reads, a few
rows at a time, so that a conversion needs memory for those rows and for the vocabulary only.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dairllm.errors import ConfigError, FormatError, printable
from dairllm.formats.file_kind import HEAD_BYTES, kind_of, kind_of_folder, unreadable
from dairllm.formats.quants import dequantize_q40, dequantize_q80

__all__ = ["FLOAT_TYPES", "LIBRARY_ADVICE", "READABLE_TYPES", "GgufFile", "GgufTensor"]

FLOAT_TYPES = ("F32", "F16", "BF16")
READABLE_TYPES = (
    *FLOAT_TYPES,
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
"""GGML's names of the types of tensors whose values can be had."""

_MAGIC = b"GGUF"

LIBRARY_ADVICE = "pip install gguf (in the folder that dairllm's source is in, pip install '.[convert]' installs both)"
"""What to do where it is missing. dairllm itself is not on PyPI: its name there is not ours."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor's place in the file.

    Attributes:
        type_name: GGML's name of the storage type: "F32", "Q4_0".
        shape: rows first, as numpy has it: (n_rows, n_columns), or (n,) for a vector.
        offset: of its first byte in the file.
        row_bytes: of one row.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_columns(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes


class GgufFile:
    """An open GGUF file; a context manager.

    Attributes:
        path: the file.
        tensors: by name, in file order.
    """

    def __init__(self, path: Path, descriptor: int, fields: dict[str, Any], tensors: dict[str, GgufTensor]) -> None:
        self.path = path
        self.tensors = tensors
        self._fields = fields
        self._descriptor = descriptor

    @classmethod
    def open(cls, path: str | Path) -> "GgufFile":
        """Read the structure of a GGUF file.

        Raises:
            ConfigError: the `gguf` library is not installed.
            FormatError: it cannot be opened, or is no (whole) little-endian GGUF file.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise FormatError(path, None, "a GGUF file", kind_of_folder(path) if path.is_dir() else "no plain file")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(path, "a readable GGUF file", error) from error
        try:
            head = os.pread(descriptor, HEAD_BYTES, 0)
            if not head.startswith(_MAGIC):
                found = kind_of(path, head) or (repr(head[:4]) if head else "an empty file")
                raise FormatError(path, 0, f"a GGUF file, which begins with {_MAGIC!r}", found)
            fields, tensors = _read_structure(path)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, fields, tensors)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def keys(self) -> tuple[str, ...]:
        """Names of all metadata."""
        return tuple(self._fields)

    def value(self, key: str) -> Any:
        """Any value of the metadata: a number, a truth value, a text, or a list of them. Raises FormatError as `integer` does."""
        return self._get(key, None, "a value", lambda _: True)

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of the metadata. Raises FormatError where it is missing (without a default) or something else."""
        return self._get(key, default, "an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))

    def real(self, key: str, default: float | None = None) -> float:
        """A number of the metadata; an integer will do. Raises FormatError as `integer` does."""
        return float(self._get(key, default, "a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)))

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A truth value of the metadata. Raises FormatError as `integer` does."""
        return self._get(key, default, "true or false", lambda value: isinstance(value, bool))

    def text(self, key: str, default: str | None = None) -> str:
        """A text of the metadata. Raises FormatError as `integer` does."""
        return self._get(key, default, "a text", lambda value: isinstance(value, str))

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """A list of texts of the metadata. Raises FormatError as `integer` does."""
        return self._get(key, default, "a list of texts", lambda value: isinstance(value, list) and all(type(v) is str for v in value))

    def numbers(self, key: str, default: list[float] | None = None) -> list[float]:
        """A list of numbers of the metadata. Raises FormatError as `integer` does."""

        def fits(value: object) -> bool:
            return isinstance(value, list) and all(type(entry) in (int, float) for entry in value)

        return self._get(key, default, "a list of numbers", fits)

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        """A list of integers of the metadata. Raises FormatError as `integer` does."""
        return self._get(key, default, "a list of integers", lambda value: isinstance(value, list) and all(type(v) is int for v in value))

    def raw_rows(self, tensor: GgufTensor, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Rows of a tensor as they are stored: uint8 [count, row_bytes].

        Raises:
            FormatError: the file ends before them.
        """
        offset, nbytes = tensor.offset + first * tensor.row_bytes, count * tensor.row_bytes
        out = np.empty((count, tensor.row_bytes), np.uint8)
        view = out.reshape(-1).data
        done = 0
        while done < nbytes:
            got = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not got:
                raise FormatError(self.path, offset + done, f"{nbytes - done} more bytes of tensor {tensor.name}", "the end of the file")
            done += got
        return out

    def rows(self, tensor: GgufTensor, first: int, count: int) -> npt.NDArray[np.float32]:
        """Values of some rows of a tensor: float32 [count, n_columns].

        Raises:
            FormatError: the file ends before them, or its type is one that cannot be read.
        """
        raw = self.raw_rows(tensor, first, count)
        decode = _DECODERS.get(tensor.type_name)
        try:
            with np.errstate(all="ignore"):  # of scales that are no numbers come values that are none: who uses them looks
                return decode(raw) if decode else _library_values(tensor.type_name, raw)
        except NotImplementedError as error:
            expected = f"tensor {tensor.name} in a type that can be read ({', '.join(READABLE_TYPES)})"
            raise FormatError(self.path, tensor.offset, expected, tensor.type_name) from error

    def _get(self, key: str, default: _T | None, what: str, fits: Callable[[Any], bool]) -> _T:
        field = self._fields.get(key)
        if field is None:
            if default is None:
                raise FormatError(self.path, None, f"metadata {key} ({what})", "none of that name")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            raise FormatError(self.path, field.offset, f"{what} as {key}", str(error)) from error
        if not fits(value):
            raise FormatError(self.path, field.offset, f"{what} as {key}", printable(repr(value), 60))
        return value  # type: ignore[no-any-return]  # `fits` has looked


def _read_structure(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    try:
        import gguf
    except ImportError as error:
        raise ConfigError(f"reading GGUF files needs the gguf library: {LIBRARY_ADVICE}") from error

    class Reader(gguf.GGUFReader):
        """Reads what is in the file, and no further.

        The library cuts a read short at the end of the file without a word; and for every string of a vocabulary it makes two `memmap`
        objects by way of several others, where plain arrays take half of the time and of the memory.
        """

        _bytes: npt.NDArray[np.uint8] | None = None

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if self._bytes is None:
                self._bytes = self.data.view(np.ndarray)
            kind = np.dtype(dtype)
            at, end = int(offset), int(offset) + kind.itemsize * int(count)
            if end > len(self._bytes):
                raise FormatError(
                    path, at, f"{end - at} bytes there", f"the end of the file at byte {len(self._bytes)}: it is cut short, fetch it anew"
                )
            return self._bytes[at:end].view(kind.newbyteorder(override_order or self.byte_order))

    try:
        reader = Reader(path)
        if reader.byte_order != "I":
            raise FormatError(path, 4, "a little-endian GGUF file", "a big-endian one")
        tensors = {}
        for found in reader.tensors:
            shape = tuple(int(n) for n in reversed(found.shape.tolist()))
            if not shape or not all(shape):
                raise FormatError(path, int(found.field.offset), f"a shape of tensor {printable(found.name)} without zeros", str(shape))
            block_values, block_bytes = gguf.GGML_QUANT_SIZES[found.tensor_type]
            row_bytes = shape[-1] // block_values * block_bytes
            tensors[found.name] = GgufTensor(found.name, found.tensor_type.name, shape, int(found.data_offset), row_bytes)
        return dict(reader.fields), tensors
    except FormatError:
        raise
    except Exception as error:  # the library has no errors of its own: whatever it stumbles over is the file's fault
        raise FormatError(path, None, "a GGUF file that can be read", str(error)) from error


def _f16(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return raw.view("<f2").astype(np.float32)


def _bf16(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The upper half of a float32."""
    return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _f32(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return raw.view("<f4").astype(np.float32, copy=False)


def _q4_1(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Blocks of 20 bytes for 32 values: f16 d, f16 m, nibbles as in Q4_0; value = nibble * d + m."""
    blocks = raw.reshape(*raw.shape[:-1], -1, 20)
    scale = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float32)
    out = np.empty((*blocks.shape[:-1], 32), np.float32)
    np.bitwise_and(blocks[..., 4:], 15, out=out[..., :16], casting="unsafe")
    np.right_shift(blocks[..., 4:], 4, out=out[..., 16:], casting="unsafe")
    out *= scale[..., :1]
    out += scale[..., 1:]
    return out.reshape(*raw.shape[:-1], -1)


_DECODERS: dict[str, Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": dequantize_q40,
    "Q4_1": _q4_1,
    "Q8_0": dequantize_q80,
}
"""Types that are read often. The library knows the others (K-quants and so on), more slowly."""


def _library_values(type_name: str, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    import gguf

    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    return np.ascontiguousarray(values, np.float32)
