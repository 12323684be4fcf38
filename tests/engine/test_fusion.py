"""Which neighbours become one instruction, and which don't."""

import itertools

import pytest

from dairllm.engine.assembler import Assembler
from dairllm.engine.fusion import fused
from dairllm.engine.program import compile_program
from dairllm.engine.step import Step, reads, writes
from dairllm.engine.weights import WireWeights
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture, HiddenAct
from dairllm.graph.types import FloatType
from dairllm.kernels.instructions import FIELDS, Kind

X, Y, PANELS = ("PIPE", 1), ("BUFFER", 1), ("BUFFER", 2)
DEAL = ("columns", 64)


def panels(**values: int) -> dict[str, int]:
    place = {"n": 64, "planes": 1, "panels": 8000, "panels_row": 320, "panels_plane": 0, "tiles": 9000, "tile_stride": 1280, "flags": 0}
    return place | values


def operand(name: str, address: int, planes: bool = True) -> dict[str, int]:
    return {name: address, f"{name}_row": 320} | ({f"{name}_plane": 0} if planes else {})


def norm(**values: int) -> Step:
    place = operand("x", 1000, False) | operand("inverse", 2000, False) | operand("y", 3000, False)
    uses = [reads(X, DEAL), writes(Y, DEAL)]
    return Step(Kind.RMS_NORM, uses, place | {"weights": 4000, "n_columns": 1, "width": 64} | values)


def pack(x: int = 3000, **values: int) -> Step:
    return Step(Kind.PACK, [reads(Y, DEAL), writes(PANELS, DEAL)], operand("x", x) | panels(**values))


def silu(x: int = 3000, y: int = 3000, **values: int) -> Step:
    return Step(Kind.SILU, [writes(Y, DEAL)], operand("x", x) | operand("y", y) | {"n": 64, "planes": 1} | values)


def mul(x: int = 3000, y: int = 3000, m: int = 5000, **values: int) -> Step:
    step = silu(x, y, **values)
    return Step(Kind.MUL, [*step.uses, reads(X, DEAL)], step.values | operand("factor", m))


def test_a_norm_takes_packing_with_it() -> None:
    count, step = fused([mul(), norm()], pack()) or (0, norm())
    assert count == 1
    assert (step.kind, list(step.values)) == (Kind.RMS_NORM_PACK, list(FIELDS[Kind.RMS_NORM_PACK]))
    assert (step.values["source"], step.values["x"], step.values["panels"]) == (1000, 3000, 8000)
    assert step.uses == [*norm().uses, *pack().uses]


@pytest.mark.parametrize("kind", [Kind.SILU, Kind.GELU])
def test_an_activation_takes_its_multiplication_and_packing_with_it(kind: Kind) -> None:
    count, step = fused([silu()._replace(kind=kind), mul()], pack()) or (0, mul())
    assert count == 2
    assert step.kind.name == f"{kind.name}_MUL_PACK"
    assert list(step.values) == list(FIELDS[step.kind])
    assert (step.values["x"], step.values["factor"], step.values["panels"]) == (3000, 5000, 8000)


@pytest.mark.parametrize(
    "steps",
    [
        [norm(), pack(3004)],
        [norm(), pack(x_row=640)],
        [norm(width=32), pack()],
        [norm(n_columns=2, width=32), pack()],
        [norm(), pack(planes=2)],
        [norm(), pack()._replace(kind=Kind.PACK_BLOCKS)],
        [silu(x=1000), mul(), pack()],
        [silu(), mul(y=6000), pack(6000)],
        [silu(), mul(x=6000), pack()],
        [silu(), mul(), pack(6000)],
        [silu(), mul(m=3000), pack()],
        [silu(n=32), mul(), pack()],
        [silu(planes=2), mul(), pack()],
        [silu(), pack()],
        [mul(), pack()],
    ],
)
def test_what_is_not_the_same_values_in_one_place_stays_apart(steps: list[Step]) -> None:
    assert fused(steps[:-1], steps[-1]) is None


def test_a_barrier_that_any_of_them_needs_stands_before_all() -> None:
    assembler = Assembler()
    assembler.begin_segment()
    assembler.add(Kind.SOFTMAX, [writes(X)], x=5000, x_row=320, n=64)
    for step in (silu(), mul(), pack()):
        assembler.add(step.kind, step.uses, **step.values)
    assert assembler.program()[:, 0].tolist() == [Kind.SOFTMAX, Kind.BARRIER, Kind.SILU_MUL_PACK]


def test_what_lies_on_two_sides_of_a_sync_stays_apart() -> None:
    assembler = Assembler()
    for step in (norm(), pack()):
        assembler.begin_segment()
        assembler.add(step.kind, step.uses, **step.values)
    assert assembler.program()[:, 0].tolist() == [Kind.RMS_NORM, Kind.PACK]


@pytest.mark.parametrize("arch", list(Architecture))
@pytest.mark.parametrize("act", list(HiddenAct))
@pytest.mark.parametrize("weights", [FloatType.Q40, FloatType.Q80, FloatType.F32])
def test_our_own_graphs_have_no_neighbours_left(arch: Architecture, act: HiddenAct, weights: FloatType) -> None:
    spec = small_spec(arch, weights, hidden_act=act)
    network, nodes = build_graph(spec, 2, FloatType.F32 if weights == FloatType.F32 else FloatType.Q80, 32)
    for node in nodes:
        held = WireWeights(node)
        held.allocate()
        kinds = [Kind(kind) for kind in compile_program(network, node, held, n_threads=1).instructions[:, 0]]
        pairs = set(itertools.pairwise(kinds))
        assert not pairs & {(Kind.RMS_NORM, Kind.PACK), (Kind.MUL, Kind.PACK)}
        if weights != FloatType.F32:
            assert {Kind.RMS_NORM_PACK, Kind.GELU_MUL_PACK if act == HiddenAct.GELU else Kind.SILU_MUL_PACK} <= set(kinds)
