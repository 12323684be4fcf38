"""Unequal shares, parts of KV groups, more nodes than KV heads: all nodes of a network compute what one node computes."""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.program import compile_program
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import outgoing_weights
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import LOGITS_PIPE, build_network, build_node
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig, Op, OpCode, RopeType
from tests.engine.engine_cluster import EngineCluster
from tests.engine.oracle import OracleCluster, Weights
from tests.kernels import exact

DATA = Path(__file__).parents[1] / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())
F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2) as running:
        yield running


def shared(model: ModelFile, shares: str | int, sync: FloatType) -> tuple[NetworkConfig, list[NodeConfig], Weights]:
    """A network for shares as a user writes them, or for so many nodes; the weights as bytes, as the root would send them."""
    spec = model.spec
    dealt = deal_shares(spec, nearly_equal_sizes(spec, shares) if isinstance(shares, int) else parse_shares(shares))
    network = build_network(spec, dealt, sync)
    nodes = [build_node(spec, network, node, share) for node, share in enumerate(dealt)]
    logits_rows = network.pipes[LOGITS_PIPE].size.x // len(dealt)
    sent: dict[tuple[int, str, int], bytes] = {}
    for node, share in enumerate(dealt):
        sent[node, "embedding", 0] = model.array(model.tensor("embedding")).tobytes()
        for weight in outgoing_weights(model, share, logits_rows):
            piece = memoryview(bytearray(weight.nbytes))
            weight.read(0, weight.n_rows, piece)
            before = sent.get((node, weight.name, weight.layer), b"")
            assert weight.offset == len(before)
            sent[node, weight.name, weight.layer] = before + piece

    def weights(node: int, op: Op) -> np.ndarray:
        size, raw = op.weight_size, np.frombuffer(sent[node, op.name, op.index], np.uint8)
        values = raw.view("<f4") if size.float_type == F32 else raw
        if op.code != OpCode.MATMUL:
            return values if size.y == 1 else values.reshape(size.y, -1)
        return values.reshape((size.z, size.x, -1) if size.z > 1 else (size.x, -1))

    return network, nodes, weights


def feed(model: ModelFile, shares: str | int, tokens: list[int], executor: Executor, sync: FloatType = F32, batch: int = 32) -> np.ndarray:
    """Logits [tokens, vocab], without those of padding, which must be zeros."""
    network, nodes, weights = shared(model, shares, sync)
    logits = EngineCluster(network, nodes, weights, executor).feed(tokens, batch)
    assert not logits[:, model.spec.vocab_size :].any()
    return logits[:, : model.spec.vocab_size]


def generate(model: ModelFile, shares: str | int, prompt: list[int], steps: int, executor: Executor, sync: FloatType = F32) -> list[int]:
    """Greedy ids; the prompt in two batches."""
    network, nodes, weights = shared(model, shares, sync)
    cluster = EngineCluster(network, nodes, weights, executor)
    half, tokens = len(prompt) // 2, list(prompt)
    cluster.run(prompt[:half], 0)
    logits = cluster.run(prompt[half:], half)
    while True:
        tokens.append(int(logits[-1, : model.spec.vocab_size].argmax()))
        if len(tokens) == len(prompt) + steps:
            return tokens[len(prompt) :]
        logits = cluster.run(tokens[-1:], len(tokens) - 1)


def text(n: int, vocab: int) -> list[int]:
    found: list[int] = np.random.default_rng(n).integers(0, vocab, n).tolist()
    return found


