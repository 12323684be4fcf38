"""Which processor this is, and what it can do: asked of the system, since the compiler that would know it is not in the process."""

import hashlib
import os
import platform
from pathlib import Path

__all__ = ["features", "identity"]

_LLVM_NAMES = {"avx512_vnni": "avx512vnni", "avx_vnni": "avxvnni", "sse4_1": "sse4.1", "sse4_2": "sse4.2"}
"""Flags of Linux that LLVM, and so everything here, calls otherwise."""

_KIND = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")
_KIND_ARM = ("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features")
"""Lines of /proc/cpuinfo that say what a processor is; the others (clock rate, number) say how it is just now, and which."""


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What all processors of this machine can do, by LLVM's names; empty where the system does not tell.

    NUMBA_CPU_FEATURES, which the compiler obeys as well, can hide some: so forms for lesser processors are tested.
    """
    told = os.environ.get("NUMBA_CPU_FEATURES")
    if told is not None:
        return frozenset(f[1:] for f in told.split(",") if f.startswith("+"))
    flags = [set(value.split()) for name, value in _lines(cpuinfo) if name in ("flags", "Features")]
    return frozenset(_LLVM_NAMES.get(flag, flag) for flag in set.intersection(*flags)) if flags else frozenset()


def identity(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """A digest of the kind of the machine's processors, and of what the environment hides of it; None where the system does not tell."""
    kinds = {(name, value) for name, value in _lines(cpuinfo) if name in _KIND + _KIND_ARM}
    if not kinds:
        return None
    hidden = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_CPU_"))
    return hashlib.sha256(repr((platform.machine(), sorted(kinds), hidden)).encode()).hexdigest()


def _lines(cpuinfo: Path) -> list[tuple[str, str]]:
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]
