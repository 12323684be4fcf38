"""A loader for the relocatable objects that the kernels' compiler makes: ELF for x86-64, of functions that call nothing but each other and
a handful of libc's.

It knows as much as those objects need and refuses the rest by name: what it loads is machine code, and a relocation guessed wrong would
end the process at best. Memory is written first and made executable afterwards, never both at once. Unwinding tables are left out, since
nothing is ever thrown through this code.
"""

import ctypes
import mmap
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dairllm.errors import EngineError

__all__ = ["CALLABLE", "MACHINES", "MAX_BYTES", "ObjectCode", "ObjectCodeError"]

CALLABLE = frozenset({"fma", "fmaf", "memcpy", "memmove", "memset", "sched_yield", "syscall", "write"})
"""What objects may call. All that is there has one right result; a cosine of libm, say, would not be the same bits everywhere."""

MACHINES = ("x86_64", "AMD64")
"""What Python calls the machines whose objects these are."""

MAX_BYTES = 64 << 20
"""Of an object, and of what it takes in memory."""

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_RELOCATION = struct.Struct("<QQq")
_IDENT = b"\x7fELF\x02\x01\x01"  # 64 bits, little endian, version 1
_RELOCATABLE, _X86_64 = 1, 62
_CONTENTS, _SYMBOLS, _STRINGS, _RELA, _NO_BITS, _REL, _UNWIND = 1, 2, 3, 4, 8, 9, 0x70000001
_WRITE, _ALLOCATE, _EXECUTE, _THREAD_LOCAL, _COMPRESSED = 1, 2, 4, 0x400, 0x800
_UNDEFINED, _COMMON = 0, 0xFFF2
_FUNCTION = 2
_ABSOLUTE_64, _RELATIVE_64 = 1, 24  # R_X86_64_64, R_X86_64_PC64
_LINE = 64


