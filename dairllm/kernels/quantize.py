"""F32 rows to Q80 and back: as plain blocks (what crosses the wire) or packed for the matmuls (panels.py).

Q80: d = max|x| / 127, q = round(x * (1 / d)) with d as it is before it is rounded to half precision, ties to even
(dairllm.formats.quants is the plain form).
"""

from collections.abc import Callable
from typing import Any

from dairllm.kernels.half import emit_from_half, emit_to_half
from dairllm.kernels.ir import (
    F32,
    I8,
    I16,
    I32,
    V8,
    Builder,
    Value,
    at,
    broadcast,
    call,
    concat,
    const,
    for_range,
    i64,
    ir_function,
    k64,
    lane_sum,
    load,
    shuffle,
    splat,
    store,
    tree_max,
    vec,
    void,
)
from dairllm.kernels.panel_stores import emit_to_row_panel, emit_to_tile_panel

__all__ = [
    "add_blocks",
    "blocks_to_row_panel",
    "blocks_to_tile_panel",
    "blocks_to_values",
    "values_to_blocks",
    "values_to_row_panel",
    "values_to_tile_panel",
]

BLOCK_BYTES = 34
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves that in the low bits
Store = Callable[[Builder, Value, Value, Value, Value, Value], None]


def _quantize(b: Builder, x: Value, block: Value) -> tuple[Value, Value]:
    """The 32 values of block number `block` of the row at x -> (<32 x i8>, the scale's half-precision bits)."""
    p = b.add(x, b.mul(block, k64(128)))
    values = [load(b, at(b, p, 32 * i), V8, 4) for i in range(4)]

    def larger(u: Value, v: Value) -> Value:
        return b.select(b.fcmp_ordered(">", u, v), u, v)

    size = [call(b, "llvm.fabs.v8f32", V8, [v]) for v in values]
    d = b.fdiv(tree_max(b, larger(larger(size[0], size[1]), larger(size[2], size[3]))), const(F32, 127.0))
    zero = b.fcmp_ordered("==", d, const(F32, 0.0))
    inverse = b.select(zero, const(F32, 0.0), b.fdiv(const(F32, 1.0), b.select(zero, const(F32, 1.0), d)))
    inverse = broadcast(b, inverse)
    q = [b.trunc(b.bitcast(b.fadd(b.fmul(v, inverse), splat(F32, 8, _MAGIC)), vec(I32, 8)), vec(I8, 8)) for v in values]
    return concat(b, concat(b, q[0], q[1]), concat(b, q[2], q[3])), emit_to_half(b, d)


def _seed(b: Builder, q: Value) -> Value:
    """-8 * the sum of the block's values."""
    total = lane_sum(b, b.sext(q, vec(I16, 32)), b.add)  # |sum| <= 32 * 127
    return b.mul(b.sext(total, I32), const(I32, -8))


def _load_block(b: Builder, blocks: Value, block: Value) -> tuple[Value, Value]:
    p = b.add(blocks, b.mul(block, k64(BLOCK_BYTES)))
    return load(b, at(b, p, 2), vec(I8, 32)), load(b, p, I16)


def _quantizer(emit_store: Store) -> Any:
    @ir_function(void, i64, i64, i64, i64)
    def quantize(b: Builder, x: Value, first: Value, last: Value, destination: Value) -> None:
        with for_range(b, b.sub(last, first)) as loop:
            block = b.add(first, loop.index)
            q, half = _quantize(b, x, block)
            emit_store(b, destination, block, q, emit_from_half(b, half), _seed(b, q))

    return quantize


def _packer(emit_store: Store) -> Any:
    """From plain blocks. -128, which our rounding never makes, is read as -127 so that every form's products fit."""

    @ir_function(void, i64, i64, i64, i64)
    def pack(b: Builder, blocks: Value, first: Value, last: Value, destination: Value) -> None:
        with for_range(b, b.sub(last, first)) as loop:
            block = b.add(first, loop.index)
            q, half = _load_block(b, blocks, block)
            least = splat(I8, 32, -127)
            q = b.select(b.icmp_signed("<", q, least), least, q)
            emit_store(b, destination, block, q, emit_from_half(b, half), _seed(b, q))

    return pack


values_to_row_panel = _quantizer(emit_to_row_panel)
"""(x, first block, last block, panel): F32 row -> its row panel."""
values_to_tile_panel = _quantizer(emit_to_tile_panel)
"""(x, first block, last block, column): F32 row -> a column of a tile panel."""
blocks_to_row_panel = _packer(emit_to_row_panel)
blocks_to_tile_panel = _packer(emit_to_tile_panel)


@ir_function(void, i64, i64, i64, i64)
def values_to_blocks(b: Builder, x: Value, first: Value, last: Value, blocks: Value) -> None:
    with for_range(b, b.sub(last, first)) as loop:
        block = b.add(first, loop.index)
        q, half = _quantize(b, x, block)
        p = b.add(blocks, b.mul(block, k64(BLOCK_BYTES)))
        store(b, half, p)
        store(b, q, at(b, p, 2))


def _dequantizer(add: bool) -> Any:
    @ir_function(void, i64, i64, i64, i64)
    def dequantize(b: Builder, blocks: Value, first: Value, last: Value, x: Value) -> None:
        with for_range(b, b.sub(last, first)) as loop:
            block = b.add(first, loop.index)
            q, half = _load_block(b, blocks, block)
            d = broadcast(b, emit_from_half(b, half))
            p = b.add(x, b.mul(block, k64(128)))
            for i in range(4):
                v = b.fmul(b.sitofp(shuffle(b, q, q, range(8 * i, 8 * i + 8)), V8), d)
                o = at(b, p, 32 * i)
                store(b, b.fadd(load(b, o, V8, 4), v) if add else v, o, 4)

    return dequantize


blocks_to_values = _dequantizer(add=False)
"""(blocks, first block, last block, x): x = the values of the blocks."""
add_blocks = _dequantizer(add=True)
"""The same, added to what x holds."""
