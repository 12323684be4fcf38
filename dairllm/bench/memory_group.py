"""A control group that limits memory, page cache included: the one way to make a machine smaller for any program. Needs root."""

import os
import secrets
from pathlib import Path
from types import TracebackType

from dairllm.errors import ConfigError

__all__ = ["MemoryGroup"]


class MemoryGroup:
    """A group of its own under the top; a context manager that removes it. Both versions of control groups are known.

    Args:
        limit: bytes.
        root: where control groups are mounted.

    Raises:
        ConfigError: this process may make none, or the system has none for memory.
    """

    def __init__(self, limit: int, root: Path = Path("/sys/fs/cgroup")) -> None:
        legacy = root / "memory"
        top, self._limit_name, self._peak_name = (
            (legacy, "memory.limit_in_bytes", "memory.max_usage_in_bytes") if legacy.is_dir() else (root, "memory.max", "memory.peak")
        )
        self._folder = top / f"dairllm-bench-{secrets.token_hex(4)}"
        self._limit = limit

    def __enter__(self) -> "MemoryGroup":
        try:
            self._folder.mkdir()
            (self._folder / self._limit_name).write_text(str(self._limit))
        except OSError as error:
            raise ConfigError(f"no control group for memory can be made ({error.strerror} at {error.filename}); it takes root") from error
        return self

    def enter(self) -> None:
        """Put this process into the group; for a child that has just been forked."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak(self) -> int:
        """The most that the group has held, in bytes; 0 where the system does not tell."""
        try:
            return int((self._folder / self._peak_name).read_text())
        except OSError:
            return 0

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.rmdir()
