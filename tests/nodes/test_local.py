"""One node against the C++ program's recorded ids and logits."""

import json
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.sampler import Sampler
from dairllm.errors import ConfigError, EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture, HiddenAct
from dairllm.graph.types import FloatType
from dairllm.nodes.generation import Generation
from dairllm.nodes.local import LocalNode

DATA = Path(__file__).parent.parent / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())["models"]
NEAR_TIE = 0.15


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_and_ids_are_the_cpp_programs(name: str) -> None:
    """Fed the golden ids, logits within 3 % at every position (F32: 0.01 %), and the same greedy id up to a near tie."""
    prompt, ids = GOLDEN[name]["prompt_ids"], GOLDEN[name]["generated_ids_1_node"]
    expected = np.load(DATA / f"{name}.logits-1-node.npy")
    with ModelFile.open(DATA / f"{name}.m") as model, LocalNode(model, n_threads=2) as node:
        found = [node.feed(prompt, 0).copy()]
        for place, token in enumerate(ids[:-1]):
            found.append(node.feed([token], len(prompt) + place).copy())
    error = np.linalg.norm(np.array(found) - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < (0.0001 if name == "llama_f32" else 0.03)
    for logits, token in zip(found, ids, strict=True):
        assert int(logits.argmax()) == token or logits.max() - logits[token] < NEAR_TIE


def test_generation_gives_the_golden_ids() -> None:
    golden = GOLDEN["llama_f32"]
    with ModelFile.open(DATA / "llama_f32.m") as model, LocalNode(model, n_threads=2) as node:
        generation = Generation(node, Sampler(0.0, 1.0, 0), golden["prompt_ids"], 26)
        assert list(generation.run()) == golden["generated_ids_1_node"]
    assert generation.finish_reason == "length"
    assert generation.prefill_tokens_per_second > 0
    assert generation.decode_tokens_per_second > 0


def test_a_prompt_longer_than_a_batch_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=512))
    tokens = [(5 * i) % 320 for i in range(300)]
    results = []
    for rows in (256, 40):
        monkeypatch.setattr("dairllm.nodes.local.PROMPT_ROWS", rows)
        with ModelFile.open(tmp_path / "m.m") as model, LocalNode(model, n_threads=2) as node:
            results.append(node.feed(tokens, 0).copy())
    assert results[0].tobytes() == results[1].tobytes()


def test_an_answer_ends_at_an_eos_id_at_the_last_step_or_where_the_context_ends(tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=16))
    with ModelFile.open(tmp_path / "m.m") as model, LocalNode(model, n_threads=1) as node:

        def generate(steps: int, eos: tuple[int, ...] = ()) -> Generation:
            generation = Generation(node, Sampler(0.0, 1.0, 0), [1, 2, 3], steps, eos)
            list(generation.run())
            return generation

        free = generate(100)
        assert len(free.ids) == 14  # the last of them is predicted from position 15 and needs no room
        assert len(generate(5).ids) == 5
        eos = free.ids[4]
        stopped = generate(100, (eos,))
        assert stopped.ids == free.ids[: free.ids.index(eos) + 1]
        assert stopped.finish_reason == "stop"


@pytest.mark.parametrize("prompt", [[], [320], [-1], [0] * 17])
def test_a_prompt_that_cannot_be_is_refused(prompt: list[int], tmp_path: Path) -> None:
    write_random_model(tmp_path / "m.m", small_spec(seq_len=16))
    with ModelFile.open(tmp_path / "m.m") as model, LocalNode(model, n_threads=1) as node:
        with pytest.raises(ConfigError):
            list(Generation(node, Sampler(0.0, 1.0, 0), prompt, 4).run())
        with pytest.raises(EngineError):
            node.feed(prompt, 0)
        assert node.feed([1], 0).shape == (320,)


@pytest.mark.parametrize("sync", [FloatType.F32, FloatType.Q80])
@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
def test_every_architecture_runs_with_every_type(arch: Architecture, weights: FloatType, sync: FloatType, tmp_path: Path) -> None:
    """Combinations that the C++ program refuses as well; what the sync rounds away changes the logits by a little."""
    write_random_model(tmp_path / "m.m", small_spec(arch, weights))
    tokens = list(range(40, 60))
    with ModelFile.open(tmp_path / "m.m") as model:
        with LocalNode(model, n_threads=2, sync=sync) as node:
            batch = node.feed(tokens, 0).copy()
            for position, token in enumerate(tokens):
                single = node.feed([token], position)
            assert single.tobytes() == batch.tobytes()
        with LocalNode(model, n_threads=2, sync=FloatType.F32) as node:
            exact = node.feed(tokens, 0)
            assert np.linalg.norm(batch - exact) < 0.1 * np.linalg.norm(exact)


def test_gelu_is_used_where_the_model_says_so(tmp_path: Path) -> None:
    results = []
    for act in HiddenAct:
        write_random_model(tmp_path / f"{act.name}.m", small_spec(hidden_act=act))
        with ModelFile.open(tmp_path / f"{act.name}.m") as model, LocalNode(model, n_threads=1) as node:
            results.append(node.feed([1, 2, 3], 0).copy())
    assert not np.allclose(results[0], results[1])
