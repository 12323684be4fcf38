"""F32 rows to Q80 and back: as plain blocks (what crosses the wire) or packed for the matmuls (panels.py).

Q80: d = max|x| / 127, q = round(x * (1 / d)) with d as it is before it is rounded to half precision, ties to even
(dairllm.formats.quants is the plain form). Where an x is NaN d is too, and every q is 0. Eight blocks take little more than twice
the time of one: what is one number a block is a vector then.
"""

from collections.abc import Callable, Sequence
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
    concat,
    const,
    fold_eight,
    for_range,
    i64,
    ir_function,
    k64,
    lane_sum,
    load,
    shuffle,
    splat,
    store,
    vec,
    void,
)
from dairllm.kernels.panel_stores import emit_eight_to_row_panel, emit_eight_to_tile_panel, emit_to_row_panel, emit_to_tile_panel

__all__ = [
    "add_blocks",
    "blocks_to_row_panel",
    "blocks_to_tile_panel",
    "blocks_to_values",
    "eight_to_blocks",
    "eight_to_row_panel",
    "eight_to_tile_panel",
    "values_to_blocks",
    "values_to_row_panel",
    "values_to_tile_panel",
]

BLOCK_BYTES = 34
_INFINITE = 0x7F800000
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, ties to even, and leaves that in the low bits
Store = Callable[[Builder, Value, Value, Value, Value], None]


def _quantize(b: Builder, blocks: Sequence[Value]) -> tuple[list[Value], Value]:
    """Addresses of n = 1 or 8 blocks of values -> (<32 x i8> of each, their scales as half-precision bits <n x i16>)."""
    n = len(blocks)

    def values(block: Value) -> list[Value]:
        return [load(b, at(b, block, 32 * i), V8, 4) for i in range(4)]

    def larger(u: Value, v: Value) -> Value:
        """Of bits: those of sizes are in order, and a NaN's are above all others."""
        return b.select(b.icmp_signed(">", u, v), u, v)

    def largest(block: Value) -> Value:
        size = [b.and_(b.bitcast(v, vec(I32, 8)), splat(I32, 8, 0x7FFFFFFF)) for v in values(block)]
        return larger(larger(size[0], size[1]), larger(size[2], size[3]))

    sizes = [largest(block) for block in blocks]
    top = broadcast(b, lane_sum(b, sizes[0], larger), 1) if n == 1 else fold_eight(b, sizes, larger)
    numbers = b.sext(b.icmp_signed("<=", top, splat(I32, n, _INFINITE)), vec(I32, n))  # all bits where there is no NaN
    d = b.fdiv(b.bitcast(top, vec(F32, n)), splat(F32, n, 127.0))
    zero = b.fcmp_ordered("==", d, splat(F32, n, 0.0))
    inverse = b.select(zero, splat(F32, n, 0.0), b.fdiv(splat(F32, n, 1.0), b.select(zero, splat(F32, n, 1.0), d)))
    integers = []
    for i, block in enumerate(blocks):
        factor = shuffle(b, inverse, inverse, [i] * 8)
        rounded = [b.bitcast(b.fadd(b.fmul(v, factor), splat(F32, 8, _MAGIC)), vec(I32, 8)) for v in values(block)]
        q = [b.trunc(v, vec(I8, 8)) for v in rounded]
        kept = b.bitcast(shuffle(b, numbers, numbers, [i] * 8), vec(I8, 32))
        integers.append(b.and_(concat(b, concat(b, q[0], q[1]), concat(b, q[2], q[3])), kept))
    return integers, emit_to_half(b, d)


def _load_block(b: Builder, blocks: Value, block: Value) -> tuple[Value, Value]:
    p = b.add(blocks, b.mul(block, k64(BLOCK_BYTES)))
    return load(b, at(b, p, 2), vec(I8, 32)), load(b, p, I16)


def _store_block(b: Builder, blocks: Value, block: Value, q: Value, half: Value) -> None:
    p = b.add(blocks, b.mul(block, k64(BLOCK_BYTES)))
    store(b, half, p)
    store(b, q, at(b, p, 2))


def _lane(b: Builder, v: Value, i: int) -> Value:
    return b.extract_element(v, const(I32, i))


def _block_of(b: Builder, x: Value, block: Value) -> Value:
    """Address of block number `block` of the row at x."""
    return b.add(x, b.mul(block, k64(128)))


def _quantizer(emit_store: Store) -> Any:
    @ir_function(void, i64, i64, i64, i64)
    def quantize(b: Builder, x: Value, first: Value, last: Value, destination: Value) -> None:
        with for_range(b, b.sub(last, first)) as loop:
            block = b.add(first, loop.index)
            (q,), half = _quantize(b, [_block_of(b, x, block)])
            emit_store(b, destination, block, q, _lane(b, emit_from_half(b, half), 0))

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
            emit_store(b, destination, block, q, emit_from_half(b, half))

    return pack


values_to_row_panel = _quantizer(emit_to_row_panel)
"""(x, first block, last block, panel): F32 row -> its row panel."""
values_to_tile_panel = _quantizer(emit_to_tile_panel)
"""(x, first block, last block, column): F32 row -> a column of a tile panel."""
blocks_to_row_panel = _packer(emit_to_row_panel)
blocks_to_tile_panel = _packer(emit_to_tile_panel)


@ir_function(void, i64, i64, i64)
def eight_to_row_panel(b: Builder, x: Value, block: Value, panel: Value) -> None:
    """Blocks block..block + 7 of the row at x, block being a multiple of 8, into its row panel."""
    first = _block_of(b, x, block)
    q, half = _quantize(b, [at(b, first, 128 * i) for i in range(8)])
    emit_eight_to_row_panel(b, panel, block, q, emit_from_half(b, half))


@ir_function(void, i64, i64, i64, i64)
def eight_to_tile_panel(b: Builder, x: Value, x_row: Value, block: Value, column: Value) -> None:
    """Block number `block` of eight rows, the first one at x, into eight columns of a tile panel."""
    first = _block_of(b, x, block)
    q, half = _quantize(b, [b.add(first, b.mul(x_row, k64(i))) for i in range(8)])
    emit_eight_to_tile_panel(b, column, block, q, emit_from_half(b, half))


@ir_function(void, i64, i64, i64)
def eight_to_blocks(b: Builder, x: Value, block: Value, blocks: Value) -> None:
    """Blocks block..block + 7 of the row at x."""
    first = _block_of(b, x, block)
    q, half = _quantize(b, [at(b, first, 128 * i) for i in range(8)])
    for i in range(8):
        _store_block(b, blocks, b.add(block, k64(i)), q[i], _lane(b, half, i))


@ir_function(void, i64, i64, i64, i64)
def values_to_blocks(b: Builder, x: Value, first: Value, last: Value, blocks: Value) -> None:
    with for_range(b, b.sub(last, first)) as loop:
        block = b.add(first, loop.index)
        (q,), half = _quantize(b, [_block_of(b, x, block)])
        _store_block(b, blocks, block, q, _lane(b, half, 0))


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
