"""References on the wire: the same again, and nothing but RemoteProtocolError whatever comes."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import RemoteProtocolError
from dairllm.graph.references import WeightReference
from dairllm.graph.slicing import Axis, Part, Span
from dairllm.protocol.dllama.limits import DEFAULT_LIMITS
from dairllm.protocol.dllama.references import read_references, write_references
from dairllm.protocol.stream import parse_all

NUMBERS = st.integers(0, 2**32 - 1)
SPANS = st.tuples(NUMBERS, NUMBERS).filter(lambda pair: pair[0] < pair[1]).map(lambda pair: Span(*pair))
PARTS = st.just(Part(Axis.WHOLE, None)) | st.builds(
    Part, st.sampled_from([Axis.ROWS, Axis.COLUMNS]), st.lists(SPANS, max_size=5).map(tuple)
)
NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=40)
REFERENCES = st.lists(st.builds(WeightReference, NAMES, NUMBERS, PARTS), max_size=6).map(tuple)


def read(data: bytes) -> tuple[WeightReference, ...]:
    return parse_all(read_references(DEFAULT_LIMITS), data)


@given(references=REFERENCES)
def test_what_is_written_is_read(references: tuple[WeightReference, ...]) -> None:
    assert read(write_references(references)) == references


def test_empty_spans_are_not_said() -> None:
    part = Part(Axis.ROWS, (Span(3, 3), Span(5, 7)))
    assert read(write_references([WeightReference("w", 0, part)])) == (WeightReference("w", 0, Part(Axis.ROWS, (Span(5, 7),))),)


@settings(max_examples=300)
@given(references=REFERENCES, place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.none() | st.integers(0, 10**6))
def test_spoilt_bytes_are_read_or_refused(references: tuple[WeightReference, ...], place: int, byte: int, cut: int | None) -> None:
    data = bytearray(write_references(references))
    data[place % len(data)] = byte
    with contextlib.suppress(RemoteProtocolError):
        for reference in read(bytes(data[: cut % len(data)] if cut is not None else data)):
            assert all(span.size > 0 for span in reference.part.spans or ())


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xaa\xaag\x01" + bytes(4), "expected references to weights"),
        (b"refs" + struct.pack("<I", DEFAULT_LIMITS.max_ops + 1), "number of references"),
        (b"refs" + struct.pack("<II2sIII", 1, 2, b"w\0", 0, 3, 0), "the axis of reference 0"),
        (b"refs" + struct.pack("<II2sIII", 1, 2, b"w\0", 0, 0, 1) + bytes(8), "the number of spans of reference 0"),
        (b"refs" + struct.pack("<II2sIII", 1, 2, b"w\0", 0, 1, 5000) + bytes(8), "the number of spans of reference 0"),
        (b"refs" + struct.pack("<II2sIIIII", 1, 2, b"w\0", 0, 1, 1, 7, 7), "to have a size, found 7..7"),
        (b"refs" + struct.pack("<II2sIIIII", 1, 2, b"w\0", 0, 1, 1, 7, 6), "to have a size, found 7..6"),
    ],
)
def test_what_cannot_be_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(RemoteProtocolError, match=problem):
        read(data)
