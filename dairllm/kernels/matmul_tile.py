"""A batch: TILE_ROWS quantized weight rows times the 16 columns (batch rows) of a tile panel.

Rows are unpacked once into scratch that stays in the first-level cache and used for all tiles. The eight accumulators
of the defined order (matmul_row.py) are kept in memory, since the integer sums need the registers: held in variables
LLVM spills them worse.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from dairllm.kernels.byte_dot import TILE_LANES, TILE_ROWS, biased, dot_words, nibbles, word_sums
from dairllm.kernels.half import emit_from_half
from dairllm.kernels.ir import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Builder,
    Value,
    at,
    broadcast,
    float_zero,
    fma,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    prefetch,
    shuffle,
    store,
    tree_sum_of,
    vec,
    void,
)
from dairllm.kernels.kernel import kernel
from dairllm.kernels.panels import TILE_BLOCK_BYTES, TILE_COLUMNS

__all__ = ["TILE_ROWS", "tile_strip_q40", "tile_strip_q80"]

_GROUPS = TILE_COLUMNS // TILE_LANES
_VECTOR = vec(F32, TILE_LANES)
_VECTOR_BYTES = 4 * TILE_LANES
_SUMS_BYTES = _VECTOR_BYTES * _GROUPS * TILE_ROWS


def _unpacker(block_bytes: int, emit_bytes: Callable[[Builder, Value, Value], None]) -> Any:
    @ir_function(void, i64, i64, i64, i64, i64)
    def unpack(b: Builder, w: Value, row_stride: Value, n_blocks: Value, values: Value, scales: Value) -> None:
        """values [block][row][32], scales [block][row]. Meanwhile the next strip is asked for, as far as its rows lie together."""
        next_strip = b.add(w, b.mul(row_stride, k64(TILE_ROWS)))
        with for_range(b, n_blocks) as loop:
            for line in range(0, TILE_ROWS * block_bytes, 64):
                prefetch(b, at(b, b.add(next_strip, b.mul(loop.index, k64(TILE_ROWS * block_bytes))), line))
            for r in range(TILE_ROWS):
                p = b.add(b.add(w, b.mul(row_stride, k64(r))), b.mul(loop.index, k64(block_bytes)))
                emit_bytes(b, p, b.add(values, b.add(b.mul(loop.index, k64(32 * TILE_ROWS)), k64(32 * r))))
                store(b, emit_from_half(b, load(b, p, I16)), b.add(scales, b.add(b.mul(loop.index, k64(4 * TILE_ROWS)), k64(4 * r))), 4)

    return unpack


def _unpack_q40(b: Builder, block: Value, destination: Value) -> None:
    low, high = nibbles(b, load(b, at(b, block, 2), vec(I8, 16)))
    store(b, low, destination, 16)
    store(b, high, at(b, destination, 16), 16)


def _unpack_q80(b: Builder, block: Value, destination: Value) -> None:
    store(b, biased(b, load(b, at(b, block, 2), vec(I8, 32))), destination, 32)


def _store_columns(b: Builder, rows: list[list[Value]], out: Value, out_row: Value) -> None:
    """rows[4][column group] -> out[column][4 rows], transposed in registers."""
    for g in range(_GROUPS):
        v = [row[g] for row in rows]
        for base in range(0, TILE_LANES, 4):
            pair = []
            for x, y in ((v[0], v[1]), (v[2], v[3])):
                pair.append(shuffle(b, x, y, [base + i // 2 + (TILE_LANES if i % 2 else 0) for i in range(8)]))
            for c in range(4):
                column = shuffle(b, pair[0], pair[1], [2 * c, 2 * c + 1, 8 + 2 * c, 8 + 2 * c + 1])
                store(b, column, b.add(out, b.mul(out_row, k64(g * TILE_LANES + base + c))), 4)


def _dots(b: Builder, values: Value, panel: Value, signed: bool) -> list[list[Value]]:
    """One block of TILE_ROWS unpacked rows [row][32] -> sums [row][column group] of <TILE_LANES x i32>."""

    def weight(row: int, k: int) -> Value:
        return b.bitcast(broadcast(b, load(b, at(b, values, 32 * row + 4 * k), I32, 4), TILE_LANES), vec(I8, _VECTOR_BYTES))

    def x(g: int, k: int) -> Value:
        return load(b, at(b, panel, 64 * k + _VECTOR_BYTES * g), vec(I8, _VECTOR_BYTES), _VECTOR_BYTES)

    def start(g: int) -> Value:
        return word_sums(b, load(b, at(b, panel, 512 + _VECTOR_BYTES * g), vec(I32, TILE_LANES), _VECTOR_BYTES), signed)

    columns = [dots for _, dots in dot_words(b, TILE_ROWS, _GROUPS, 8, weight, x, start, signed)]
    return [list(row) for row in zip(*columns, strict=True)]


def _tile(signed: bool) -> Any:
    @ir_function(void, i64, i64, i64, i64, i64, i64)
    def tile(b: Builder, values: Value, scales: Value, panel: Value, n_blocks: Value, out: Value, out_row: Value) -> None:
        kept = cgutils.alloca_once(b, ir.ArrayType(_VECTOR, 8 * _GROUPS * TILE_ROWS))
        kept.align = 64
        kept = b.ptrtoint(kept, I64)
        for i in range(8 * _GROUPS * TILE_ROWS):
            store(b, float_zero(TILE_LANES), at(b, kept, _VECTOR_BYTES * i), _VECTOR_BYTES)
        with for_range(b, n_blocks) as loop:
            j = loop.index
            x = b.add(panel, b.mul(j, k64(TILE_BLOCK_BYTES)))
            dots = _dots(b, b.add(values, b.mul(j, k64(32 * TILE_ROWS))), x, signed)
            acc = b.add(kept, b.mul(b.and_(j, k64(7)), k64(_SUMS_BYTES)))
            for r in range(TILE_ROWS):
                d = broadcast(b, load(b, b.add(b.add(scales, b.mul(j, k64(4 * TILE_ROWS))), k64(4 * r)), F32, 4), TILE_LANES)
                for g in range(_GROUPS):
                    scale = b.fmul(d, load(b, at(b, x, 576 + _VECTOR_BYTES * g), _VECTOR, _VECTOR_BYTES))
                    p = at(b, acc, _VECTOR_BYTES * (_GROUPS * r + g))
                    store(b, fma(b, b.sitofp(dots[r][g], _VECTOR), scale, load(b, p, _VECTOR, _VECTOR_BYTES)), p, _VECTOR_BYTES)

        def kept_sum(r: int, g: int) -> Value:
            return tree_sum_of(
                b, [load(b, at(b, kept, _SUMS_BYTES * i + _VECTOR_BYTES * (_GROUPS * r + g)), _VECTOR, _VECTOR_BYTES) for i in range(8)]
            )

        sums = [[kept_sum(r, g) for g in range(_GROUPS)] for r in range(TILE_ROWS)]
        for r in range(0, TILE_ROWS, 4):
            _store_columns(b, sums[r : r + 4], at(b, out, 4 * r), out_row)

    return tile


def _tile_strip(unpack: Any, tile: Any) -> Any:
    @kernel
    def tile_strip(out, out_row, tiles, tile_stride, n_tiles, weights, weights_row, n_blocks, scratch):
        """out[column][0..TILE_ROWS] = TILE_ROWS weight rows times the columns of n_tiles tiles."""
        scales = scratch + n_blocks * 32 * TILE_ROWS
        unpack(weights, weights_row, n_blocks, scratch, scales)
        for t in range(n_tiles):
            tile(scratch, scales, tiles + t * tile_stride, n_blocks, out + t * TILE_COLUMNS * out_row, out_row)

    return tile_strip


tile_strip_q40 = _tile_strip(_unpacker(18, _unpack_q40), _tile(signed=False))
tile_strip_q80 = _tile_strip(_unpacker(34, _unpack_q80), _tile(signed=True))
