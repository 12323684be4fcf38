"""A root may ask for as many buffers and ops as the wire allows: what a worker does with each of them does not grow with their number.

The largest graph is in tests/commands/test_large_graph.py.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest

from dairllm.engine.program import Program, compile_program, memory_needs
from dairllm.engine.weights import WireWeights
from dairllm.formats.random_model import small_spec
from dairllm.graph.build import build_graph
from dairllm.graph.model import Architecture
from dairllm.graph.plan import token_plan
from dairllm.graph.types import (
    FloatType,
    NetworkConfig,
    NoConfig,
    NodeConfig,
    Op,
    OpCode,
    Pointer,
    PointerSource,
    PointerType,
    Size,
)

F32, Q80 = FloatType.F32, FloatType.Q80
NO_WEIGHT = Size(F32, 0, 0, 0)
Graph = tuple[NetworkConfig, NodeConfig]


def buffer(index: int) -> Pointer:
    return Pointer(PointerSource.BUFFER, index, PointerType.BATCH)


def one_segment(sizes: list[Size], ops: list[Op]) -> Graph:
    """A graph of these buffers and ops alone."""
    network, (node,) = build_graph(small_spec(Architecture.LLAMA, F32), 1, F32, 8)
    buffers = tuple(dataclasses.replace(node.buffers[0], name=f"b{number}", size=size) for number, size in enumerate(sizes))
    return network, dataclasses.replace(node, buffers=buffers, segments=(dataclasses.replace(node.segments[0], ops=tuple(ops), syncs=()),))


def activations(n: int) -> Graph:
    """Steps that need no barrier between each other: all are dealt alike."""
    ops = [Op(OpCode.SILU if number < n else OpCode.GELU, "a", number, buffer(number % n), buffer(number % n), NO_WEIGHT, NoConfig())
           for number in range(2 * n)]  # fmt: skip
    return one_segment([Size(F32, 1, 8, 32)] * n, ops)


def repetitions(n: int) -> Graph:
    """Rows that become packed planes, as before experts."""
    sizes = [Size(F32, 1, 8, 32), Size(Q80, 2, 8, 32)] * (n // 2)
    ops = [Op(OpCode.REPEAT_Z, "r", number, buffer(number % n // 2 * 2), buffer(number % n // 2 * 2 + 1), NO_WEIGHT, NoConfig())
           for number in range(2 * n)]  # fmt: skip
    return one_segment(sizes, ops)


def layers(arch: Architecture) -> Callable[[int], Graph]:
    """A real graph of so many layers, on the second of two nodes."""

    def build(n: int) -> Graph:
        network, nodes = build_graph(dataclasses.replace(small_spec(arch, FloatType.Q40), n_layers=n), 2, Q80, 8)
        return network, nodes[1]

    return build


def configured(network: NetworkConfig, node: NodeConfig) -> Program:
    """What a worker does with a graph before its weights come."""
    token_plan(network, node)
    weights = WireWeights(node)
    memory_needs(network, node, n_threads=2)
    weights.allocate()
    return compile_program(network, node, weights, n_threads=2)


def instructions(call: Callable[[], Any]) -> int:
    """Of Python's own, that a call takes."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("build", "n"),
    [(activations, 96), (repetitions, 96), *((layers(arch), 4) for arch in Architecture)],
    ids=["activations", "repetitions", *(arch.name for arch in Architecture)],
)
def test_four_times_the_graph_takes_four_times_as_long(build: Callable[[int], Graph], n: int) -> None:
    small, large = (instructions(partial(configured, *build(size))) for size in (n, 4 * n))
    assert small > 10_000
    assert large < 4.4 * small
