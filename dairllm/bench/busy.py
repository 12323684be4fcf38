"""Other work on the machine, made on purpose: processes that compute without pause while something is measured."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["busy_processes"]

_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:  # nobody else ends it where the bench is killed
    for _ in range(1_000_000):
        pass
"""


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many of them, until the block ends."""
    with ExitStack() as stack:
        for _ in range(count):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-I", "-S", "-c", _LOOP]))  # noqa: S603 - our own words
            stack.callback(process.kill)
        yield