class ObjectCodeError(EngineError):
    """Object code that cannot be loaded: damaged, of another processor, or with something in it that this loader does not know."""


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class ObjectCode:
    """An object in memory, ready to be called, for as long as this lives.

    Args:
        raw: the object's bytes.
        where: what errors call it.

    Raises:
        ObjectCodeError: it cannot be loaded.
    """

    def __init__(self, raw: bytes, where: str) -> None:
        self._raw, self._where = raw, where
        if platform.machine() not in MACHINES:
            raise self._refused(f"machine code of x86-64, and this is {platform.machine()}")
        if len(raw) > MAX_BYTES:
            raise self._refused(f"an object of {len(raw)} bytes; the limit is {MAX_BYTES}")
        self._sections = self._read_sections()
        tables = [section for section in self._sections if section.kind == _SYMBOLS]
        if len(tables) != 1:
            raise self._refused(f"{len(tables)} symbol tables instead of one")
        self._table = tables[0]
        self._names = self._section(self._table.link, _STRINGS)
        self._places: dict[int, int] = {}
        """Where each loaded section begins in our memory; a common symbol by its negated number."""
        spans = self._lay_out()
        self._memory = mmap.mmap(-1, max(end for _, end, _ in spans), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for number, place in self._places.items():
            if number > 0 and self._sections[number].kind != _NO_BITS:
                section = self._sections[number]
                self._memory[place : place + section.size] = raw[section.offset : section.offset + section.size]
        for section in self._sections:
            if section.kind in (_RELA, _REL) and section.info in self._places:
                self._relocate(section)
        self._protect(spans)

    def function(self, name: str) -> int:
        """The address of a function that the object defines.

        Raises:
            ObjectCodeError: it does not.
        """
        for symbol in range(self._table.size // _SYMBOL.size):
            _, info, _, section, _, _ = self._symbol(symbol)
            if info & 15 == _FUNCTION and section in self._places and self._name(symbol) == name:
                if not self._sections[section].flags & _EXECUTE:
                    raise self._refused(f"{name} is no code")
                return self._address(symbol)
        raise self._refused(f"no function {name}")

    def _refused(self, why: str) -> ObjectCodeError:
        return ObjectCodeError(f"{self._where}: {why}")

    # ------------------------------------------------------------------------------------------------------------------------- reading
    def _read_sections(self) -> list[_Section]:
        if len(self._raw) < _HEADER.size:
            raise self._refused(f"{len(self._raw)} bytes, less than the header of an object")
        ident, kind, machine, _, _, _, at, _, _, _, _, entry, count, _ = _HEADER.unpack_from(self._raw)
        if not ident.startswith(_IDENT) or kind != _RELOCATABLE or machine != _X86_64:
            raise self._refused("no relocatable ELF object for x86-64")
        if entry != _SECTION.size or at + count * entry > len(self._raw):
            raise self._refused(f"{count} sections of {entry} bytes at {at}, in an object of {len(self._raw)} bytes")
        sections = []
        for number in range(count):
            _, kind, flags, _, offset, size, link, info, align, entry = _SECTION.unpack_from(self._raw, at + number * _SECTION.size)
            if kind not in (0, _NO_BITS) and offset + size > len(self._raw):
                raise self._refused(f"section {number} ends at {offset + size}, the object at {len(self._raw)}")
            sections.append(_Section(kind, flags, offset, size, link, info, max(align, 1), entry))
        return sections

    def _section(self, number: int, kind: int) -> _Section:
        if not 0 <= number < len(self._sections) or self._sections[number].kind != kind:
            raise self._refused(f"section {number} is not of kind {kind}")
        return self._sections[number]

    def _symbol(self, number: int) -> tuple[int, ...]:
        """Name, info, other, section, value, size."""
        if not 0 <= number < self._table.size // _SYMBOL.size:
            raise self._refused(f"no symbol {number}")
        return _SYMBOL.unpack_from(self._raw, self._table.offset + number * _SYMBOL.size)

    def _name(self, symbol: int) -> str:
        first = self._symbol(symbol)[0]
        if first >= self._names.size:
            raise self._refused(f"the name of symbol {symbol} lies outside of its section")
        end = self._raw.find(b"\0", self._names.offset + first, self._names.offset + self._names.size)
        if end < 0:
            raise self._refused(f"the name of symbol {symbol} has no end")
        return self._raw[self._names.offset + first : end].decode("utf-8", "replace")

    # ------------------------------------------------------------------------------------------------------------------ placing, linking
    def _lay_out(self) -> list[tuple[int, int, int]]:
        """Gives each section its place: code, constants and variables on pages of their own; returns (begin, end, protection) of each."""
        parts: dict[int, list[tuple[int, int, int]]] = {mmap.PROT_READ | mmap.PROT_EXEC: [], mmap.PROT_READ: [], _READ_WRITE: []}
        for number, section in enumerate(self._sections):
            if not section.flags & _ALLOCATE or section.kind == _UNWIND:
                continue
            if section.kind not in (_CONTENTS, _NO_BITS) or section.flags & (_THREAD_LOCAL | _COMPRESSED):
                raise self._refused(f"section {number} is of kind {section.kind:#x}, flags {section.flags:#x}")
            writable, executable = bool(section.flags & _WRITE), bool(section.flags & _EXECUTE)
            if writable and executable:
                raise self._refused(f"section {number} is both writable and executable")
            protection = mmap.PROT_READ | mmap.PROT_EXEC if executable else _READ_WRITE if writable else mmap.PROT_READ
            parts[protection].append((number, section.size, section.align))
        for symbol in range(1, self._table.size // _SYMBOL.size):
            _, _, _, where, align, size = self._symbol(symbol)
            if where == _COMMON:
                parts[_READ_WRITE].append((-symbol, size, align))
        spans, end = [], 0
        for protection, things in parts.items():
            begin = end
            for number, size, align in things:
                if align & (align - 1) or align > mmap.PAGESIZE:
                    raise self._refused(f"an alignment of {align} bytes")
                place = _round_up(end, max(align, _LINE))
                self._places[number], end = place, place + size
                if end > MAX_BYTES:
                    raise self._refused(f"more than {MAX_BYTES} bytes in memory")
            end = _round_up(end, mmap.PAGESIZE)
            if end > begin:
                spans.append((begin, end, protection))
        if not spans:
            raise self._refused("nothing to load")
        return spans

    def _address(self, symbol: int) -> int:
        _, _, _, section, value, _ = self._symbol(symbol)
        if section == _UNDEFINED:
            return self._external(self._name(symbol))
        if section == _COMMON:
            return self._base + self._places[-symbol]
        if section not in self._places or value > self._sections[section].size:
            raise self._refused(f"symbol {symbol} lies in section {section} at {value:#x}, which is not in memory")
        return self._base + self._places[section] + value

    def _external(self, name: str) -> int:
        if name not in CALLABLE:
            raise self._refused(f"it calls {name!r}, which it should not")
        for library in (None, "libm.so.6"):
            try:
                return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0
            except (AttributeError, OSError):
                continue
        raise self._refused(f"it calls {name!r}, which this system's C library does not have")

    def _relocations(self, section: _Section) -> Iterator[tuple[int, int, int]]:
        """Offset, info, addend."""
        if section.kind != _RELA or section.entry != _RELOCATION.size or section.size % _RELOCATION.size:
            raise self._refused(f"relocations of kind {section.kind}, {section.entry} bytes each")
        return _RELOCATION.iter_unpack(self._raw[section.offset : section.offset + section.size])

    def _relocate(self, section: _Section) -> None:
        place, size = self._places[section.info], self._sections[section.info].size
        addresses: dict[int, int] = {}
        for offset, info, addend in self._relocations(section):
            symbol, kind = info >> 32, info & 0xFFFFFFFF
            if kind not in (_ABSOLUTE_64, _RELATIVE_64):
                raise self._refused(f"a relocation of kind {kind}")
            if offset + 8 > size:
                raise self._refused(f"a relocation at {offset:#x} of a section of {size} bytes")
            if symbol not in addresses:
                addresses[symbol] = self._address(symbol)
            value = addresses[symbol] + addend - (self._base + place + offset if kind == _RELATIVE_64 else 0)
            struct.pack_into("<Q", self._memory, place + offset, value & (1 << 64) - 1)

    def _protect(self, spans: list[tuple[int, int, int]]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        for begin, end, protection in spans:
            if protection == _READ_WRITE:
                continue
            if libc.mprotect(ctypes.c_void_p(self._base + begin), ctypes.c_size_t(end - begin), protection):
                raise self._refused(f"this system refuses to run code from memory that was written (errno {ctypes.get_errno()})")


_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step
