"""Bytes land where they should, however they are cut; parsers get exactly what they asked for."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.protocol.stream import Intake, Need, Parser, parse_all


def two_words(what: str = "word") -> Parser[tuple[bytes, bytes]]:
    first = yield Need(2, f"first {what}")
    second = yield Need(3, f"second {what}")
    return first, second


def feed(intake: Intake, data: bytes) -> int:
    """Write as much of `data` as one read of a transport would."""
    buffer = intake.get_buffer()
    n = min(len(buffer), len(data))
    buffer[:n] = data[:n]
    intake.buffer_updated(n)
    return n


def test_parse_all_returns_the_message() -> None:
    assert parse_all(two_words(), b"abcde") == (b"ab", b"cde")


@pytest.mark.parametrize("data", [b"", b"a", b"ab", b"abcd"])
def test_parse_all_names_what_is_missing(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=r"expected [23] bytes of (first|second) word, found [0-2]"):
        parse_all(two_words(), data)


def test_parse_all_refuses_more_than_the_message() -> None:
    with pytest.raises(RemoteProtocolError, match="byte 5: expected the end, found 2 more bytes"):
        parse_all(two_words(), b"abcdefg")


def test_parse_all_of_a_parser_that_needs_nothing() -> None:
    def nothing() -> Parser[int]:
        return 7
        yield Need(0, "")

    assert parse_all(nothing(), b"") == 7


def test_take_gives_all_or_nothing() -> None:
    intake = Intake(8)
    feed(intake, b"abc")
    assert intake.take(4) is None
    assert intake.take(2) == b"ab"
    assert (intake.available, intake.consumed, intake.total) == (1, 2, 3)


def test_the_read_ahead_is_used_again_and_again() -> None:
    intake = Intake(8)
    for start in range(0, 200, 5):
        data = bytes(range(start, start + 5))
        assert feed(intake, data) == 5
        assert intake.take(5) == data


def test_a_full_read_ahead_takes_no_more() -> None:
    intake = Intake(4)
    assert feed(intake, b"abcdef") == 4
    assert not intake.has_room
    assert len(intake.get_buffer()) == 0
    assert intake.take(1) == b"a"
    assert intake.has_room
    assert feed(intake, b"ef") >= 1


def test_targets_are_written_without_a_copy() -> None:
    intake, target = Intake(8), bytearray(6)
    intake.receive_into((memoryview(target),))
    feed(intake, b"abcd")
    assert target == b"abcd\0\0"
    assert intake.filling
    assert intake.missing == 2
    feed(intake, b"efgh")  # one read never goes beyond the target
    assert target == b"abcdef"
    assert not intake.filling
    assert feed(intake, b"gh") == 2
    assert intake.take(2) == b"gh"


def test_what_was_read_ahead_is_moved_to_its_target() -> None:
    intake, first, second = Intake(8), bytearray(2), bytearray(5)
    feed(intake, b"abcd")
    intake.receive_into((memoryview(first), memoryview(bytearray()), memoryview(second)))
    assert (first, second) == (b"ab", b"cd\0\0\0")
    assert intake.missing == 3
    feed(intake, b"efg")
    assert second == b"cdefg"


def test_more_than_the_buffer_cannot_have_been_written() -> None:
    intake = Intake(4)
    with pytest.raises(LocalProtocolError, match="5 bytes were written into a buffer of 4"):
        intake.buffer_updated(5)
    intake.receive_into((memoryview(bytearray(2)),))
    with pytest.raises(LocalProtocolError, match="into a buffer of 2"):
        intake.buffer_updated(3)


@given(seed=st.integers(0, 1 << 32))
def test_any_order_of_reads_takes_and_targets_keeps_the_stream(seed: int) -> None:
    choose, stream = random.Random(seed), bytes(range(200))  # noqa: S311  # to cut, not to keep secrets
    intake, sent, got = Intake(8), 0, b""
    while len(got) < len(stream):
        for _ in range(choose.randint(0, 3)):
            sent += feed(intake, stream[sent : sent + choose.randint(0, 20)])
        want = min(choose.randint(1, 40), len(stream) - len(got))
        if choose.random() < 0.5:
            cut = choose.randint(0, want)
            targets = bytearray(cut), bytearray(want - cut)
            intake.receive_into(tuple(map(memoryview, targets)))
            while intake.filling:
                sent += feed(intake, stream[sent:])
            got += b"".join(targets)
        else:
            got += intake.take(min(want, intake.available)) or b""
        assert intake.consumed == len(got)
        assert intake.total == sent
    assert got == stream
