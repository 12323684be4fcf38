"""Which form of the kernels this process runs, and where its machine code is kept.

All forms compute the same bits (docs/arithmetic.md); they differ in the instructions that multiply bytes:

    portable     plain vector IR, no instruction of a particular processor: runs anywhere
    avx2         vpmaddubsw, vpmaddwd; half-precision conversions by F16C
    avxvnni      vpdpbusd on 256 bits, VEX encoded
    avx512vnni   vpdpbusd on 512 bits

The form is a property of the process: it is chosen once, before the kernels are imported, since an instruction that
the processor lacks ends the process. Numba caches by source file alone, so the cache lies in a folder named by
everything else that decides the machine code: all kernel sources, versions, the processor's features and the form.
"""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import config

from dairllm.errors import ConfigError

__all__ = ["FORMS", "available", "cache_folder", "current", "host_features", "select"]

FORMS = ("avx512vnni", "avxvnni", "avx2", "portable")
"""Best first."""

_NEEDS = {
    "avx512vnni": {"avx512vnni", "avx512vl", "avx512bw", "avx512f", "avx2", "fma", "f16c"},
    "avxvnni": {"avxvnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}

_selected: str | None = None
_numba: Any = config  # it sets its attributes dynamically


def host_features() -> frozenset[str]:
    """Features of the processor that numba compiles for; NUMBA_CPU_NAME and NUMBA_CPU_FEATURES can hide some, which is
    how fallbacks are tested."""
    told = _numba.CPU_FEATURES
    if told is not None:
        return frozenset(f[1:] for f in told.split(",") if f.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def available() -> tuple[str, ...]:
    """The forms that this processor can run, best first."""
    features = host_features()
    return tuple(form for form in FORMS if _NEEDS[form] <= features)


def select(name: str = "auto") -> str:
    """Choose the form of this process; returns its name.

    Raises:
        ConfigError: no such form, this processor cannot run it, or the process already runs another.
    """
    global _selected
    can = available()
    if name == "auto":
        name = _selected or can[0]
    if name not in FORMS:
        raise ConfigError(f"kernels: no form is called {name!r}; there are auto, {', '.join(FORMS)}")
    if name not in can:
        missing = ", ".join(sorted(_NEEDS[name] - host_features()))
        raise ConfigError(f"kernels: this processor cannot run {name} (it lacks {missing}); it can run {', '.join(can)}")
    if _selected not in (None, name):
        raise ConfigError(f"kernels: this process already runs {_selected} and cannot change to {name}")
    _selected = name
    return name


def current() -> str:
    """The chosen form; chooses the best where nobody has chosen."""
    return _selected or select()


def cache_folder() -> Path | None:
    """Where numba keeps this form's machine code; None where no folder can be written, which costs a compilation at each start."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    cpu = _numba.CPU_NAME or llvm.get_host_cpu_name()
    for part in (numba.__version__, llvmlite.__version__, cpu, ",".join(sorted(host_features())), current()):
        digest.update(f"\0{part}".encode())
    for root in _cache_roots():
        folder = root / "kernels" / digest.hexdigest()[:24]
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        # machine code is loaded from here: it must be ours, and nobody else may write it
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    return None


def _cache_roots() -> Iterator[Path]:
    """Where caches may lie, best first. A container may have no home, and nothing that can be written to at all."""
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dairllm"
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"dairllm-{os.getuid()}"
