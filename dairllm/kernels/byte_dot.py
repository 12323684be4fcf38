"""Products of bytes, the one place where the forms differ: weights (Q40 nibbles 0..15, Q80 int8) times Q80 activations, summed exactly, in
integers. Being exact, the sums are the same whatever the instruction.

A *word* is four neighbouring bytes of a block, values 4k..4k+3 for k = 0..7. All products are of word vectors, 4 bytes a lane, whose sums
end as a vector of i32. What a lane is, the callers say: a block of the row, or a column of a tile.
"""

from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir

from dairllm.kernels import forms
from dairllm.kernels.ir import I8, I16, I32, Builder, Value, call, shuffle, splat, vec

__all__ = ["ACCUMULATORS", "ROWS_TOGETHER", "TILE_LANES", "TILE_ROWS", "biased", "dot_words", "nibbles", "word_sums"]

FORM = forms.current()
_VNNI = FORM in ("avxvnni", "avx512vnni")
_WIDE = FORM == "avx512vnni"

TILE_LANES = 16 if _WIDE else 8
"""Columns of one vector of a tile."""
ROWS_TOGETHER = 2 if _WIDE else 1
"""Weight rows that a few columns are taken times together, whose activations are loaded once: where there are 32 registers."""
ACCUMULATORS = 16 if _WIDE else 4
"""Sums of a few columns that have registers beside what their products take."""
TILE_ROWS = 8 if _WIDE else 4
"""Weight rows of a tile: as many accumulators as hide the latency of the dot product and fit the registers."""


