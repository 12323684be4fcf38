"""Random graphs between guard pages: whatever is compiled touches its own memory alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GUARD_SECONDS = 900


def outcome(first: int, count: int, tmp_path: Path, *threads: str) -> tuple[int, int, dict[str, Any]]:
    """Return code, the last seed that was tried, and the counts where all were."""
    seeds = tmp_path / "seed"
    command = [sys.executable, "-m", "tests.engine.guarded", str(first), str(count), str(seeds), *threads]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
    return done.returncode, int(seeds.read_bytes()), json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:]}


@pytest.mark.parametrize(("first", "count", "threads"), [(0, 2000, "1"), (50_000, 500, "3")])
def test_random_graphs_are_refused_or_stay_between_their_guards(first: int, count: int, threads: str, tmp_path: Path) -> None:
    code, seed, counts = outcome(first, count, tmp_path, threads)
    assert code == 0, f"seed {seed}: {signal.Signals(-code).name if code < 0 else counts}"
    assert counts["outside"] == counts["bugs"] == []
    assert counts["compiled"] == counts["run"] > count // 2


def test_who_touches_a_guard_is_seen(tmp_path: Path) -> None:
    """The guards are where they are said to be: one byte before an area, and one behind it."""
    for at_end, offset in ((False, -1), (True, 1000)):
        code = f"""
import ctypes
from tests.engine import guarded
guarded.at_end = {at_end}
area = guarded.guarded_alone(1000)
area[:] = 1
ctypes.memset(area.ctypes.data + {offset}, 0, 1)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=GUARD_SECONDS, check=False)
        assert done.returncode == -signal.SIGSEGV
