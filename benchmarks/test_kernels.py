"""Kernels one by one, in one layer of the 1.1B shape, on one thread: what a change of a kernel does.

    pytest benchmarks --benchmark-group-by=func,param:kind [--benchmark-autosave --benchmark-compare]

A layer's matmul is small enough for the caches, so these are speeds of arithmetic; `dairllm bench` has those of weights in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import FileWeights
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import TOKEN_PIPE, build_graph
from dairllm.graph.types import FloatType
from dairllm.kernels.instructions import FIELDS, Kind

ROWS = 64
SEQ_LEN = 4096

Benchmark = Callable[[Callable[[], None]], None]


@dataclass(frozen=True)
class Layer:
    """A program whose segments are its instructions, one each."""

    executor: Executor
    program: Program

    def call(self, kind: Kind, position: int, rows: int) -> Callable[[], None]:
        """The first record of a kind; of matmuls that of w1, which has the most rows."""
        instructions = [number for number, record in enumerate(self.program.instructions) if record[0] == kind]
        if not instructions:
            pytest.skip("weights of another type")
        if "d" in FIELDS[kind]:
            outputs = 1 + FIELDS[kind].index("d")
            instructions.sort(key=lambda number: -int(self.program.instructions[number][outputs]))
        return lambda: self.executor.run(self.program, instructions[0], instructions[0] + 1, position, rows)


@pytest.fixture(scope="module", params=[FloatType.Q40, FloatType.Q80, FloatType.F32], ids=lambda kind: kind.name.lower())
def layer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Layer]:
    path: Path = tmp_path_factory.mktemp("layer") / "layer.m"
    spec = small_spec(
        weight_type=request.param, dim=2048, hidden_dim=5632, n_layers=1, n_heads=32, n_kv_heads=4, vocab_size=320, seq_len=SEQ_LEN
    )
    write_random_model(path, spec)
    with ModelFile.open(path) as model, Executor(1) as executor:
        sync = FloatType.F32 if request.param == FloatType.F32 else FloatType.Q80
        network, (node,) = build_graph(model.spec, 1, sync, ROWS)
        program = compile_program(network, node, FileWeights(model), n_threads=1)
        program.values(TOKEN_PIPE)[:, 0] = 5
        executor.run(program, 0, program.n_segments, 0, ROWS)  # every buffer holds what it may hold
        yield Layer(executor, program.with_segments([(number, number + 1) for number in range(len(program.instructions))]))


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("kind", [Kind.MATMUL_Q40, Kind.MATMUL_Q80, Kind.MATMUL_F32], ids=lambda kind: kind.name.lower())
def test_matmul(benchmark: Benchmark, layer: Layer, kind: Kind, rows: int) -> None:
    benchmark(layer.call(kind, 0, rows))


@pytest.mark.parametrize("layer", [FloatType.Q40], ids=["q40"], indirect=True)
@pytest.mark.parametrize("position", [128, 1000, 4000])
@pytest.mark.parametrize("rows", [1, 64])
def test_attention(benchmark: Benchmark, layer: Layer, position: int, rows: int) -> None:
    benchmark(layer.call(Kind.ATTEND, position, rows))


@pytest.mark.parametrize("layer", [FloatType.Q40], ids=["q40"], indirect=True)
@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize(
    "kind",
    [Kind.PACK, Kind.TO_BLOCKS, Kind.INV_RMS, Kind.RMS_NORM, Kind.ROPE_NEIGHBOURS, Kind.SHIFT, Kind.SILU, Kind.MUL],
    ids=lambda kind: kind.name.lower(),
)
def test_small_steps(benchmark: Benchmark, layer: Layer, kind: Kind, rows: int) -> None:
    benchmark(layer.call(kind, 0, rows))
