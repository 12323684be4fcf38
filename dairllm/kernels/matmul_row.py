"""One output of a matmul: a quantized weight row times a row panel.

The order of sums (docs/arithmetic.md): acc[block mod 8] = fma(float(exact integer sum), d_weight * d_activation,
acc[block mod 8]) in block order, then the tree over the eight. The accumulators are the lanes of one vector; one row is
one sequential stream of bytes, prefetched well ahead.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from dairllm.kernels.byte_dot import group_q40, group_q80, pair_q40, pair_q80
from dairllm.kernels.half import emit_from_half
from dairllm.kernels.ir import (
    I16,
    I32,
    V8,
    Builder,
    Value,
    at,
    broadcast,
    const,
    f32,
    float_zero,
    fma,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    prefetch,
    splat,
    tree_sum,
    var,
    vec,
)
from dairllm.kernels.panels import GROUP_BYTES

__all__ = ["PREFETCH_BYTES", "row_dot_q40", "row_dot_q80"]

PREFETCH_BYTES = 4096
"""How far ahead weights are asked for: anything from 1.5 to 12 KiB is as good, none at all costs 8 to 20 %."""

Address = Callable[[int], Value]
Group = Callable[[Builder, Address, Value], Value]


def _scales(b: Builder, address: Address, count: int, rest: Value | None = None) -> Value:
    """Half-precision bits of the scales of blocks 0..count-1, and zeros: <8 x i16>. Of `rest` blocks, where it is given."""
    d = splat(I16, 8, 0)
    for i in range(count):
        d = b.insert_element(d, load(b, address(i), I16), const(I32, i))
    if rest is None:
        return d
    inside = b.icmp_unsigned("<", ir.Constant(vec(I16, 8), list(range(8))), broadcast(b, b.trunc(rest, I16)))
    return b.select(inside, d, splat(I16, 8, 0))


def _row_dot(block_bytes: int, group: Group, pair: Group) -> Any:
    group_bytes = 8 * block_bytes

    def accumulate(b: Builder, dots: Value, half: Value, panel: Value, acc: Value) -> None:
        scale = b.fmul(emit_from_half(b, half), load(b, at(b, panel, 288), V8))
        b.store(fma(b, b.sitofp(dots, V8), scale, b.load(acc)), acc)

    def row_dot(b: Builder, w: Value, panel: Value, n_blocks: Value) -> Value:
        acc = var(b, V8, float_zero())
        groups = b.lshr(n_blocks, k64(3))
        with for_range(b, groups) as loop:
            p = b.add(w, b.mul(loop.index, k64(group_bytes)))
            x = b.add(panel, b.mul(loop.index, k64(GROUP_BYTES)))
            for line in range(0, group_bytes, 64 if block_bytes == 34 else 72):
                prefetch(b, at(b, p, PREFETCH_BYTES + line))

            def whole(i: int, p: Value = p) -> Value:
                return at(b, p, block_bytes * i)

            accumulate(b, group(b, whole, x), _scales(b, whole, 8), x, acc)
        rest = b.and_(n_blocks, k64(7))
        with b.if_then(b.icmp_unsigned("!=", rest, k64(0))):
            # the row's last blocks: lanes beyond them read the last block again, which surely is there, with a scale of zero
            p, x = b.add(w, b.mul(groups, k64(group_bytes))), b.add(panel, b.mul(groups, k64(GROUP_BYTES)))
            last = b.sub(rest, k64(1))

            def clamped(i: int) -> Value:
                return b.add(p, b.mul(b.select(b.icmp_unsigned("<", k64(i), last), k64(i), last), k64(block_bytes)))

            with b.if_else(b.icmp_unsigned("<=", rest, k64(2))) as (few, many):
                with few:
                    accumulate(b, pair(b, clamped, x), _scales(b, clamped, 2, rest), x, acc)
                with many:
                    accumulate(b, group(b, clamped, x), _scales(b, clamped, 8, rest), x, acc)
        return tree_sum(b, b.load(acc))

    return ir_function(f32, i64, i64, i64)(row_dot)


row_dot_q40 = _row_dot(18, group_q40, pair_q40)
"""(weight row, row panel, blocks) -> F32. Reads exactly the row's bytes."""
row_dot_q80 = _row_dot(34, group_q80, pair_q80)
