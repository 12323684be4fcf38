"""A `.npy` file of logits that grows row by row."""

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from dairllm.errors import ConfigError

__all__ = ["LogitsFile"]


class LogitsFile:
    """float32 [rows, vocabulary]; a context manager. However it ends, the file holds the rows that came.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._vocab_size, self._rows = vocab_size, 0
        try:
            self._file: BinaryIO = path.open("wb")
        except OSError as error:
            raise ConfigError(f"--logits {path}: {error.strerror or error}") from None
        self._write_header()

    def append(self, logits: NDArray[np.float32]) -> None:
        """One more row, [vocabulary]."""
        self._file.write(np.ascontiguousarray(logits, dtype="<f4").data)
        self._rows += 1

    def _write_header(self) -> None:
        """numpy leaves room in it for the number of rows to grow."""
        self._file.seek(0)
        shape = (self._rows, self._vocab_size)
        npy.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": shape})

    def close(self) -> None:
        self._write_header()
        self._file.close()

    def __enter__(self) -> "LogitsFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
