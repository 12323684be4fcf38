"""A panic of a library that is written in Rust: what it raises is no `Exception`, so that nobody
catches it by chance.

The `tokenizers` library panics on some files that it should refuse. That is no reason to end a
program.
"""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["LibraryPanic", "panics_are_errors"]


class LibraryPanic(Exception):  # noqa: N818 - the thing's name
    """The library gave up; `str()` is what it said."""


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """Within the block a panic is a `LibraryPanic`. All else that is no Exception stays what it is:
    KeyboardInterrupt, SystemExit."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ == "pyo3_runtime":  # the class cannot be imported: each library has one of its own
            raise LibraryPanic(f"the library panics: {error}") from None
        raise
