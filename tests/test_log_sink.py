"""A log that cannot be written loses lines, says so when it can, and is nobody else's trouble."""

import contextlib
import io
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from dairllm.log_sink import LogSink


def told(lines: int) -> str:
    return f"{lines} lost\n"


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, TextIO]]:
    """(reader, writer)"""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        try:
            yield reader, stream
        finally:
            with contextlib.suppress(OSError):
                os.close(reader)


def read(reader: int) -> str:
    """What is there now."""
    found = b""
    while select.select([reader], [], [], 0)[0] and (more := os.read(reader, 1 << 20)):
        found += more
    return found.decode()


def test_a_line_is_written_at_once(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        sink = LogSink(stream, told)
        assert sink.write("one\n") == 4
        sink.write("half a letter \ud800\n")
        assert (tmp_path / "log").read_text() == "one\nhalf a letter \\ud800\n"
        assert not sink.isatty()


def test_a_stream_that_is_none_of_the_systems_is_written_too() -> None:
    stream = io.StringIO()
    LogSink(stream, told).write("one\n")
    assert stream.getvalue() == "one\n"


def test_a_process_without_stderr_has_no_log() -> None:
    sink = LogSink(None, told)
    assert sink.write("one\n") == 4
    assert (sink.lost, sink.isatty()) == (0, False)


def test_a_device_that_is_full() -> None:
    with open("/dev/full", "w") as stream:
        sink = LogSink(stream, told)
        for _ in range(3):
            sink.write("line\n")
        assert sink.lost == 3


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become larger than 100 bytes, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    path, limits = tmp_path / "log", resource.getrlimit(resource.RLIMIT_FSIZE)
    with path.open("w") as stream:
        sink = LogSink(stream, told)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        for n in range(5):
            sink.write(f"{n}{'.' * 28}\n")
        assert sink.lost == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sink.write("room again\n")
        assert sink.lost == 0
    *whole, torn, lost, last = path.read_text().splitlines()
    assert [line[0] for line in whole] == ["0", "1", "2"]
    assert torn == "3........."
    assert (lost, last) == ("2 lost", "room again")


def test_a_reader_that_has_gone() -> None:
    with pipe() as (reader, stream):
        sink = LogSink(stream, told)
        sink.write("one\n")
        os.close(reader)
        sink.write("two\n")
        assert sink.lost == 1


def test_a_stream_that_was_closed(tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    sink = LogSink(stream, told)
    stream.close()
    sink.write("one\n")
    assert (sink.lost, sink.isatty()) == (1, False)


def test_a_descriptor_that_was_closed_below_it(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        kept = os.dup(stream.fileno())
        os.close(stream.fileno())
        sink = LogSink(stream, told)
        sink.write("one\n")
        assert sink.lost == 1
        os.dup2(kept, stream.fileno())
        os.close(kept)
        sink.write("two\n")
    assert (tmp_path / "log").read_text() == "1 lost\ntwo\n"


def test_a_reader_that_does_not_read_is_waited_for_once() -> None:
    """A terminal that was stopped, a collector that hangs: lines are lost, nothing waits for ever."""
    with pipe() as (reader, stream):
        sink, line = LogSink(stream, told), "." * 9999 + "\n"
        begun = time.monotonic()
        for _ in range(1000):
            sink.write(line)
        assert time.monotonic() - begun < 60  # 0.2 s; it was for ever
        assert 900 < sink.lost < 1000
        lost = sink.lost
        assert set(read(reader)) == {".", "\n"}
        sink.write("he reads\n")
        assert sink.lost == 0
        assert read(reader) == f"\n{lost} lost\nhe reads\n"


def test_what_others_left_in_the_streams_buffer_comes_first(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as stream:
        stream.write("a bar\n")
        LogSink(stream, told).write("one\n")
    assert (tmp_path / "log").read_text() == "a bar\none\n"


def test_this_processs_own_stderr_is_not_needed() -> None:
    assert LogSink(sys.__stderr__, told).lost == 0
