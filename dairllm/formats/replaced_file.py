"""Files that appear complete or not at all, and the folders that they are put into."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["made_folder", "replaced_file"]


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it, as far as they are missing. Where the block is left by an
    exception, those that were made are removed again, unless there is something in them.

    Raises:
        OSError: it cannot be made; a file of the name is there, for instance.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside `path`; at the end of the block it is flushed to the disk and takes the place of `path`.

    Where the block is left by an exception, the temporary file is removed and `path` stays as it was.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
