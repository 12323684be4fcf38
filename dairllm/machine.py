"""What this process may use of its machine: memory and processors, as the hardware and the control group (container) bound them."""

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "ask_for_huge_pages",
    "free_memory_bytes",
    "give_back_libraries",
    "give_back_memory",
    "memory_bytes",
    "peak_rss_bytes",
    "processors",
    "rss_bytes",
]


_PAGE_OUT = 21  # MADV_PAGEOUT
_LIBC = ctypes.CDLL(None)
"""Loaded once: each time makes a class, which only the search for garbage ends."""


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may come to hold: the machine's, or its control group's where that is less.

    Both versions of control groups are read, and every group above ours, since a limit on an ancestor binds as well.

    Args:
        root: the file system to look at.
    """
    amounts = [_meminfo(root).get("MemTotal") or _physical()]
    for text in _cgroup_files(root, "memory.max", "memory/memory.limit_in_bytes"):
        if text.isdigit():  # version 2 writes "max" where there is no limit, version 1 a number larger than any memory
            amounts.append(int(text))
    return min(amounts)


def free_memory_bytes(root: Path = Path("/")) -> int:
    """Bytes that could be taken now without pushing out what programs hold: the machine's, swap included, or the tightest control group's.

    Pages of files count as free, in use or not, so that there is rather less than this says. Memory that a group may swap does not
    count: with a limit that small it is the disk that would be waited for.

    Args:
        root: the file system to look at.
    """
    told = _meminfo(root)
    amounts = [told["MemAvailable"] + told.get("SwapFree", 0) if "MemAvailable" in told else _physical()]
    for folder, is_legacy in _cgroups(root, "memory"):
        names = ("memory.limit_in_bytes",) if is_legacy else ("memory.max", "memory.high")
        limits = [int(text) for text in (_read(folder / name) or "" for name in names) if text.isdigit()]
        used = _read(folder / ("memory.usage_in_bytes" if is_legacy else "memory.current")) or ""
        if limits and used.isdigit():
            fields = [line.split() for line in (_read(folder / "memory.stat") or "").splitlines()]
            of_files = ("total_inactive_file", "total_active_file") if is_legacy else ("inactive_file", "active_file")
            files = sum(int(field[1]) for field in fields if field[0] in of_files)
            amounts.append(max(0, min(limits) - int(used) + files))
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


def rss_bytes(process: int | None = None) -> int:
    """The memory that a process, by default this one, holds (VmRSS), in bytes; 0 where there is no such process."""
    return _status("VmRSS:", process)


def ask_for_huge_pages(mapped: mmap.mmap) -> None:
    """What is read into the map of a file from now on is to lie in pages of 2 MiB; what is in memory already stays as it lies.

    Where the system can (Linux from 6.16 on, on the usual file systems), all of it is then read in a tenth to a fifth less time.
    """
    with contextlib.suppress(OSError):  # a kernel without huge pages
        mapped.madvise(mmap.MADV_HUGEPAGE)


def give_back_memory() -> None:
    """Let the system have what native libraries have freed, which the C library would keep for later."""
    trim = getattr(_LIBC, "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


def give_back_libraries() -> None:
    """Let go of the pages of shared libraries, as after a start that needed much of them: what is needed again is read again.

    Pages that other processes use as well stay.
    """
    advise = _LIBC.madvise
    for line in (_read(Path("/proc/self/maps")) or "").splitlines():
        span, rights, _, _, _, *path = line.split(maxsplit=5)
        if rights in ("r--p", "r-xp") and path and ".so" in path[0]:
            first, end = (int(address, 16) for address in span.split("-"))
            advise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _PAGE_OUT)  # refused by kernels before 5.4: then they stay


def _status(field: str, process: int | None) -> int:
    text = _read(Path("/proc", "self" if process is None else str(process), "status")) or ""
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field)), 0)


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes, by the system's names."""
    fields = [line.split() for line in (_read(root / "proc/meminfo") or "").splitlines()]
    return {field[0].rstrip(":"): int(field[1]) * 1024 for field in fields if len(field) == 3}


def _physical() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cgroup_files(root: Path, unified: str | None, legacy: str | None) -> Iterator[str]:
    """Texts of a file in our control group and in each above it. `legacy` is "controller/file" for version 1."""
    controller, _, legacy_name = (legacy or "").partition("/")
    for folder, is_legacy in _cgroups(root, controller):
        name = legacy_name if is_legacy else unified
        text = _read(folder / name) if name else None
        if text is not None:
            yield text


def _cgroups(root: Path, legacy_controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of our control group and of each above it, and whether they are of version 1, where each controller has a tree."""
    base = root / "sys/fs/cgroup"
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and legacy_controller not in controllers.split(","):
            continue
        top = base / legacy_controller if controllers else base
        # Inside a container the path may be the host's and not exist here: then only the top, which is our own group, is found.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), bool(controllers)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
