"""One arithmetic: the same bits from every form of the kernels, any number of threads, any batch, in any room, and
on every machine.

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
DATA = ROOT / "tests" / "data" / "dllama"

FIXTURES = {
    "llama_q40": {"F32": "1d408c66f2fe17d8", "F16": "538b75c74b2485cd"},
    "llama_f32": {"F32": "3a85365c726facfb", "F16": "94a85fc7228a915c"},
    "llama31_q40": {"F32": "dc3696993751561b", "F16": "9903578bde5d5166"},
    "qwen3_q40": {"F32": "b6e26280006cc9cf", "F16": "cd2e86411aa1ce64", "Q80": "572b9a8a66fce204"},
    "qwen3_moe_q40": {"F32": "26a055b6d71b597b", "F16": "09dafebe006cfcd0", "Q80": "b65c72bc7b8c561c"},
}
"""Digests of the logits after the first 40 golden ids, by the type of the KV cache. A machine of any kind must find these."""
PATHS = [DATA / f"{name}.m" for name in FIXTURES]

SMOLLM2 = {"F32": "e9f14177f1224983", "F16": "873bf1f0096338f9", "Q80": "91c4270414d303d7"}
"""Likewise of SmolLM2-135M-Instruct, converted from its Q4_1 as tests/text/test_smollm2.py says, after 40 ids of forms_digest.py."""
SMOLLM2_FOLDER = os.environ.get("DAIRLLM_TEST_SMOLLM2")


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Random models whose sizes leave remainders everywhere: in blocks, tiles, columns, heads a KV head."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"dim": 96, "hidden_dim": 352, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "vocab_size": 101, "seq_len": 96}
    for weight_type in (FloatType.Q40, FloatType.Q80, FloatType.F32):
        write_random_model(folder / f"odd_{weight_type.name}.m", small_spec(Architecture.LLAMA, weight_type, **sizes))
    for weight_type in (FloatType.Q80, FloatType.F32):
        write_random_model(folder / f"experts_{weight_type.name}.m", small_spec(Architecture.QWEN3_MOE, weight_type))
    return sorted(folder.glob("*.m"))


Found = dict[str, dict[str, list[str]]]
"""By model and type of the KV cache."""


def find_digests(form: str, *words: str | Path, **environment: str) -> Found:
    """What tests/engine/forms_digest.py finds."""
    command = [sys.executable, "-m", "tests.engine.forms_digest", form, *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *logged, result = run.stdout.splitlines()
    assert bool(logged) == ("--numba" in words)
    assert all("the kernels' compiler stays in this process" in line for line in logged)
    found: Found = json.loads(result)
    return found


@pytest.fixture(scope="module")
def best(odd: list[Path]) -> Found:
    """What the form that this processor runs best finds."""
    return find_digests(forms.available()[0], *PATHS, "--in-place", *odd)


def test_threads_and_batches_and_paging_change_no_bit(best: Found) -> None:
    """One, two and three threads; all at once, 7 + 33, 38 + 2 and one by one; weights in place, and in little room."""
    assert {name: {kind: len(values) for kind, values in kinds.items()} for name, kinds in best.items()} == {
        name: dict.fromkeys(kinds, 1) for name, kinds in best.items()
    }
    assert len(best) == len(FIXTURES) + 5
    assert sum(map(len, best.values())) == 27, "with each type that a KV cache can have"


def test_the_bits_are_those_of_every_other_machine(best: Found) -> None:
    assert {name: best[name] for name in FIXTURES} == {name: listed(digests) for name, digests in FIXTURES.items()}


def listed(digests: dict[str, str]) -> dict[str, list[str]]:
    return {kind: [digest] for kind, digest in digests.items()}


@pytest.mark.parametrize("form", forms.available()[1:])
def test_each_form_of_this_processor_gives_the_same_bits(form: str, best: Found, odd: list[Path]) -> None:
    assert find_digests(form, *PATHS, "--in-place", *odd) == best


def test_loaded_object_code_gives_the_bits_that_numba_gives(best: Found, odd: list[Path]) -> None:
    assert find_digests(forms.available()[0], "--numba", "--in-place", *PATHS, *odd) == best


def test_a_processor_without_vectors_of_its_own_gives_the_same_bits(best: Found, odd: list[Path]) -> None:
    """The portable form as compiled for the least processor of this architecture: without fused multiply-add, F16C, AVX."""
    assert find_digests("portable", "--in-place", *PATHS, *odd, NUMBA_CPU_NAME="generic") == best


@pytest.mark.skipif(SMOLLM2_FOLDER is None, reason="DAIRLLM_TEST_SMOLLM2 names no folder of SmolLM2's converted files")
@pytest.mark.parametrize("form", forms.available())
def test_smollm2_has_the_same_bits_everywhere(form: str) -> None:
    (model,) = Path(str(SMOLLM2_FOLDER)).glob("*.m")
    assert find_digests(form, model) == {model.stem: listed(SMOLLM2)}
