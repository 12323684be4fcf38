"""Kernels made ahead: shown, compiled for this processor and others, found by whoever starts."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dairllm.commands import kernels
from dairllm.errors import ConfigError, EngineError
from dairllm.kernels import forms
from dairllm.kernels.objects import targets
from dairllm.kernels.objects.cache import ObjectCodeCache, Objects, decode
from dairllm.kernels.objects.loader import MACHINES
from dairllm.kernels.objects.targets import TARGETS
from tests.kernels.start_kernels import own_objects

ROOT = Path(__file__).parents[2]

of_x86 = pytest.mark.skipif(platform.machine() not in MACHINES, reason="objects of x86-64")


@pytest.fixture(scope="module")
def objects() -> Objects:
    """Of the real cache."""
    return own_objects()


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.prefix", str(tmp_path / "installed"))


def told(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    kernels.run(json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@of_x86
def test_one_target_is_taken_and_it_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys)
    assert (found["machine"], found["form"]) == (platform.machine(), forms.current())
    assert [(row["form"], row["level"]) for row in found["kernels"]] == [(target.form, target.level) for target in TARGETS]
    (taken,) = [row for row in found["kernels"] if row["taken"]]
    assert (taken["form"], taken["runs_here"], taken["file"]) == (forms.current(), True, None)
    assert {row["form"] for row in found["kernels"] if row["runs_here"]} == set(forms.available())


@of_x86
def test_what_was_compiled_is_found_and_not_compiled_again(
    objects: Objects, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, and where the environment would have numba do it otherwise: the same bytes. Nor does this processor matter, as far as it
    can be shown on one: it is hidden."""
    form = forms.current()
    to = tmp_path / "share"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with monkeypatch.context() as otherwise:
        otherwise.setenv("NUMBA_OPT", "0")
        otherwise.setenv("NUMBA_CPU_NAME", "generic")
        found = told(capsys, compile_=True, form=form, to=to)
    (row,) = [row for row in found["kernels"] if row["form"] == form]
    file = Path(row["file"])
    assert file.is_relative_to(to)
    assert file.stat().st_size == row["bytes"] > 50_000
    assert file.stat().st_mode & 0o777 == 0o644
    assert decode(file.read_bytes(), str(file)) == objects
    assert [path for path in to.rglob("*") if path.is_file()] == [file]
    monkeypatch.setattr("sys.executable", "/nowhere/python")  # nothing can be compiled
    assert told(capsys, compile_=True, form=form, to=to) == found
    kernels.run(compile_=True, form=form, to=to)
    out, err = capsys.readouterr()
    assert err == ""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{form} ")]
    assert line.endswith("KiB)")
    assert f"{file} (" in line


@of_x86
def test_what_cannot_be_written_is_said_before_it_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^/proc/nowhere: expected a folder that this user can write to and no other, found none$"):
        kernels.run(compile_=True, to=Path("/proc/nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "all"}, "--form and --to say what --compile is to do: it is missing"),
        ({"to": Path("/tmp/here")}, "--form and --to say what --compile is to do: it is missing"),  # noqa: S108 - nothing is written
        ({"compile_": True, "form": "sse"}, "--form sse: expected auto, all or one of avx512vnni, avxvnni, avx2, portable"),
    ],
)
def test_what_was_meant_is_asked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kernels.run(**options)


def test_where_numba_compiles_in_the_process_there_is_nothing_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The image is built the same way on ARM."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    kernels.run(compile_=True, form="all", to=tmp_path / "share")
    assert capsys.readouterr() == ("numba compiles the kernels in each process on aarch64: there is nothing to make ahead\n", "")
    assert told(capsys)["kernels"] == []


@of_x86
def test_an_installation_that_has_them_starts_without_compiling(objects: Objects, tmp_path: Path) -> None:
    """An environment of its own, and nothing that could be written to."""
    target = targets.current()
    assert target is not None
    installed = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", installed], check=True)
    ObjectCodeCache(target, installed / "share" / "dairllm" / "kernels").write(objects)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "/proc"}
    command = [installed / "bin" / "python", "-m", "tests.kernels.start_kernels", tmp_path]
    started = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    assert json.loads(started.stdout) == {"compiled": 0, "numba": None, "modules": [], "rung": 7}