def nibbles(b: Builder, packed: Value) -> tuple[Value, Value]:
    """<n x i8> of nibble pairs -> (the low ones: values 0..15 of each block, the high ones: values 16..31)."""
    n = packed.type.count
    fifteen = splat(I8, n, 15)
    high = b.bitcast(b.lshr(b.bitcast(packed, vec(I16, n // 2)), splat(I16, n // 2, 4)), vec(I8, n))
    return b.and_(packed, fifteen), b.and_(high, fifteen)


def biased(b: Builder, weights: Value) -> Value:
    """int8 weights as this form multiplies them: vpdpbusd takes unsigned bytes, so 128 is added, which `word_sums` takes away again."""
    return b.xor(weights, splat(I8, weights.type.count, -128)) if _VNNI else weights


def word_sums(b: Builder, seeds: Value, signed: bool) -> Value:
    """What sums of products start from, given the seeds of the activations: -8 times the sum of a block's values.

    signed: for Q80 weights, else for the nibbles of Q40, which stand for nibble - 8.
    """
    if not signed:
        return seeds
    return b.shl(seeds, splat(I32, seeds.type.count, 4)) if _VNNI else splat(I32, seeds.type.count, 0)


# --------------------------------------------------------------------------------------------------------------------- the instructions
def _pairs_unsigned(b: Builder, u: Value, s: Value) -> Value:
    """Bytes, unsigned x signed -> i16, sums of two products. Never saturates here: u <= 15, or u <= 128 and |s| <= 127."""
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), [u, s])


def _pairs_words(b: Builder, x: Value, y: Value) -> Value:
    """i16 x i16 -> i32, sums of two products."""
    return call(b, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), [x, y])


def _widen(b: Builder, x: Value) -> Value:
    """i16 -> i32, sums of neighbours."""
    return _pairs_words(b, x, splat(I16, 16, 1))


def _quads_signed(b: Builder, acc: Value, w: Value, x: Value) -> Value:
    """acc <n x i32> + sums of four products, signed x signed, as |w| times x with the sign of w: pair sums (2 * 128 * 127) fit 16 bits."""
    size = call(b, "llvm.abs.v32i8", w.type, [w, ir.Constant(ir.IntType(1), 0)])
    return b.add(acc, _widen(b, _pairs_unsigned(b, size, call(b, "llvm.x86.avx2.psign.b", w.type, [x, w]))))


def _quads_vnni(b: Builder, acc: Value, u: Value, s: Value) -> Value:
    """The same, unsigned x signed."""
    t = acc.type
    return call(b, f"llvm.x86.avx512.vpdpbusd.{t.count * 32}", t, [acc, b.bitcast(u, t), b.bitcast(s, t)])


def _quads_plain(b: Builder, acc: Value, u: Value, s: Value, signed: bool) -> Value:
    """The same in plain IR: products of bytes fit 16 bits, sums of two as well (u <= 15, or both within -128..127 and s >= -127)."""
    n = u.type.count
    wide = vec(I16, n)
    product = b.mul(b.sext(u, wide) if signed else b.zext(u, wide), b.sext(s, wide))

    def every_second(x: Value, first: int) -> Value:
        return shuffle(b, x, x, range(first, x.type.count, 2))

    pairs = b.sext(b.add(every_second(product, 0), every_second(product, 1)), vec(I32, n // 2))
    return b.add(acc, b.add(every_second(pairs, 0), every_second(pairs, 1)))


def _pin(b: Builder, values: Sequence[Value]) -> list[Value]:
    """An empty asm through which all these registers pass.

    Without it LLVM reorders a tile row by row and spills the activations it had loaded: a third slower.
    """
    t, n = values[0].type, len(values)
    f = ir.FunctionType(ir.LiteralStructType([t] * n), [t] * n)
    r = b.asm(f, "", ",".join(["=x"] * n + [str(i) for i in range(n)]), values, False)
    return [b.extract_value(r, i) for i in range(n)]


# ------------------------------------------------------------------------------------------------------------------------- the products
At = Callable[[int, int], Value]


def dot_words(
    b: Builder, rows: int, columns: int, steps: int, weight: At, x: At, start: Callable[[int], Value], signed: bool
) -> Iterator[tuple[int, list[Value]]]:
    """The sums over `steps` word vectors (8 at most) of `rows` rows of weights by `columns` vectors of activations: (column, [row]), column
    after column. What a caller appends as it gets them lies between the columns, where registers are few.

    Args:
        weight: (row, step) -> bytes, `biased` where they are signed.
        x: (column, step) -> as many bytes.
        start: column -> what its sums start from, see `word_sums`.
    """
    if _VNNI or rows > 1:
        if FORM == "avx2" and not signed:
            acc = _all_in_pairs(b, rows, columns, steps, weight, x, start)
        else:
            acc = _all(b, rows, columns, steps, weight, x, start, signed)
        yield from ((c, [row[c] for row in acc]) for c in range(columns))
        return
    # one weight row, whose words stay in registers, and one column at a time
    words = [weight(0, k) for k in range(steps)]
    for c in range(columns):
        if FORM == "avx2" and not signed:
            vectors = [x(c, k) for k in range(steps)]
            pairs = [_pairs_unsigned(b, w, v) for w, v in zip(words, vectors, strict=True)]
            while len(pairs) > 1:  # neighbours first: few are alive at once
                pairs = [b.add(pairs[i], pairs[i + 1]) for i in range(0, len(pairs), 2)]
            total = b.add(_widen(b, pairs[0]), start(c))
        else:
            total = start(c)
            for k, w in enumerate(words):
                total = _quads(b, total, w, x(c, k), signed)
        yield c, [total]


def _quads(b: Builder, acc: Value, w: Value, x: Value, signed: bool) -> Value:
    """acc <n x i32> + sums of four products."""
    if _VNNI:
        return _quads_vnni(b, acc, w, x)
    return _quads_signed(b, acc, w, x) if FORM == "avx2" else _quads_plain(b, acc, w, x, signed)


def _all(
    b: Builder, rows: int, columns: int, steps: int, weight: At, x: At, start: Callable[[int], Value], signed: bool
) -> list[list[Value]]:
    """Step after step, all sums in registers: [row][column]."""
    starts = [start(c) for c in range(columns)]
    acc = [list(starts) for _ in range(rows)]
    for k in range(steps):
        vectors = [x(c, k) for c in range(columns)]
        for row, sums in enumerate(acc):
            w = weight(row, k)
            acc[row] = [_quads(b, s, w, v, signed) for s, v in zip(sums, vectors, strict=True)]
    return acc


def _all_in_pairs(b: Builder, rows: int, columns: int, steps: int, weight: At, x: At, start: Callable[[int], Value]) -> list[list[Value]]:
    """The same of unsigned weights in pair sums, eight of which fit 16 bits (8 * 15 * 127 * 2 = 30480): one widening a block."""
    starts = [start(c) for c in range(columns)]
    part: list[Value] = []
    for k in range(steps):
        vectors, products = [x(c, k) for c in range(columns)], []
        for row in range(rows):
            w = weight(row, k)
            products += [_pairs_unsigned(b, w, v) for v in vectors]
        part = _pin(b, [b.add(p, m) for p, m in zip(part, products, strict=True)] if part else products)
    return [[b.add(_widen(b, part[columns * row + c]), s) for c, s in enumerate(starts)] for row in range(rows)]
