"""One arithmetic: the same bits from every form of the kernels, any number of threads, any batch, and on every machine.

Forms that this processor cannot run are compared op by op: tests/kernels/test_forms.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType
from dairllm.kernels import forms

ROOT = Path(__file__).parent.parent.parent

FIXTURES = {
    "llama_q40": "1d408c66f2fe17d8",
    "llama_f32": "3a85365c726facfb",
    "llama31_q40": "dc3696993751561b",
    "qwen3_q40": "b6e26280006cc9cf",
    "qwen3_moe_q40": "26a055b6d71b597b",
}
"""Digests of the logits after the first 40 golden ids. A machine of any kind must find these."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random models whose sizes leave remainders everywhere: in blocks, tiles, columns, heads a KV head."""
    folder = tmp_path_factory.mktemp("models")
    odd = {"dim": 96, "hidden_dim": 352, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "vocab_size": 101, "seq_len": 96}
    for weight_type in (FloatType.Q40, FloatType.Q80, FloatType.F32):
        write_random_model(folder / f"odd_{weight_type.name}.m", small_spec(Architecture.LLAMA, weight_type, **odd))
    for weight_type in (FloatType.Q80, FloatType.F32):
        write_random_model(folder / f"experts_{weight_type.name}.m", small_spec(Architecture.QWEN3_MOE, weight_type))
    return folder


def find_digests(form: str, models: Path, *how: str, **environment: str) -> dict[str, list[str]]:
    command = [sys.executable, "-m", "tests.engine.forms_digest", form, str(models), *how]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *logged, result = run.stdout.splitlines()
    assert bool(logged) == bool(how)
    assert all("the kernels' compiler stays in this process" in line for line in logged)
    found: dict[str, list[str]] = json.loads(result)
    return found


@pytest.fixture(scope="module")
def best(models: Path) -> dict[str, list[str]]:
    """What the form that this processor runs best finds."""
    return find_digests(forms.available()[0], models)


def test_threads_and_batches_change_no_bit(best: dict[str, list[str]]) -> None:
    """One, two and three threads; all at once, 7 + 33, 38 + 2 and one by one."""
    assert {name: len(found) for name, found in best.items()} == dict.fromkeys(best, 1)
    assert len(best) == len(FIXTURES) + 5


def test_the_bits_are_those_of_every_other_machine(best: dict[str, list[str]]) -> None:
    assert {name: best[name] for name in FIXTURES} == {name: [digest] for name, digest in FIXTURES.items()}


@pytest.mark.parametrize("form", forms.available()[1:])
def test_each_form_of_this_processor_gives_the_same_bits(form: str, best: dict[str, list[str]], models: Path) -> None:
    assert find_digests(form, models) == best


def test_loaded_object_code_gives_the_bits_that_numba_gives(best: dict[str, list[str]], models: Path) -> None:
    assert find_digests(forms.available()[0], models, "--numba") == best


def test_a_processor_without_vectors_of_its_own_gives_the_same_bits(best: dict[str, list[str]], models: Path) -> None:
    """The portable form as compiled for the least processor of this architecture: without fused multiply-add, F16C, AVX."""
    assert find_digests("portable", models, NUMBA_CPU_NAME="generic") == best
