"""What this process may use of its machine: memory and processors, as the hardware and the control group (container) bound them."""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["give_back_libraries", "give_back_memory", "memory_bytes", "peak_rss_bytes", "processors", "rss_bytes"]


_PAGE_OUT = 21  # MADV_PAGEOUT


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may come to hold: the machine's, or its control group's where that is less.

    Both versions of control groups are read, and every group above ours, since a limit on an ancestor binds as well.

    Args:
        root: the file system to look at.
    """
    amounts = [_meminfo(root) or _physical()]
    for text in _cgroup_files(root, "memory.max", "memory/memory.limit_in_bytes"):
        if text.isdigit():  # version 2 writes "max" where there is no limit, version 1 a number larger than any memory
            amounts.append(int(text))
    return min(amounts)


def processors(root: Path = Path("/")) -> int:
    """Processors that this process may keep busy: those it may be scheduled on, less where its control group has a quota."""
    count = float(len(os.sched_getaffinity(0)))
    for text in _cgroup_files(root, "cpu.max", None):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, int(quota) / int(period))
    quotas = _cgroup_files(root, None, "cpu/cpu.cfs_quota_us")
    periods = _cgroup_files(root, None, "cpu/cpu.cfs_period_us")
    for quota, period in zip(quotas, periods, strict=False):
        if quota.isdigit() and period.isdigit() and int(period):
            count = min(count, int(quota) / int(period))
    return max(1, math.floor(count + 0.01))


def peak_rss_bytes(process: int | None = None) -> int:
    """The most memory that a process, by default this one, has held so far (VmHWM), in bytes; 0 where there is no such process."""
    return _status("VmHWM:", process)


def rss_bytes() -> int:
    """The memory that this process holds (VmRSS), in bytes."""
    return _status("VmRSS:", None)


def give_back_memory() -> None:
    """Let the system have what native libraries have freed, which the C library would keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def give_back_libraries() -> None:
    """Let go of the pages of shared libraries, as after a start that needed much of them: what is needed again is read again.

    Pages that other processes use as well stay.
    """
    advise = ctypes.CDLL(None).madvise
    for line in (_read(Path("/proc/self/maps")) or "").splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if rights in ("r--p", "r-xp") and path and ".so" in path[0]:
            first, end = (int(address, 16) for address in span.split("-"))
            advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _PAGE_OUT)  # refused by kernels before 5.4: then they stay


def _status(field: str, process: int | None) -> int:
    text = _read(Path("/proc", "self" if process is None else str(process), "status")) or ""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field)), 0)


def _meminfo(root: Path) -> int | None:
    text = _read(root / "proc/meminfo") or ""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("MemTotal:")), None)


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_files(root: Path, unified: str | None, legacy: str | None) -> Iterator[str]:
    """Texts of a file in our control group and in each above it. `legacy` is "controller/file" for version 1."""
    base = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers and unified is not None:
            folder, name = base, unified
        elif legacy is not None and legacy.partition("/")[0] in controllers.split(","):
            controller, _, name = legacy.partition("/")
            folder = base / controller
        else:
            continue
        # Inside a container the path may be the host's and not exist here: then only the top, which is our own group, is found.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            text = _read(folder.joinpath(*parts[:depth]) / name)
            if text is not None:
                yield text


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
