"""Object code between two starts: found again, never run when it is damaged or not ours, compiled by one process at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dairllm import machine
from dairllm.errors import EngineError
from dairllm.kernels.objects.cache import ObjectCodeCache, Objects, decode, encode, numba_folder, shipped_folder
from dairllm.kernels.objects.compiler import compile_objects
from dairllm.kernels.objects.loader import ObjectCodeError
from dairllm.kernels.objects.targets import TARGETS
from tests.kernels.start_kernels import own_objects
from tests.patience import PATIENCE

ROOT = Path(__file__).parents[3]
OBJECTS: Objects = {"run_threads": ("symbol of one", bytes(range(256))), "ring": ("symbol of the other", b"\n\n\0")}

TARGET = TARGETS[0]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ObjectCodeCache:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "installed"))
    return ObjectCodeCache(TARGET)


def kept_file(cache: ObjectCodeCache) -> Path:
    folder = cache.folder()
    assert folder is not None
    return folder / "kernels.o"


def test_what_was_written_is_read(cache: ObjectCodeCache) -> None:
    assert cache.read() is None
    cache.write(OBJECTS)
    assert cache.read() == ObjectCodeCache(TARGET).read() == OBJECTS
    assert cache.find() == (kept_file(cache), OBJECTS)
    assert [path.name for path in kept_file(cache).parent.iterdir()] == ["kernels.o"]
    assert kept_file(cache).stat().st_mode & 0o777 == 0o600


def test_damage_is_noticed_wherever_it_is(cache: ObjectCodeCache) -> None:
    cache.write(OBJECTS)
    file = kept_file(cache)
    whole = file.read_bytes()
    for at in range(len(whole)):
        for torn in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            file.write_bytes(torn)
            assert cache.read() is None
            with pytest.raises(ObjectCodeError, match=r"^a file: (expected b?'dairllm kernels 1 ', found|its digest is not that of)"):
                decode(torn, "a file")
    file.write_bytes(whole + b"\0")
    assert cache.read() is None
    file.write_bytes(whole)
    assert cache.read() == OBJECTS


def test_what_others_could_have_written_is_not_run(cache: ObjectCodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(OBJECTS)
    file = kept_file(cache)
    for path in (file, file.parent):
        before = path.stat().st_mode
        for mode in (0o022, 0o002, 0o020):
            path.chmod(before | mode)
            assert cache.read() is None
        path.chmod(before)
    assert cache.read() == OBJECTS
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert (cache.read() is not None) == (file.stat().st_uid == 0), "the administrator's may be read by all"


def test_a_folder_that_can_only_be_read_is_read(cache: ObjectCodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(OBJECTS)
    first = cache.folder()
    monkeypatch.setattr("os.access", lambda path, _: path != first)
    assert cache.read() == OBJECTS
    assert cache.folder() != first, "what is new goes to the folder for temporary files"


def test_what_was_shipped_comes_first_and_is_for_all_to_read(cache: ObjectCodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write({**OBJECTS, "ring": ("an older one", b"")})
    shipped = ObjectCodeCache(TARGET, shipped_folder())
    assert shipped.read() is None, "it looks nowhere else"
    shipped.write(OBJECTS)
    file = kept_file(shipped)
    assert file.is_relative_to(sys.prefix)
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o644, 0o755)
    assert cache.find() == (file, OBJECTS)
    file.chmod(0o664)
    assert cache.find() != (file, OBJECTS), "others could have written it"
    file.chmod(0o644)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    assert (cache.read() is not None) == (file.stat().st_uid == 0)


def test_a_start_writes_nothing_to_what_was_shipped(cache: ObjectCodeCache) -> None:
    ObjectCodeCache(TARGET, shipped_folder()).write(OBJECTS)
    cache.write(OBJECTS)
    assert not kept_file(cache).is_relative_to(sys.prefix)


def test_where_nothing_can_be_written_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container whose file systems are all read-only: kernels that were not shipped are compiled at each start."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert ObjectCodeCache(TARGET).folder() == next((tmp_path / f"dairllm-{os.getuid()}" / "kernels").iterdir())

    def none_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none_usable)
    nowhere = ObjectCodeCache(TARGET)
    assert nowhere.folder() is None
    assert numba_folder() is None
    nowhere.write(OBJECTS)
    with nowhere.alone():
        assert nowhere.read() is None


def test_the_folder_is_named_by_what_makes_the_code(cache: ObjectCodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({ObjectCodeCache(target).folder() for target in TARGETS}) == len(TARGETS)
    monkeypatch.setattr("dairllm.kernels.processor.identity", lambda: "another")
    assert ObjectCodeCache(TARGET).folder() == cache.folder(), "it runs on every processor that has what the target needs"
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    assert ObjectCodeCache(TARGET).folder() != cache.folder()


def test_what_numba_compiles_in_the_process_is_for_this_processor(cache: ObjectCodeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [cache.folder(), numba_folder()]
    monkeypatch.setattr("dairllm.kernels.processor.identity", lambda: "another")
    found.append(numba_folder())
    monkeypatch.setattr("dairllm.kernels.forms.current", lambda: "another form")
    found.append(numba_folder())
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    found.append(numba_folder())
    assert len(set(found)) == 5
    monkeypatch.setattr("dairllm.kernels.processor.identity", lambda: None)
    assert numba_folder() is None, "code for a processor that nobody knows must not be found by another"


# ------------------------------------------------------------------------------------------------------------------- processes
def start(folder: Path, *words: object, cache: str = "cache") -> "subprocess.Popen[str]":
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / cache), "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "tests.kernels.start_kernels", str(folder), *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def compiled(tmp_path: Path) -> Path:
    """A folder with real objects, for a compiler that takes no time."""
    (tmp_path / "objects").write_bytes(encode(own_objects()))
    return tmp_path


def test_of_processes_that_start_together_one_compiles(compiled: Path) -> None:
    found = [said(process) for process in [start(compiled, 3) for _ in range(3)]]
    assert sorted(one["compiled"] for one in found) == [0, 0, 1]
    assert (compiled / "log").read_text() == "compiled\n"
    assert {(one["rung"], one["numba"], *one["modules"]) for one in found} == {(7, None)}


def test_who_dies_while_compiling_keeps_nobody_waiting(compiled: Path) -> None:
    first = start(compiled, 1000)
    deadline = time.monotonic() + PATIENCE
    while not (compiled / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = start(compiled, 0)
    first.kill()
    first.communicate()
    assert said(second)["compiled"] == 1
    assert said(start(compiled, 0))["compiled"] == 0


def test_a_damaged_file_is_compiled_anew(compiled: Path) -> None:
    assert said(start(compiled, 0))["compiled"] == 1
    (file,) = compiled.glob("cache/dairllm/kernels/*/kernels.o")
    os.truncate(file, file.stat().st_size - 1)
    assert said(start(compiled, 0)) == {"compiled": 1, "numba": None, "modules": [], "rung": 7}
    assert said(start(compiled, 0))["compiled"] == 0


def test_code_that_cannot_be_loaded_leaves_it_to_numba(compiled: Path) -> None:
    """Whole, but of another kind, as a later numba might make it: said, and no worse for it."""
    objects = {name: (symbol, raw.replace(b"\0syscall\0", b"\0sysca11\0")) for name, (symbol, raw) in own_objects().items()}
    (compiled / "objects").write_bytes(encode(objects))
    shared = numba_folder()  # what numba itself compiles takes a minute
    assert shared is not None
    (compiled / "cache" / "dairllm" / "kernels").mkdir(parents=True)
    (compiled / "cache" / "dairllm" / "kernels" / shared.name).symlink_to(shared)
    found = said(start(compiled, 0))
    assert found == {
        "compiled": 1,
        "numba": "object code of run_threads: it calls 'sysca11', which it should not",
        "modules": ["llvmlite", "numba"],
        "rung": 7,
    }


def test_the_compiler_ends_with_who_started_it(tmp_path: Path) -> None:
    process = start(tmp_path)
    deadline = time.monotonic() + PATIENCE
    children: list[int] = []
    while not children and time.monotonic() < deadline:
        time.sleep(0.02)
        children = [int(pid) for tasks in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in tasks.read_text().split()]
    assert children, "it compiles"
    (child,) = children
    while "objects.compiler" not in Path(f"/proc/{child}/cmdline").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)  # from here on it has said with whom it ends, or sees that it is alone
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("kill -9 $$", EngineError, "was ended by SIGKILL, as where memory is short: it takes 235 MiB"),
        ("kill -11 $$", EngineError, "was ended by SIGSEGV$"),
        ("echo one >&2; echo two >&2; exit 3", ObjectCodeError, "failed: two$"),
        ("exit 3", ObjectCodeError, "failed: exit code 3$"),
        ("echo dairllm kernels 1 x", ObjectCodeError, "what the kernels' compiler made: its digest is not"),
        (None, ObjectCodeError, "cannot be run"),
    ],
)
def test_a_compiler_that_fails_says_why(
    script: str | None, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    if script is not None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(error, match=message):
        compile_objects(TARGET)


def test_a_compiler_that_would_not_end_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "no interpreter"))
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 180 << 20)
    with pytest.raises(EngineError, match=r"^compiling the kernels takes 210MiB of memory, and 180MiB are free here: raise the limit for "):
        compile_objects(TARGET)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 210 << 20)
    with pytest.raises(ObjectCodeError, match="cannot be run"):
        compile_objects(TARGET)
