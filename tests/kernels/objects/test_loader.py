"""The loader, against the object that it is for, and against everything like it that it must not load."""

import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dairllm.engine.allocation import aligned
from dairllm.kernels.objects.cache import Objects
from dairllm.kernels.objects.loader import MACHINES, ObjectCode, ObjectCodeError
from tests.kernels.start_kernels import own_objects

pytestmark = pytest.mark.skipif(platform.machine() not in MACHINES, reason="objects of x86-64")

SECTIONS_AT, N_SECTIONS, SECTION, RELOCATION = 40, 60, 64, 24
TYPE, FLAGS, OFFSET, SIZE, LINK, ALIGN = 4, 8, 24, 32, 40, 48
"""Offsets in a section's header."""
RELA, SYMBOLS = 4, 2


@pytest.fixture(scope="module")
def objects() -> Objects:
    return own_objects()


@pytest.fixture(scope="module")
def ring(objects: Objects) -> bytes:
    return objects["ring"][1]


def headers(raw: bytes, kind: int) -> Iterator[int]:
    """Where the headers of sections of a kind are."""
    (first,), (count,) = struct.unpack_from("<Q", raw, SECTIONS_AT), struct.unpack_from("<H", raw, N_SECTIONS)
    for at in range(first, first + count * SECTION, SECTION):
        if struct.unpack_from("<I", raw, at + TYPE)[0] == kind:
            yield at


def code_header(raw: bytes) -> int:
    """That of the section with the code, which is not the only one for code."""
    return next(at for at in headers(raw, 1) if raw[at + FLAGS] & 4 and struct.unpack_from("<Q", raw, at + SIZE)[0])


def first_entry(raw: bytes, kind: int) -> int:
    return int(struct.unpack_from("<Q", raw, next(headers(raw, kind)) + OFFSET)[0])


def changed(raw: bytes, form: str, at: int, *values: int) -> bytes:
    copy = bytearray(raw)
    struct.pack_into(form, copy, at, *values)
    return bytes(copy)


def test_what_was_loaded_runs(objects: Objects) -> None:
    symbol, raw = objects["ring"]
    code = ObjectCode(raw, "ring")
    call = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(code.function(symbol))
    mailbox, unused = aligned(320).view("int64"), aligned(64)
    assert call(unused.ctypes.data, unused.ctypes.data, mailbox.ctypes.data, 7) == 0
    assert (mailbox[0], set(mailbox[1:])) == (7, {0})


def test_nothing_is_both_writable_and_executable(objects: Objects) -> None:
    loaded = [(ObjectCode(raw, name), symbol) for name, (symbol, raw) in objects.items()]
    rights = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, end, right = re.match(r"(\w+)-(\w+) (....)", line).groups()  # type: ignore[union-attr] # every line is like that
        rights[range(int(first, 16), int(end, 16))] = right
    for code, symbol in loaded:
        assert [right for span, right in rights.items() if code.function(symbol) in span] == ["r-xp"]
        own = {right for span, right in rights.items() if code._base <= span.start < code._base + len(code._memory)}
        assert not [right for right in own if "w" in right and "x" in right], own


def test_no_part_of_an_object_is_enough(ring: bytes) -> None:
    for size in range(len(ring)):
        with pytest.raises(ObjectCodeError):
            ObjectCode(ring[:size], "a part")


def test_no_wrong_byte_brings_the_loader_down(ring: bytes) -> None:
    """Each byte in turn, as it should not be: it is refused, or matters to nobody but the code itself."""
    refused = 0
    for at in range(len(ring)):
        for byte in {0, 0x7F, 0xFF, ring[at] ^ 1, ring[at] ^ 0x80} - {ring[at]}:
            try:
                ObjectCode(changed(ring, "<B", at, byte), "a wrong byte")
            except ObjectCodeError:
                refused += 1
    assert refused > len(ring) // 4


def refusals(ring: bytes) -> Iterator[tuple[str, bytes]]:
    """(what is said, an object)."""
    yield "no relocatable ELF object", b"#!/bin/sh\n" + ring
    yield "no relocatable ELF object", changed(ring, "<H", 16, 3)  # a shared library
    yield "no relocatable ELF object", changed(ring, "<H", 18, 183)  # ARM
    yield "no relocatable ELF object", changed(ring, "<B", 5, 2)  # big endian
    yield "it calls 'sysca11', which it should not", ring.replace(b"\0syscall\0", b"\0sysca11\0")
    yield "it calls 'execve", ring.replace(b"\0syscall\0", b"\0execve\0\0")
    relocation = first_entry(ring, RELA)
    yield "a relocation of kind 11", changed(ring, "<I", relocation + 8, 11)
    yield "a relocation at 0x7fffffff0000", changed(ring, "<Q", relocation, 0x7FFFFFFF0000)
    yield "no symbol 4096", changed(ring, "<I", relocation + 12, 4096)
    yield "relocations of kind 9", changed(ring, "<I", next(headers(ring, RELA)) + TYPE, 9)
    code = code_header(ring)
    yield "both writable and executable", changed(ring, "<Q", code + FLAGS, 7)
    yield "flags 0x406", changed(ring, "<Q", code + FLAGS, 0x406)  # of each thread
    yield "kind 0xe", changed(ring, "<I", code + TYPE, 14)  # what is run before anything is called
    yield "ends at", changed(ring, "<Q", code + SIZE, 1 << 40)
    yield "an alignment of 12", changed(ring, "<Q", code + ALIGN, 12)
    symbols = next(headers(ring, SYMBOLS))
    yield "0 symbol tables", changed(ring, "<I", symbols + TYPE, 1)
    yield "not of kind 3", changed(ring, "<I", symbols + LINK, 99)
    yield "an object of 67108865 bytes", ring + bytes((64 << 20) + 1 - len(ring))


def test_what_is_refused_is_named(ring: bytes) -> None:
    for said, raw in refusals(ring):
        assert raw != ring
        with pytest.raises(ObjectCodeError, match=f"^kept code: .*{re.escape(said)}"):
            ObjectCode(raw, "kept code")


def test_memory_for_what_is_not_in_the_file_is_bounded(ring: bytes) -> None:
    raw = bytearray(ring)
    code = code_header(ring)
    struct.pack_into("<I", raw, code + TYPE, 8)  # zeros, of which only the number is in the file
    struct.pack_into("<Q", raw, code + SIZE, 1 << 62)
    with pytest.raises(ObjectCodeError, match="more than 67108864 bytes in memory"):
        ObjectCode(bytes(raw), "zeros")


def test_only_functions_are_functions(objects: Objects) -> None:
    symbol, raw = objects["ring"]
    code = ObjectCode(raw, "ring")
    for name in ("syscall", "", symbol[:-1], "_ZN08NumbaEnv" + symbol[3:]):
        with pytest.raises(ObjectCodeError, match="no function"):
            code.function(name)


def test_memory_is_given_back(ring: bytes) -> None:
    def maps() -> int:
        return len(Path(f"/proc/{os.getpid()}/maps").read_text().splitlines())

    ObjectCode(ring, "ring")
    before = maps()
    for _ in range(50):
        ObjectCode(ring, "ring")
    assert maps() <= before + 3
