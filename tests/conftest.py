"""Shared by all tests: async tests run on asyncio's own loop and on uvloop, and none sees or leaves anything outside its folders.

Those of the server run on uvloop, as it does; so do tests that say so, whose time goes into what a loop has no part in.

Compiled kernels are kept in `.pytest_cache`, from one run to the next: nobody's own cache is used or filled.
"""

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator

import hypothesis
import pytest
import uvloop

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.runtime.compute import Compute

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    served = {"uvloop": uvloop.new_event_loop}
    return served if item.path.parent.name == "api" else {"asyncio": asyncio.new_event_loop, **served}


def pytest_configure(config: pytest.Config) -> None:
    """Settings of whoever runs the tests are none of the tests', and neither is their cache."""
    for name in list(os.environ):
        if name.startswith("DAIRLLM_") and not name.startswith("DAIRLLM_TEST_"):
            del os.environ[name]
    os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".pytest_cache" / "xdg")
    for number in (signal.SIGHUP, signal.SIGINT):  # `nohup make test &` has them ignored, by all programs that tests start
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes are started, and each would compile all sources


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are processors: what a test waits for is not always a processor."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs put into the system's folder for temporary files stays among the tests' own."""
    folder = tmp_path_factory.mktemp("temporary")
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    yield
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.fixture(scope="session")
def executors() -> Iterator[list[Executor]]:
    """One for each node that a test may run at once, a thread each; kernels are loaded once for all tests."""
    made = [Executor(1).start() for _ in range(5)]
    yield made
    for executor in made:
        executor.close()


@pytest.fixture
async def compute(executors: list[Executor]) -> AsyncIterator[Compute[Program]]:
    made: Compute[Program] = Compute(executors[-1])
    made.open()
    yield made
    made.close()
