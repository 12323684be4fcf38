"""The small parts that all messages are made of: words, strings, sizes, pointers (facts of the wire: docs/protocol.md).

`write_*` gives the bytes, `read_*` is a parser (``protocol.stream``) that raises RemoteProtocolError for what cannot be.
All integers and floats are little-endian.
"""

import struct
from enum import IntEnum
from typing import TypeVar

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.types import FloatType, Pointer, PointerSource, PointerType, Size, row_bytes
from dairllm.protocol.dllama.limits import Limits
from dairllm.protocol.stream import Need, Parser

__all__ = [
    "ACK",
    "POINTER",
    "SIZE",
    "U32",
    "bounded",
    "enum_of",
    "pointer_of",
    "read_ack",
    "read_string",
    "read_u32",
    "size_of",
    "string_of",
    "write_pointer",
    "write_size",
    "write_string",
]

U32 = struct.Struct("<I")
SIZE = struct.Struct("<iIIIQQQ")  # float type, z, y, x, length, bytes, bytes of one z plane
POINTER = struct.Struct("<III")  # source, index, type

ACK = U32.pack(23571114)

_2_32 = 1 << 32
_E = TypeVar("_E", bound=IntEnum)


def read_u32(what: str) -> Parser[int]:
    (value,) = U32.unpack((yield Need(U32.size, what)))
    number: int = value
    return number


def read_ack(what: str) -> Parser[None]:
    """The word that opens a configuration and answers one."""
    word = yield Need(len(ACK), what)
    if word != ACK:
        raise RemoteProtocolError(f"expected {what} ({U32.unpack(ACK)[0]}), found {U32.unpack(word)[0]}")


def bounded(value: int, low: int, high: int, what: str) -> int:
    if not low <= value <= high:
        raise RemoteProtocolError(f"expected {what} in {low}..{high}, found {value}")
    return value


def enum_of(kind: type[_E], value: int, what: str) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise RemoteProtocolError(f"expected {what} to be one of {kind.__name__}, found {value}") from None


def write_string(text: str, marker: bytes = b"") -> bytes:
    """`text` and its NUL; then `marker` and a NUL of its own, which a C++ reader does not see."""
    if not text or not text.isascii() or not text.isprintable():
        raise LocalProtocolError(f"a string on the wire is printable ASCII and not empty, not {text!r}")
    raw = text.encode() + b"\0" + (marker + b"\0" if marker else b"")
    return U32.pack(len(raw)) + raw


def read_string(limits: Limits, what: str) -> Parser[tuple[str, bytes]]:
    """(text, marker): what stands before the first NUL, and what may stand behind it without the last NUL."""
    nbytes = bounded((yield from read_u32(f"the length of {what}")), 2, limits.max_string_bytes, f"the length of {what}")
    return string_of((yield Need(nbytes, what)), what)


def string_of(raw: bytes, what: str) -> tuple[str, bytes]:
    text, nul, marker = raw.partition(b"\0")
    if not nul:
        raise RemoteProtocolError(f"expected a NUL within the {len(raw)} bytes of {what}, found {raw[:32]!r}")
    name = text.decode("latin-1")
    if not name or not name.isascii() or not name.isprintable():
        raise RemoteProtocolError(f"expected {what} in printable ASCII, found {raw[:32]!r}")
    return name, marker.removesuffix(b"\0")


def write_size(size: Size) -> bytes:
    return SIZE.pack(size.float_type, size.z, size.y, size.x, size.length, size.nbytes, size.nbytes_xy)


def size_of(raw: bytes, limits: Limits, what: str) -> Size:
    """The Size in `raw`, whose derived fields must agree with its dimensions.

    A C++ root counts values in 32 bits, and bytes from that count: where the true count is larger, its wrapped value is accepted too.
    """
    kind, z, y, x, length, nbytes, nbytes_xy = SIZE.unpack(raw)
    float_type = enum_of(FloatType, kind, f"the float type of {what}")
    size = Size(float_type, z, y, x)
    if float_type == FloatType.NONE and size.length:
        raise RemoteProtocolError(f"expected {what} without a float type to be empty, found {z} x {y} x {x} values")
    bounded(size.length, 0, limits.max_values, f"the number of values of {what}")
    _agree(length, (size.length, size.length % _2_32), f"{what}: the length of {z} x {y} x {x} values")
    for found, values, part in ((nbytes, size.length, "bytes"), (nbytes_xy, y * x, "bytes of one plane")):
        try:
            expected = row_bytes(float_type, values), row_bytes(float_type, values % _2_32)
        except ValueError as error:
            raise RemoteProtocolError(f"{what}: {error}") from None
        _agree(found, expected, f"{what}: the {part} of {z} x {y} x {x} {float_type.name} values")
    return size


def _agree(found: int, expected: tuple[int, int], what: str) -> None:
    if found not in expected:
        raise RemoteProtocolError(f"{what}: expected {expected[0]}, found {found}")


def write_pointer(pointer: Pointer) -> bytes:
    return POINTER.pack(pointer.source, pointer.index, pointer.type)


def pointer_of(raw: bytes, what: str) -> Pointer:
    source, index, kind = POINTER.unpack(raw)
    return Pointer(enum_of(PointerSource, source, f"the source of {what}"), index, enum_of(PointerType, kind, f"the type of {what}"))
