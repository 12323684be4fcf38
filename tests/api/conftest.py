"""A model and a thread for the servers of all tests."""

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest

from dairllm.engine.executor import Executor
from tests.api.serving import Serving, serving, write_model


class Serve(Protocol):
    def __call__(self, **settings: Any) -> AbstractAsyncContextManager[Serving]: ...


@pytest.fixture(scope="session")
def executor() -> Iterator[Executor]:
    with Executor(1) as started:
        yield started


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"))


@pytest.fixture
def serve(model_path: Path, executor: Executor) -> Serve:
    """A server over the small model, or over the one at `path`; the other arguments are those of `serving`."""

    def serve(path: Path = model_path, **settings: Any) -> AbstractAsyncContextManager[Serving]:
        return serving(path, executor, **settings)

    return serve
