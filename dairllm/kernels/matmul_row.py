"""Quantized weight rows times the row panels of a few rows of the batch, which are their columns.

The order of sums (docs/arithmetic.md): acc[block mod 8] = fma(float(exact integer sum), d_weight * d_activation,
acc[block mod 8]) in block order, then the tree over the eight. The accumulators are the lanes of one vector; one row is
one sequential stream of bytes, prefetched well ahead, whose blocks are rearranged once for all columns.
"""

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils

from dairllm.kernels.byte_dot import ACCUMULATORS, ROWS_TOGETHER, dot_words, word_sums
from dairllm.kernels.half import emit_from_half
from dairllm.kernels.ir import (
    I8,
    I32,
    I64,
    V8,
    Builder,
    Value,
    at,
    concat,
    float_zero,
    fma,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    prefetch,
    store,
    tree_sum,
    var,
    vec,
    void,
)
from dairllm.kernels.panels import GROUP_BYTES
from dairllm.kernels.weight_words import Q40, Q80, WeightWords, Words

__all__ = ["PREFETCH_BYTES", "matmul_rows_q40", "matmul_rows_q80"]

PREFETCH_BYTES = 2048
"""How far ahead weights are asked for: anything from 1 to 8 KiB is as good, none at all costs up to 20 %, most of all where a row has many
columns and a page is small."""


def _accumulate(b: Builder, rows: list[Words], panels: list[Value], accs: list[list[Value]], signed: bool) -> None:
    """A group of blocks of each weight row times the groups at `panels`, into the accumulators [row][column]."""
    scales = [emit_from_half(b, halves) for _, halves in rows]
    lanes = rows[0][0][0].type.count // 4

    def x(column: int, k: int) -> Value:
        return load(b, at(b, panels[column], 32 * k), vec(I8, 4 * lanes))

    def start(column: int) -> Value:
        return word_sums(b, load(b, at(b, panels[column], 256), vec(I32, lanes), 4), signed)

    for c, dots in dot_words(b, len(rows), len(panels), 8, lambda row, k: rows[row][0][k], x, start, signed):
        d = load(b, at(b, panels[c], 288), V8, 4)
        for r, scale in enumerate(scales):
            dot = dots[r] if lanes == 8 else concat(b, dots[r], dots[r])
            b.store(fma(b, b.sitofp(dot, V8), b.fmul(scale, d), b.load(accs[r][c])), accs[r][c])


def _accumulators(b: Builder, n_rows: int, n_columns: int) -> list[list[Value]]:
    """Of each row and column, zeros: in registers, or, where these are too few, in memory that no cache line divides.

    What LLVM spills by itself lies as the caller's stack happens to lie: across two lines it took twice the time in some threads.
    """
    if n_rows * n_columns <= ACCUMULATORS:
        return [[var(b, V8, float_zero()) for _ in range(n_columns)] for _ in range(n_rows)]
    kept = cgutils.alloca_once(b, ir.ArrayType(V8, n_rows * n_columns))
    kept.align = 64
    address = b.ptrtoint(kept, I64)
    places = [b.inttoptr(at(b, address, 32 * i), V8.as_pointer()) for i in range(n_rows * n_columns)]
    for place in places:
        b.store(float_zero(), place)
    return [places[n_columns * r : n_columns * (r + 1)] for r in range(n_rows)]


def _rows_times(kind: WeightWords, n_rows: int, n_columns: int) -> Any:
    group_bytes = 8 * kind.block_bytes

    @ir_function(void, i64, i64, i64, i64, i64, i64, i64)
    def rows_times(
        b: Builder, weights: Value, weights_row: Value, panels: Value, panels_row: Value, n_blocks: Value, out: Value, out_row: Value
    ) -> None:
        """out[column][row] = weight row times row panel. Reads exactly the rows' bytes."""
        rows = [b.add(weights, b.mul(weights_row, k64(r))) for r in range(n_rows)]
        columns = [b.add(panels, b.mul(panels_row, k64(c))) for c in range(n_columns)]
        accs = _accumulators(b, n_rows, n_columns)
        groups = b.lshr(n_blocks, k64(3))
        with for_range(b, groups) as loop:
            o, x = b.mul(loop.index, k64(group_bytes)), b.mul(loop.index, k64(GROUP_BYTES))
            # rows that lie together are one stream of bytes
            ahead = b.add(rows[-1], b.mul(loop.index, k64(n_rows * group_bytes)))
            for line in range(0, n_rows * group_bytes, 64):
                prefetch(b, at(b, ahead, PREFETCH_BYTES + line))
            _accumulate(b, [kind.group(b, b.add(row, o)) for row in rows], [b.add(column, x) for column in columns], accs, kind.signed)
        rest = b.and_(n_blocks, k64(7))
        with b.if_then(b.icmp_unsigned("!=", rest, k64(0))):
            o, x = b.mul(groups, k64(group_bytes)), b.mul(groups, k64(GROUP_BYTES))
            ends, tails = [b.add(row, o) for row in rows], [b.add(column, x) for column in columns]
            # two blocks by themselves, as of rows of 576 values
            with b.if_else(b.icmp_unsigned("<=", rest, k64(2))) as branches:
                for branch, count in zip(branches, (2, 8), strict=True):
                    with branch:
                        _accumulate(b, [kind.some(b, end, count, rest) for end in ends], tails, accs, kind.signed)
        for r in range(n_rows):
            for c in range(n_columns):
                store(b, tree_sum(b, b.load(accs[r][c])), at(b, b.add(out, b.mul(out_row, k64(c))), 4 * r), 4)

    return rows_times


def _matmul_rows(kind: WeightWords) -> Any:
    one, two, four, eight = (_rows_times(kind, *shape) for shape in ((1, 1), (ROWS_TOGETHER, 2), (ROWS_TOGETHER, 4), (ROWS_TOGETHER, 8)))

    @njit(nogil=True)
    def matmul_rows(out, out_row, panels, panels_row, n_rows, weights, weights_row, n_blocks, count):
        """out[row][0..count] = weight rows times n_rows rows of the batch.

        Where those are more than one, rows up to the next multiple of 4 are written too.
        """
        r = 0
        while r < count:
            w, y, x, left = weights + r * weights_row, out + 4 * r, panels, n_rows
            together = ROWS_TOGETHER if left > 1 and count - r >= ROWS_TOGETHER else 1
            while left > 1 and together == ROWS_TOGETHER:
                if left > 4:
                    eight(w, weights_row, x, panels_row, n_blocks, y, out_row)
                    x, y, left = x + 8 * panels_row, y + 8 * out_row, left - 8
                elif left == 2:
                    two(w, weights_row, x, panels_row, n_blocks, y, out_row)
                    left = 0
                else:
                    four(w, weights_row, x, panels_row, n_blocks, y, out_row)
                    left = 0
            # what is left: one column, or a last row that has no neighbour
            for _ in range(left):
                for i in range(together):
                    one(w + i * weights_row, weights_row, x, panels_row, n_blocks, y + 4 * i, out_row)
                x, y = x + panels_row, y + out_row
            r += together

    return matmul_rows


matmul_rows_q40 = _matmul_rows(Q40)
matmul_rows_q80 = _matmul_rows(Q80)
