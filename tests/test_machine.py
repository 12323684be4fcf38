"""The memory and processors of a container are its limits, wherever in the tree of control groups they stand."""

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dairllm import machine

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path, "proc/meminfo", "MemTotal:       8388608 kB\nMemFree: 1 kB\n")
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_machine_alone(root: Path) -> None:
    assert machine.memory_bytes(root) == 8 * GIB


def test_an_empty_tree_falls_back_to_the_system(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) > 0
    assert machine.processors(tmp_path) == len(os.sched_getaffinity(0))


def test_version_2_takes_the_tightest_group_on_the_way_up(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/system.slice/dairllm.service\n")
    write(root, "sys/fs/cgroup/system.slice/dairllm.service/memory.max", "max\n")
    write(root, "sys/fs/cgroup/system.slice/memory.max", f"{2 * GIB}\n")
    assert machine.memory_bytes(root) == 2 * GIB


def test_version_2_inside_a_container_has_its_limit_at_the_top(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", f"{GIB}\n")
    assert machine.memory_bytes(root) == GIB


def test_version_1_and_a_path_that_only_the_host_has(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:cpu,cpuacct:/docker/abc\n3:memory:/docker/abc\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{3 * GIB}\n")
    assert machine.memory_bytes(root) == 3 * GIB


def test_version_1_without_a_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "3:memory:/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert machine.memory_bytes(root) == 8 * GIB


@pytest.mark.parametrize(("quota", "expected"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", None), ("junk", None)])
def test_a_quota_of_version_2_bounds_the_processors(root: Path, quota: str, expected: int | None) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/cpu.max", quota)
    assert machine.processors(root) == (expected or len(os.sched_getaffinity(0)))


def test_a_quota_of_version_1_bounds_the_processors(root: Path) -> None:
    write(root, "proc/self/cgroup", "2:cpu,cpuacct:/\n")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    assert machine.processors(root) == 1


def test_free_is_what_the_machine_has_with_its_swap(root: Path) -> None:
    write(root, "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 1048576 kB\nSwapFree: 2097152 kB\nHugePages_Total: 0\n")
    assert machine.free_memory_bytes(root) == 3 * GIB
    write(root, "proc/meminfo", "MemTotal: 8388608 kB\n")
    assert machine.free_memory_bytes(root) > 0, "a system that does not tell has what there is"


def test_free_in_a_group_is_what_it_holds_less_than_its_limit_files_apart(root: Path) -> None:
    write(root, "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 8388608 kB\n")
    write(root, "proc/self/cgroup", "0::/a/b\n")
    write(root, "sys/fs/cgroup/memory.stat", "anon 1\n")  # the top has no limit, and does not say what it uses
    for name, text in {"memory.max": 4 * GIB, "memory.high": "max", "memory.current": 3 * GIB, "memory.stat": "anon 0"}.items():
        write(root, f"sys/fs/cgroup/a/{name}", f"{text}\n")
    assert machine.free_memory_bytes(root) == GIB
    stat = f"anon {GIB}\nfile {GIB}\ninactive_file {GIB // 4}\nactive_file {GIB // 4}\nshmem {GIB // 2}\n"
    for name, text in {"memory.max": 2 * GIB, "memory.high": "max", "memory.current": 2 * GIB, "memory.stat": stat}.items():
        write(root, f"sys/fs/cgroup/a/b/{name}", f"{text}\n")
    assert machine.free_memory_bytes(root) == GIB // 2
    write(root, "sys/fs/cgroup/a/b/memory.high", str(GIB))
    assert machine.free_memory_bytes(root) == 0, "from there on it is slowed down"


def test_free_in_a_group_of_version_1(root: Path) -> None:
    write(root, "proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 8388608 kB\n")
    write(root, "proc/self/cgroup", "3:memory:/docker/abc\n")
    of_group = {"limit_in_bytes": 3 * GIB, "usage_in_bytes": 2 * GIB, "stat": f"inactive_file 9\ntotal_active_file {GIB // 2}\n"}
    for name, text in of_group.items():
        write(root, f"sys/fs/cgroup/memory/memory.{name}", str(text))
    assert machine.free_memory_bytes(root) == 3 * GIB // 2


def test_resident_memory_is_at_most_its_peak() -> None:
    assert 0 < machine.rss_bytes() <= machine.peak_rss_bytes()


def test_what_was_freed_is_given_back() -> None:
    """Small blocks, of which the last one is kept: the C library would keep all of it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("not glibc")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    blocks = [libc.malloc(4000) for _ in range(16 << 10)]
    for block in blocks:
        ctypes.memset(block, 1, 4000)
    for block in blocks[:-1]:
        libc.free(block)
    before = machine.rss_bytes()
    machine.give_back_memory()
    assert before - machine.rss_bytes() > 48 << 20
    libc.free(blocks[-1])


def test_libraries_that_nobody_else_uses_are_let_go(tmp_path: Path) -> None:
    """In a process of its own, with a copy of a library of its own: what others have mapped stays."""
    program = """
import ctypes, shutil, sys
from pathlib import Path
from dairllm import machine

def resident(name):
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            inside = name in line and (" r-xp " in line or " r--p " in line)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total

source = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line or "libm.so" in line)
library = shutil.copy(source, Path(sys.argv[1]) / "own.so.6")
opened = open(library, "rb")
import mmap
mapped = mmap.mmap(opened.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
sum(mapped[at] for at in range(0, len(mapped), 4096))
import os
os.fsync(opened.fileno())
before = resident("own.so.6")
machine.give_back_libraries()
print(before, resident("own.so.6"), sum(mapped[at] for at in range(0, len(mapped), 4096)) >= 0)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after, usable = done.stdout.split()
    assert int(before) > 500
    assert int(after) < int(before) // 2
    assert usable == "True"


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_a_file_is_asked_for_in_huge_pages(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * mmap.PAGESIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        machine.ask_for_huge_pages(mapped)
        _, _, ours = Path("/proc/self/smaps").read_text().partition(str(path))
        assert "hg" in ours.partition("VmFlags:")[2].partition("\n")[0].split()
        assert mapped[:] == path.read_bytes()
