"""The file of logits is whole however it ends, and is refused where it cannot be."""

from pathlib import Path

import numpy as np
import pytest

from dairllm.commands.logits_file import LogitsFile
from dairllm.errors import ConfigError, NetworkError


def rows(n: int, vocab: int = 7) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    return list(np.random.default_rng(n).standard_normal((n, vocab)).astype(np.float32))


@pytest.mark.parametrize("n_rows", [0, 1, 9, 10, 1001])
def test_it_holds_the_rows_that_came(tmp_path: Path, n_rows: int) -> None:
    with LogitsFile(tmp_path / "l.npy", 7) as file:
        for row in rows(n_rows):
            file.append(row)
    found = np.load(tmp_path / "l.npy", allow_pickle=False)
    assert (found.dtype, found.shape) == (np.dtype("<f4"), (n_rows, 7))
    assert found.tobytes() == b"".join(row.tobytes() for row in rows(n_rows))


def test_an_error_leaves_what_there_was(tmp_path: Path) -> None:
    def fail() -> None:
        with LogitsFile(tmp_path / "l.npy", 7) as file:
            for row in rows(3):
                file.append(row)
            raise NetworkError("gone")

    with pytest.raises(NetworkError):
        fail()
    assert np.load(tmp_path / "l.npy").shape == (3, 7)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--logits .*: No such file or directory"):
        LogitsFile(tmp_path / "nonesuch" / "l.npy", 7)
