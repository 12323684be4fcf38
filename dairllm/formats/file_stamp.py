"""What tells, without reading a file, that it is still the one that was read."""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FileStamp"]


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as the system describes it.

    Attributes:
        device, inode: which file it is; another one under the same path has others.
        nbytes: its length.
        mtime_ns: when it was last written.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int | Path) -> "FileStamp":
        """Of an open file's descriptor, or of whatever lies under a path now.

        Raises:
            OSError: nothing does.
        """
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def change(self, path: Path, descriptor: int | None = None) -> str | None:
        """What has happened to the file under `path`, or to the one that was opened there, since, for people; None where it is the same."""
        try:
            now = FileStamp.of(path if descriptor is None else descriptor)
        except OSError as error:
            return f"{path} cannot be found any more: {error.strerror or error}"
        if now == self:
            return None
        if now.nbytes != self.nbytes:
            return f"{path} had {self.nbytes} bytes when it was opened and has {now.nbytes} now"
        if (now.device, now.inode) != (self.device, self.inode):
            return f"{path} has been replaced since it was opened"
        return f"{path} has been written to since it was opened"
