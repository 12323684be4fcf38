"""F32 rows to Q80 and back: as plain blocks (what crosses the wire) or packed for the matmuls (panels.py), some together with what makes
the values.

Q80: d = max|x| / 127, q = round(x * (1 / d)) with d as it is before it is rounded to half precision, ties to even
(dairllm.formats.quants is the plain form).
"""

from collections.abc import Callable
from typing import Any

from dairllm.kernels.elementwise import emit_gelu, emit_multiply, emit_norm, emit_silu
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
    f32,
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
    "gelu_mul_to_row_panel",
    "gelu_mul_to_tile_panel",
    "norm_to_row_panel",
    "norm_to_tile_panel",
    "silu_mul_to_row_panel",
    "silu_mul_to_tile_panel",
    "values_to_blocks",
    "values_to_row_panel",
    "values_to_tile_panel",
]

BLOCK_BYTES = 34
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves that in the low bits
Store = Callable[[Builder, Value, Value, Value, Value, Value], None]
Compute = Callable[..., Value]


def _load_values(b: Builder, x: Value, block: Value) -> list[Value]:
    """The 32 values of block number `block` of the row at x, in four vectors."""
    p = b.add(x, b.mul(block, k64(128)))
    return [load(b, at(b, p, 32 * i), V8, 4) for i in range(4)]


def _quantize(b: Builder, values: list[Value]) -> tuple[Value, Value]:
    """A block of values -> (<32 x i8>, the scale's half-precision bits)."""

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
            q, half = _quantize(b, _load_values(b, x, block))
            emit_store(b, destination, block, q, emit_from_half(b, half), _seed(b, q))

    return quantize


def _computing_quantizer(emit_store: Store, compute: Compute, with_scalar: bool = False) -> Any:
    """(y, first block, last block, destination, x, other[, scalar]): y = compute(x, other[, scalar]), and y quantized; y may be x."""

    @ir_function(void, *[i64] * 6, *([f32] if with_scalar else []))
    def compute_and_quantize(
        b: Builder, y: Value, first: Value, last: Value, destination: Value, x: Value, other: Value, *scalar: Value
    ) -> None:
        scalars = [broadcast(b, s) for s in scalar]
        with for_range(b, b.sub(last, first)) as loop:
            block = b.add(first, loop.index)
            inputs = zip(_load_values(b, x, block), _load_values(b, other, block), strict=True)
            values = [compute(b, u, v, *scalars) for u, v in inputs]
            p = b.add(y, b.mul(block, k64(128)))
            for i, v in enumerate(values):
                store(b, v, at(b, p, 32 * i), 4)
            q, half = _quantize(b, values)
            emit_store(b, destination, block, q, emit_from_half(b, half), _seed(b, q))

    return compute_and_quantize


def _silu_mul(b: Builder, x: Value, m: Value) -> Value:
    return emit_multiply(b, emit_silu(b, x), m)


def _gelu_mul(b: Builder, x: Value, m: Value) -> Value:
    return emit_multiply(b, emit_gelu(b, x), m)


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
norm_to_row_panel = _computing_quantizer(emit_to_row_panel, emit_norm, with_scalar=True)
norm_to_tile_panel = _computing_quantizer(emit_to_tile_panel, emit_norm, with_scalar=True)
silu_mul_to_row_panel = _computing_quantizer(emit_to_row_panel, _silu_mul)
silu_mul_to_tile_panel = _computing_quantizer(emit_to_tile_panel, _silu_mul)
gelu_mul_to_row_panel = _computing_quantizer(emit_to_row_panel, _gelu_mul)
gelu_mul_to_tile_panel = _computing_quantizer(emit_to_tile_panel, _gelu_mul)
blocks_to_row_panel = _packer(emit_to_row_panel)
blocks_to_tile_panel = _packer(emit_to_tile_panel)


@ir_function(void, i64, i64, i64, i64)
def values_to_blocks(b: Builder, x: Value, first: Value, last: Value, blocks: Value) -> None:
    with for_range(b, b.sub(last, first)) as loop:
        block = b.add(first, loop.index)
        q, half = _quantize(b, _load_values(b, x, block))
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
