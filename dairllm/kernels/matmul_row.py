"""Quantized weight rows times the row panels of a few rows of the batch, which are their columns.

The order of sums (docs/arithmetic.md): acc[block mod 8] = fma(float(exact integer sum), d_weight * d_activation,
acc[block mod 8]) in block order, then the tree over the eight. The accumulators are the lanes of one vector; one row is
one sequential stream of bytes, prefetched well ahead, whose blocks are rearranged once for all columns.

Rows go in strips of four: the blocks that eight do not divide, two of a row of 576 values, fill vectors together with their neighbours',
and the four sums of a column are folded together.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llvmlite import ir
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
    float_zero,
    fma,
    for_range,
    halves,
    i64,
    ir_function,
    k64,
    load,
    prefetch,
    shuffle,
    store,
    tree_sum,
    var,
    vec,
    void,
)
from dairllm.kernels.kernel import kernel
from dairllm.kernels.panels import GROUP_BYTES
from dairllm.kernels.weight_words import Q40, Q80, WeightWords, Words

__all__ = ["PREFETCH_BYTES", "matmul_rows_q40", "matmul_rows_q80"]

PREFETCH_BYTES = 2048
"""How far ahead weights are asked for: anything from 1 to 8 KiB is as good, none at all costs up to 20 %, most of all where a row has many
columns and a page is small."""
_NEAR_BYTES = 20 << 10
"""Of the panels of eight columns: so much of them is taken times all rows of a strip before the next, from the first-level cache."""
_STRIP = 4


def _repeated(b: Builder, address: Value, t: Value, lanes: int, align: int) -> Value:
    """The first `lanes` elements there, again and again until they are as many as `t` has."""
    part = load(b, address, vec(t.element, lanes), align)
    return part if lanes == t.count else shuffle(b, part, part, [i % lanes for i in range(t.count)])


def _products(
    b: Builder, rows: list[Words], panels: list[Value], signed: bool, lanes: int = 8
) -> Iterator[tuple[int, list[tuple[Value, Value]]]]:
    """Of each column at `panels`, (column, [(integer sums, scales) of each row]): <8 x f32>. Its first `lanes` blocks stand for all."""
    scales = [emit_from_half(b, halves) for _, halves in rows]

    def x(column: int, k: int) -> Value:
        return _repeated(b, at(b, panels[column], 32 * k), vec(I8, 32), 4 * lanes, 1)

    def start(column: int) -> Value:
        return word_sums(b, _repeated(b, at(b, panels[column], 256), vec(I32, 8), lanes, 4), signed)

    for c, dots in dot_words(b, len(rows), len(panels), 8, lambda row, k: rows[row][0][k], x, start, signed):
        d = _repeated(b, at(b, panels[c], 288), V8, lanes, 4)
        yield c, [(b.sitofp(dot, V8), b.fmul(scale, d)) for dot, scale in zip(dots, scales, strict=True)]


def _aligned(b: Builder, count: int) -> Value:
    """Address of room for vectors that no cache line divides.

    What LLVM spills by itself lies as the caller's stack happens to lie: across two lines it took twice the time in some threads.
    """
    room = cgutils.alloca_once(b, ir.ArrayType(V8, count))
    room.align = 64
    return b.ptrtoint(room, I64)


def _vectors(b: Builder, address: Value, count: int) -> list[Value]:
    return [b.inttoptr(at(b, address, 32 * i), V8.as_pointer()) for i in range(count)]


def _add_groups(
    b: Builder, kind: WeightWords, rows: list[Value], columns: list[Value], n_groups: Value, ahead: Value, accs: list[list[Value]]
) -> None:
    """So many groups of blocks of each row. Meanwhile as many bytes are asked for, `ahead` bytes on."""
    group_bytes = 8 * kind.block_bytes
    with for_range(b, n_groups) as loop:
        o, x = b.mul(loop.index, k64(group_bytes)), b.mul(loop.index, k64(GROUP_BYTES))
        # rows that lie together are one stream of bytes
        asked = b.add(b.add(rows[-1], ahead), b.mul(loop.index, k64(len(rows) * group_bytes)))
        for line in range(0, len(rows) * group_bytes, 64):
            prefetch(b, at(b, asked, line))
        words = [kind.group(b, b.add(row, o)) for row in rows]
        for c, products in _products(b, words, [b.add(column, x) for column in columns], kind.signed):
            for row, (integers, scale) in zip(accs, products, strict=True):
                b.store(fma(b, integers, scale, b.load(row[c])), row[c])


def _add_ends(
    b: Builder, kind: WeightWords, ends: list[Value], panels: Value, panels_row: Value, n_columns: int, rest: Value, sums: list[Value]
) -> None:
    """The last blocks of 4, 2 or 1 rows together, into the accumulators of their columns at `sums`."""
    lanes, words = 8 // len(ends), kind.ends(b, ends, rest)
    with for_range(b, k64(n_columns)) as loop:
        panel, column = b.add(panels, b.mul(loop.index, panels_row)), b.mul(loop.index, k64(32))
        for _, ((integers, scale),) in _products(b, [words], [panel], kind.signed, lanes):
            for r, row in enumerate(sums):
                # its own lanes first; those beyond get a scale of zero, and add nothing
                turned = [(lanes * r + i) % 8 for i in range(8)]
                own = shuffle(b, scale, float_zero(), [lane if i < lanes else 8 for i, lane in enumerate(turned)])
                place = b.add(row, column)
                store(b, fma(b, shuffle(b, integers, integers, turned), own, load(b, place, V8, 32)), place, 32)


def _fold_four(b: Builder, sums: Sequence[Value]) -> Value:
    """`tree_sum` of each of four: <4 x f32>."""
    first, second, third, fourth = (b.fadd(*halves(b, v)) for v in sums)
    x, y = (b.fadd(shuffle(b, x, y, (0, 1, 4, 5)), shuffle(b, x, y, (2, 3, 6, 7))) for x, y in ((first, second), (third, fourth)))
    return b.fadd(shuffle(b, x, y, (0, 2, 4, 6)), shuffle(b, x, y, (1, 3, 5, 7)))


def _strip_times(kind: WeightWords, n_columns: int) -> Any:
    @ir_function(void, i64, i64, i64, i64, i64, i64, i64)
    def strip_times(
        b: Builder, weights: Value, weights_row: Value, panels: Value, panels_row: Value, n_blocks: Value, out: Value, out_row: Value
    ) -> None:
        """out[column][0..3] = four weight rows times row panels. Reads exactly the rows' bytes."""
        columns = [b.add(panels, b.mul(panels_row, k64(c))) for c in range(n_columns)]
        groups, rest = b.lshr(n_blocks, k64(3)), b.and_(n_blocks, k64(7))
        sums, row_bytes = _aligned(b, _STRIP * n_columns), 32 * n_columns
        for place in _vectors(b, sums, _STRIP * n_columns):
            b.store(float_zero(), place)

        def add_groups(first: Value, count: Value, ahead: Value) -> None:
            with for_range(b, k64(_STRIP // ROWS_TOGETHER)) as loop:
                numbers = [b.add(b.mul(loop.index, k64(ROWS_TOGETHER)), k64(r)) for r in range(ROWS_TOGETHER)]
                o, x = b.mul(first, k64(8 * kind.block_bytes)), b.mul(first, k64(GROUP_BYTES))
                rows = [b.add(b.add(weights, b.mul(number, weights_row)), o) for number in numbers]
                places = [_vectors(b, b.add(sums, b.mul(number, k64(row_bytes))), n_columns) for number in numbers]
                few = ROWS_TOGETHER * n_columns <= ACCUMULATORS
                accs = [[var(b, V8, b.load(place)) for place in row] for row in places] if few else places
                _add_groups(b, kind, rows, [b.add(column, x) for column in columns], count, ahead, accs)
                if few:
                    for row, kept in zip(accs, places, strict=True):
                        for acc, place in zip(row, kept, strict=True):
                            b.store(b.load(acc), place)

        if n_columns <= 4:
            add_groups(k64(0), groups, k64(PREFETCH_BYTES))
        else:
            most = k64(_NEAR_BYTES // (n_columns * GROUP_BYTES))
            with for_range(b, b.udiv(b.add(groups, b.sub(most, k64(1))), most)) as loop:
                first = b.mul(loop.index, most)
                left = b.sub(groups, first)
                add_groups(first, b.select(b.icmp_unsigned("<", left, most), left, most), b.mul(weights_row, k64(_STRIP)))
        with b.if_then(b.icmp_unsigned("!=", rest, k64(0))):
            o, x = b.mul(groups, k64(8 * kind.block_bytes)), b.mul(groups, k64(GROUP_BYTES))

            def add_ends(together: int) -> None:
                with for_range(b, k64(_STRIP // together)) as loop:
                    rows = [b.add(b.mul(loop.index, k64(together)), k64(r)) for r in range(together)]
                    ends = [b.add(b.add(weights, o), b.mul(row, weights_row)) for row in rows]
                    accs = [b.add(sums, b.mul(row, k64(row_bytes))) for row in rows]
                    _add_ends(b, kind, ends, b.add(panels, x), panels_row, n_columns, rest, accs)

            with b.if_else(b.icmp_unsigned("<=", rest, k64(2))) as (two, more):
                with two:
                    add_ends(4)
                with more, b.if_else(b.icmp_unsigned("<=", rest, k64(4))) as (four, most):
                    with four:
                        add_ends(2)
                    with most:
                        add_ends(1)
        for c in range(n_columns):
            rows = [b.load(_vectors(b, at(b, sums, row_bytes * r), n_columns)[c]) for r in range(_STRIP)]
            store(b, _fold_four(b, rows), b.add(out, b.mul(out_row, k64(c))), 4)

    return strip_times


def _row_times(kind: WeightWords) -> Any:
    @ir_function(void, i64, i64, i64, i64)
    def row_times(b: Builder, weights: Value, panel: Value, n_blocks: Value, out: Value) -> None:
        """out[0] = one weight row times a row panel."""
        groups, rest, place = b.lshr(n_blocks, k64(3)), b.and_(n_blocks, k64(7)), _aligned(b, 1)
        (acc,) = _vectors(b, place, 1)
        b.store(float_zero(), acc)
        _add_groups(b, kind, [weights], [panel], groups, k64(PREFETCH_BYTES), [[acc]])
        with b.if_then(b.icmp_unsigned("!=", rest, k64(0))):
            o, x = b.mul(groups, k64(8 * kind.block_bytes)), b.mul(groups, k64(GROUP_BYTES))
            _add_ends(b, kind, [b.add(weights, o)], b.add(panel, x), k64(0), 1, rest, [place])
        store(b, tree_sum(b, b.load(acc)), out, 4)

    return row_times


def _matmul_rows(kind: WeightWords) -> Any:
    single = _row_times(kind)
    one, two, four, eight = (_strip_times(kind, n_columns) for n_columns in (1, 2, 4, 8))

    @kernel
    def matmul_rows(out, out_row, panels, panels_row, n_rows, weights, weights_row, n_blocks, count):
        """out[row][0..count] = weight rows times n_rows rows of the batch.

        Where those are more than one, rows up to the next multiple of 4 are written too.
        """
        strips = count - count % 4
        for r in range(0, strips, 4):
            w, y, x, left = weights + r * weights_row, out + 4 * r, panels, n_rows
            while left > 4:
                eight(w, weights_row, x, panels_row, n_blocks, y, out_row)
                x, y, left = x + 8 * panels_row, y + 8 * out_row, left - 8
            if left > 2:
                four(w, weights_row, x, panels_row, n_blocks, y, out_row)
            elif left == 2:
                two(w, weights_row, x, panels_row, n_blocks, y, out_row)
            elif left == 1:
                one(w, weights_row, x, panels_row, n_blocks, y, out_row)
        for r in range(strips, count):
            for m in range(n_rows):
                single(weights + r * weights_row, panels + m * panels_row, n_blocks, out + m * out_row + 4 * r)

    return matmul_rows


matmul_rows_q40 = _matmul_rows(Q40)
matmul_rows_q80 = _matmul_rows(Q80)
