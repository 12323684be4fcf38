"""Under what conditions something was measured: without them a figure says nothing."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dairllm import __version__, machine
from dairllm.kernels import forms

__all__ = ["conditions"]

_PACKAGES = ("numpy", "numba", "llvmlite", "uvloop")


def conditions(model: Path, kernels: str, n_threads: int, busy: int) -> dict[str, Any]:
    """Date, machine, load, versions.

    Args:
        kernels: form, or "auto".
        n_threads: of each program.
        busy: processes that are kept busy beside each run.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "processors": machine.processors(),
        "forms": list(forms.available()),
        "memory_bytes": machine.memory_bytes(),
        "kernels": forms.available()[0] if kernels == "auto" else kernels,
        "threads": n_threads,
        "busy": busy,
        "load": [round(load, 2) for load in os.getloadavg()],
        "model": model.name,
        "model_bytes": model.stat().st_size,
        "versions": {"dairllm": __version__, "python": platform.python_version(), "system": platform.release(), **_versions()},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
