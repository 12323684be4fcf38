"""Shared by all tests: every async test runs on asyncio's own loop and on uvloop, and none sees or leaves anything outside its folders.

Compiled kernels are kept in `.pytest_cache`, from one run to the next: nobody's own cache is used or filled.
"""

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator

import hypothesis
import pytest
import uvloop

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("any machine")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    """Settings of whoever runs the tests are none of the tests', and neither is their cache."""
    for name in list(os.environ):
        if name.startswith("DAIRLLM_") and not name.startswith("DAIRLLM_TEST_"):
            del os.environ[name]
    os.environ["XDG_CACHE_HOME"] = str(config.rootpath / ".pytest_cache" / "xdg")


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
