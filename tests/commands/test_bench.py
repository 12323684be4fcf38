"""`dairllm bench` on a model that takes no time. What the figures are is not looked at: that they are there is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dairllm.bench.busy import busy_processes
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from tests.patience import PATIENCE


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "a.m"
    write_random_model(path, small_spec(seq_len=512))
    path.with_suffix(".t").write_bytes(byte_vocabulary(320).encode())
    return path


def bench(model: Path, *words: object) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "dairllm", "bench", model, *words, "--threads", "1", "--rounds", "1", "--patience", "0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=PATIENCE)
    return done.returncode, done.stdout, done.stderr


def test_json_says_what_was_measured_and_under_what_conditions(model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.svg"
    code, out, err = bench(model, "tokens", "prompt", "paging", "--at", 16, "--prompt", 32, "--percent", 0, "--svg", picture, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert {"date", "processor", "processors", "forms", "kernels", "threads", "load", "memory_bytes", "versions"} <= set(
        found["conditions"]
    )
    results: dict[str, Any] = {result["what"]: result for result in found["results"]}
    assert [result["bench"] for result in found["results"]] == ["tokens"] * 6 + ["prompt", "paging"]
    generation = results["generation at 16"]
    assert generation["dairllm"]["median"] > 0
    assert generation["bound"]["tokens/s"] > 0
    assert results["a pass of 16 rows"]["unit"] == "ms"
    assert results["a token, 0 % of the weights in memory"]["limit_bytes"] > 0
    assert picture.read_text().startswith("<svg ")


def test_busy_processes_are_told_of_and_ended(model: Path) -> None:
    code, out, err = bench(model, "prompt", "--prompt", 32, "--busy", 2)
    assert code == 0, err
    assert out.splitlines()[0].endswith("beside 2 busy processes")
    before = children()
    with busy_processes(2):
        assert len(children() - before) == 2
    assert children() == before


def children() -> set[str]:
    """Processes of ours that still run."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_table_of_kernels_and_a_cluster(model: Path) -> None:
    code, out, err = bench(model, "kernels", "cluster", "--prompt", 32)
    assert code == 0, err
    head, _, name, columns, *lines = out.splitlines()
    assert "a.m" in head
    assert name == "kernels"
    assert columns.split("  ")[-1].strip() == "against others"
    assert any(line.startswith("matmul q40, 1 row") for line in lines)
    assert any(line.startswith("generation, 2 nodes of 1 thread") and "x one node" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("speed",), 2, "no bench is called speed; there are kernels, tokens, prompt, cluster, paging"),
        (("prompt", "--dllama", "/nonesuch"), 1, "/nonesuch cannot be started: No such file or directory"),
        (("prompt", "--llamacpp-python", "/nonesuch"), 1, "/nonesuch cannot be started: No such file or directory"),
        (("tokens", "--kernels", "sse9"), 2, "kernels"),
        (("prompt", "--without-flash"), 2, "--llamacpp-python PATH"),
    ],
)
def test_a_mistake_is_one_line(model: Path, words: tuple[str, ...], code: int, message: str) -> None:
    found, _, err = bench(model, *words)
    assert found == code
    assert message in err.splitlines()[-1]
    assert not list(model.parent.glob(".bench-*"))
