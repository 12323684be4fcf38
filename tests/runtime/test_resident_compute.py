"""Weights that are used where they lie: whoever changes the file fails the pass, and no token is made of what was written."""

import contextlib
import math
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(1) as started:
        yield started


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_random_model(tmp_path / "m.m", small_spec(dim=256, n_heads=8))
    return tmp_path / "m.m"


@contextlib.asynccontextmanager
async def opened(path: Path, executor: Executor) -> AsyncIterator[LocalNode]:
    compute: Compute[Program] = Compute(executor, math.inf)
    with ModelFile.open(path) as model:
        compute.open()
        node = LocalNode(model, compute, n_threads=1)
        try:
            await node.open()
            yield node
        finally:
            await node.close()
            compute.close()


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"changed")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (write_into, "has been written to since it was opened"),
        (lambda path: os.truncate(path, 100_000), r"had \d+ bytes when it was opened and has 100000 now"),
        (lambda path: os.truncate(path, 0), r"had \d+ bytes when it was opened and has 0 now"),
    ],
    ids=["written to", "cut", "emptied"],
)
async def test_a_changed_file_fails_the_pass(path: Path, executor: Executor, change: Callable[[Path], object], told: str) -> None:
    async with opened(path, executor) as node:
        await node.feed([1, 2], 0, logits=True)
        change(path)
        for _ in range(2):
            with pytest.raises(EngineError, match=rf"m\.m {told}"):
                await node.feed([3], 2, logits=True)


async def test_what_is_written_within_a_pass_makes_no_token(path: Path, executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Executor.run

    def run_and_write(executor: Executor, program: Program, first: int, stop: int, position: int, rows: int, first_row: int = 0) -> None:
        run(executor, program, first, stop, position, rows, first_row)
        write_into(path)

    async with opened(path, executor) as node:
        await node.feed([1, 2], 0, logits=True)
        monkeypatch.setattr(Executor, "run", run_and_write)
        with pytest.raises(EngineError, match="has been written to"):
            await node.feed([3], 2, logits=True)


async def test_a_file_replaced_while_it_is_used_changes_nothing(path: Path, executor: Executor) -> None:
    async with opened(path, executor) as node:
        first = np.array(await node.feed([1, 2], 0, logits=True))
        write_random_model(path.with_name("other.m"), small_spec(), seed=1)
        os.replace(path.with_name("other.m"), path)
        assert np.array_equal(first, np.array(await node.feed([1, 2], 0, logits=True)))


async def test_a_file_put_in_its_place_before_it_is_opened_is_refused(path: Path, executor: Executor) -> None:
    compute: Compute[Program] = Compute(executor)
    with ModelFile.open(path) as model:
        os.replace(shutil.copy(path, path.with_name("other.m")), path)
        with pytest.raises(EngineError, match=r"m\.m has been replaced since it was opened"):
            await LocalNode(model, compute, n_threads=1).open()
        os.unlink(path)
        with pytest.raises(EngineError, match=r"m\.m cannot be opened: No such file"):
            await LocalNode(model, compute, n_threads=1).open()
