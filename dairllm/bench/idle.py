"""A measurement is made when nobody else uses the processors."""

import os
import time
from pathlib import Path

__all__ = ["wait_until_idle"]

_LIMIT = 0.06
"""Share of the processors that others may use: less than this is the system itself."""


def wait_until_idle(patience: float = 30.0) -> bool:
    """Until others use next to nothing of the processors; False where they still do when `patience` seconds have passed."""
    end = time.monotonic() + patience
    while True:
        before, begun = _busy_seconds(), time.monotonic()
        time.sleep(0.5)
        if (_busy_seconds() - before) / (time.monotonic() - begun) / (os.cpu_count() or 1) < _LIMIT:
            return True
        if time.monotonic() > end:
            return False


def _busy_seconds() -> float:
    fields = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
