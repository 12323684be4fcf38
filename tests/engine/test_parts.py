"""A batch computed in parts, rows before others, gives the bits that one call gives: what lets rows travel while others are computed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import FileWeights, WireWeights
from dairllm.errors import GraphError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import LOGITS_PIPE, TOKEN_PIPE, build_graph
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.types import FloatType
from tests.engine.engine_cluster import EngineCluster
from tests.engine.oracle import file_weights

DATA = Path(__file__).parents[1] / "data" / "dllama"
FIXTURES = ["llama_q40", "llama_f32", "llama31_q40", "qwen3_q40", "qwen3_moe_q40"]
F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80
ODD = {"dim": 96, "hidden_dim": 320, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32, "vocab_size": 202, "seq_len": 256}
RANDOM: dict[str, ModelSpec] = {
    "odd Q40": small_spec(Architecture.LLAMA, Q40, **ODD),
    "odd Q80": small_spec(Architecture.LLAMA, Q80, **ODD),
    "odd F32": small_spec(Architecture.LLAMA, F32, **ODD),
    "experts Q80": small_spec(Architecture.QWEN3_MOE, Q80),
    "experts F32": small_spec(Architecture.QWEN3_MOE, F32),
}
N_BATCHES = 64
X_PIPE = 2
SIXTEENS = [(16, 32), (16, 32, 40), (16, 32, 33), (16, 17), (16, 32, 48, 64)]
HALVES = [(16, 20), (32, 63), (48, 50), (32, 64)]
"""Where the parts of each batch end."""


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with Executor(2) as running:
        yield running


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        if name in RANDOM and not (folder / name).exists():
            write_random_model(folder / name, RANDOM[name])
        return folder / name if name in RANDOM else DATA / f"{name}.m"

    return path


def assert_same_rows(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.flatnonzero((got.view(np.int32) != want.view(np.int32)).any(1)).tolist() == []


@pytest.mark.parametrize("n_nodes", [1, 2])
@pytest.mark.parametrize("name", [*FIXTURES, *RANDOM])
def test_parts_change_no_bit(name: str, n_nodes: int, executor: Executor, model_path: Callable[[str], Path]) -> None:
    with ModelFile.open(model_path(name)) as model:
        spec = model.spec
        network, nodes = build_graph(spec, n_nodes, F32 if spec.weight_type == F32 else Q80, N_BATCHES)
        whole, parted = (EngineCluster(network, nodes, file_weights(model, n_nodes), executor) for _ in range(2))
        rng = np.random.default_rng(n_nodes)
        for ends in SIXTEENS + HALVES:
            rows = ends[-1]
            # other tokens each time: nothing right is left over from the time before
            tokens = rng.integers(0, spec.vocab_size, rows + 1).tolist()
            start = int(rng.integers(0, spec.seq_len - rows))
            assert_same_rows(parted.run(tokens[:-1], start, ends=ends), whole.run(tokens[:-1], start))
            # and the caches are the same
            assert_same_rows(parted.run(tokens[-1:], start + rows), whole.run(tokens[-1:], start + rows))


def test_classifiers_row_of_the_last_part(executor: Executor, model_path: Callable[[str], Path]) -> None:
    """One row that begins a tile, and one that does not; whatever part it is in, the logits of other rows are left alone."""
    for rows in (33, 40):
        with ModelFile.open(model_path("llama_q40")) as model:
            network, (node,) = build_graph(model.spec, 1, Q80, N_BATCHES)
            tokens = np.arange(rows) * 7 % model.spec.vocab_size
            whole, parted = (compile_program(network, node, FileWeights(model), n_threads=2) for _ in range(2))
            last = whole.n_segments - 1
            for program in whole, parted:
                program.values(TOKEN_PIPE)[:rows, 0] = tokens
            executor.run(whole, 0, last + 1, 0, rows)
            executor.run(parted, 0, last, 0, 32)
            executor.run(parted, 0, last, 0, rows, 32)
            executor.run(parted, last, last + 1, 0, rows, rows - 1)
            assert_same_rows(parted.row(LOGITS_PIPE, rows - 1)[None], whole.row(LOGITS_PIPE, rows - 1)[None])
            assert not parted.values(LOGITS_PIPE)[: rows - 1].any()


def region_bytes(program: Program, pipe: int, node: int | None, rows: int, first_row: int = 0) -> list[bytes]:
    return [bytes(piece) for piece in program.region(pipe, node, rows, first_row)]


def test_regions_and_rows_of_a_part(model_path: Callable[[str], Path]) -> None:
    """Whether a pipe is kept by slices (LG, ZQ) or not (X): a part of it is a part of the whole, a row its slices side by side."""
    spec = RANDOM["odd F32"]
    network, nodes = build_graph(spec, 2, F32, 32)
    weights = WireWeights(nodes[0])
    weights.allocate()
    program = compile_program(network, nodes[0], weights, n_threads=1)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((32, spec.vocab_size), np.float32)
    for node in range(2):
        (piece,) = program.region(LOGITS_PIPE, node, 32)
        piece[:] = np.ascontiguousarray(logits[:, node * 101 : (node + 1) * 101]).data.cast("B")
        part = logits[16:20, node * 101 : (node + 1) * 101].tobytes()
        assert region_bytes(program, LOGITS_PIPE, node, 20, 16) == [part]
    held = program.row(LOGITS_PIPE, 7)
    assert held.tobytes() == logits[7].tobytes()
    assert program.row(LOGITS_PIPE, 19).tobytes() == logits[19].tobytes()
    assert np.shares_memory(held, program.row(LOGITS_PIPE, 0))  # no memory a token
    with pytest.raises(GraphError, match="kept by slices"):
        program.values(LOGITS_PIPE)

    x = program.values(X_PIPE)
    x[:] = rng.standard_normal(x.shape, np.float32)
    assert region_bytes(program, X_PIPE, None, 20, 16) == [x[16:20].tobytes()]
    assert region_bytes(program, X_PIPE, 1, 18, 16) == [x[m, 48:].tobytes() for m in (16, 17)]
    assert np.shares_memory(program.row(X_PIPE, 3), x[3])
