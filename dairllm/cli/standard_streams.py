"""The three standard streams, made fit for use whatever state the process was started in."""

import io
import os
import sys
from typing import TextIO, cast

__all__ = ["open_standard_streams"]


def open_standard_streams() -> None:
    """Give each standard descriptor that is closed a place, and let no character fail.

    A descriptor that is closed would be given to the next file that is opened: a socket as stdout.
    Reading from a closed stdin finds its end, writing to a closed stdout fails with EBADF as it would
    without us, and what is written to a closed stderr is lost: nobody can be told.

    A character that the encoding of a stream has not is written as "?".
    """
    for fd, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest that is free, which is `fd`
    sys.stdin = sys.stdin or _stream(0, "r")
    sys.stdout = sys.stdout or _stream(1, "w")
    sys.stderr = sys.stderr or _stream(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _stream(fd: int, mode: str) -> TextIO:
    return cast(TextIO, open(fd, mode, encoding="utf-8", closefd=False))