TWO_KV = {"dim": 96, "n_heads": 8, "n_kv_heads": 2, "head_dim": 16, "hidden_dim": 192}
THREE_KV = {"dim": 144, "n_heads": 9, "n_kv_heads": 3, "head_dim": 16, "hidden_dim": 224}
MODELS: dict[str, ModelSpec] = {
    "two KV heads": small_spec(weight_type=F32, vocab_size=321, **TWO_KV),
    "three KV heads": small_spec(weight_type=F32, vocab_size=322, **THREE_KV),
    "scaled frequencies": small_spec(
        weight_type=F32,
        vocab_size=321,
        rope_type=RopeType.LLAMA3_1,
        rope_theta=500000.0,
        rope_scaling_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_orig_max_seq_len=64,
        **THREE_KV,
    ),
    "head norms": small_spec(Architecture.QWEN3, F32, vocab_size=323, **THREE_KV),
    "experts": small_spec(Architecture.QWEN3_MOE, F32, vocab_size=321, **(TWO_KV | {"moe_hidden_dim": 192})),
}
SHARES: dict[int, list[str | int]] = {  # of models with so many heads
    8: [
        *(2, 3, 4, 5, 6),
        *("6/64,2/128", "2/160,6/32", "5/96,3/96", "3/32,5/160"),
        *("1/32,4/64,3/96", "6/64,1/96,1/32", "2/64,4/64,2/64", "1/32,2/32,5/128"),
        *("1/32,1/32,1/32,5/96", "3/32,2/32,1/32,1/32,1/64"),
    ],
    9: [
        *(2, 3, 4, 5, 6, 7),
        *("6/32,3/192", "5/128,4/96", "4/96,5/128", "2/32,7/192"),
        *("1/64,4/64,4/96", "7/32,1/96,1/96", "3/96,4/32,2/96"),
        *("2/64,2/64,4/64,1/32", "5/32,1/32,1/96,2/64"),
        *("2/32,1/32,2/32,1/32,3/96", "1/32,1/32,1/32,5/32,1/96"),
    ],
}
CASES = [(name, shares) for name, spec in MODELS.items() for shares in SHARES[spec.n_heads][:: 1 if "KV" in name else 2]]
TOKENS = text(40, 200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def random_model(folder: Path, spec: ModelSpec) -> ModelFile:
    path = folder / f"{abs(hash(spec))}.m"
    if not path.exists():
        write_random_model(path, spec, seed=3)
    return ModelFile.open(path)


@pytest.fixture(scope="module")
def alone(folder: Path, executor: Executor) -> Callable[[str], tuple[np.ndarray, list[int]]]:
    """(logits, ids) of one node with a model of MODELS."""

    @cache
    def compute(name: str) -> tuple[np.ndarray, list[int]]:
        with random_model(folder, MODELS[name]) as model:
            return feed(model, 1, TOKENS, executor), generate(model, 1, TOKENS, 24, executor)

    return compute


@pytest.mark.parametrize(("name", "shares"), CASES)
def test_all_nodes_compute_what_one_computes(name: str, shares: str | int, folder: Path, executor: Executor, alone: Any) -> None:
    """Sums of other parts, so not the same bits; the same ids."""
    logits, ids = alone(name)
    with random_model(folder, MODELS[name]) as model:
        np.testing.assert_allclose(feed(model, shares, TOKENS, executor), logits, atol=2e-4)
        assert generate(model, shares, TOKENS, 24, executor) == ids


QUANTIZED = TWO_KV | {"dim": 128, "n_heads": 12, "n_kv_heads": 2, "hidden_dim": 224, "vocab_size": 203}  # heads two at a time


@pytest.mark.parametrize(
    ("spec", "shares"),
    [
        *((small_spec(weight_type=F32, **THREE_KV), shares) for shares in ("4/96,5/128", "2/32,1/32,2/32,1/32,3/96")),
        *((small_spec(weight_type=kind, **QUANTIZED), shares) for kind in (Q40, Q80) for shares in ("8/96,4/128", "2/32,4/96,2/32,4/64")),
        *((small_spec(Architecture.QWEN3, Q40, n_heads=9, n_kv_heads=3, vocab_size=203), shares) for shares in (2, 3, 4)),
        *((small_spec(Architecture.QWEN3_MOE, Q40, n_heads=6, moe_hidden_dim=96, vocab_size=203), shares) for shares in (2, 3)),
    ],
)
def test_the_bits_are_the_defined_ones(spec: ModelSpec, shares: str | int, folder: Path, executor: Executor) -> None:
    """To the bit what the numpy oracle makes of the same graphs in the defined order."""
    sync = F32 if spec.weight_type == F32 else Q80
    with random_model(folder, spec) as model:
        network, nodes, weights = shared(model, shares, sync)
        want = OracleCluster(network, nodes, weights, exact).feed(TOKENS[:24], batch=12)
        assert np.isfinite(want).all()
        found = EngineCluster(network, nodes, weights, executor).feed(TOKENS[:24], batch=12)
    assert found.tobytes() == want.tobytes()


@pytest.mark.parametrize("shares", [3, 4, "1/32,3/96", "3/32,1/96", "1/64,2/32,1/32"])
def test_the_golden_ids_of_f32(shares: str | int, executor: Executor) -> None:
    golden = GOLDEN["models"]["llama_f32"]
    with ModelFile.open(DATA / "llama_f32.m") as model:
        found = generate(model, shares, golden["prompt_ids"], len(golden["generated_ids_1_node"]), executor)
    assert found == golden["generated_ids_1_node"]


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        *(("llama31_q40", shares) for shares in (3, "6/96,2/160", "2/32,6/224", "2/64,4/64,2/128")),
        *(("qwen3_q40", shares) for shares in (3, 4, "3/32,1/96", "1/64,3/64")),
        *(("llama_q40", shares) for shares in ("2/32,2/96", "2/96,2/32")),
        *(("qwen3_moe_q40", shares) for shares in ("1/32,3/32", "3/32,1/32")),
    ],
)
def test_quantized_models_come_near_one_node(name: str, shares: str | int, executor: Executor) -> None:
    """Activations are rounded in the same blocks whoever has them; what crosses the wire in Q80 is rounded once more, node by node."""
    prompt = GOLDEN["models"][name]["prompt_ids"]
    with ModelFile.open(DATA / f"{name}.m") as model:
        one = feed(model, 1, prompt, executor)
        exactly, rounded = (feed(model, shares, prompt, executor, sync) for sync in (F32, Q80))
        assert generate(model, shares, prompt, 24, executor) == generate(model, 1, prompt, 24, executor)
    spread = one.std()
    assert abs(exactly - one).max() < 0.02 * spread
    assert abs(rounded - one).max() < 0.3 * spread
    assert abs(rounded - one).mean() < 0.03 * spread


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("arch", list(Architecture))
@pytest.mark.parametrize("shares", [1, 2, 3, 4, "4/64,8/128", "8/128,4/64"])
def test_weights_in_place_give_the_same_bits(
    arch: Architecture, weight_type: FloatType, shares: str | int, folder: Path, executor: Executor
) -> None:
    """Node 0 with the slices of the mapped file in place of copies."""
    spec = small_spec(
        arch, weight_type, **(QUANTIZED | {"hidden_dim": 192, "moe_hidden_dim": 192 if arch == Architecture.QWEN3_MOE else 0})
    )
    with random_model(folder, spec) as model:
        network, nodes, weights = shared(model, shares, F32)
        dealt = deal_shares(spec, nearly_equal_sizes(spec, shares) if isinstance(shares, int) else parse_shares(shares))
        copied, in_place = (EngineCluster(network, nodes, weights, executor) for _ in range(2))
        mapped = LocatedWeights(model, nodes[0], weight_references(spec, dealt[0], nodes[0]))
        assert mapped.nbytes == 0
        in_place.programs[0] = compile_program(network, nodes[0], mapped, n_threads=executor.n_threads)
        for batch in (1, 7, 16):
            found, want = (cluster.feed(TOKENS[:24], batch) for cluster in (in_place, copied))
            assert found.tobytes() == want.tobytes()
