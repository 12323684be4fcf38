"""Products of bytes, the one place where the forms differ: weights (Q40 nibbles 0..15, Q80 int8) times Q80 activations, summed exactly, in
integers. Being exact, the sums are the same whatever the instruction.

A *word* is four neighbouring bytes of a block, values 4k..4k+3 for k = 0..7. All products are of word vectors, 4 bytes a lane, whose sums
end as a vector of i32. What a lane is, the callers say: a block of the row, or a column of a tile.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from dairllm.kernels import forms
from dairllm.kernels.ir import I8, I16, I32, Builder, Value, call, shuffle, splat, vec

__all__ = ["ROWS_TOGETHER", "TILE_LANES", "TILE_ROWS", "biased", "dot_words", "nibbles", "word_sums"]

FORM = forms.current()
_VNNI = FORM in ("avxvnni", "avx512vnni")
_WIDE = FORM == "avx512vnni"

TILE_LANES = 16 if _WIDE else 8
"""Columns of one vector of a tile."""
ROWS_TOGETHER = 2 if _WIDE else 1
"""Weight rows that a few columns are taken times together, whose activations are loaded once: where there are 32 registers."""
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
    name = {16: "llvm.x86.ssse3.pmadd.ub.sw.128", 32: "llvm.x86.avx2.pmadd.ub.sw"}[u.type.count]
    return call(b, name, vec(I16, u.type.count // 2), [u, s])


def _pairs_words(b: Builder, x: Value, y: Value) -> Value:
    """i16 x i16 -> i32, sums of two products."""
    name = {8: "llvm.x86.sse2.pmadd.wd", 16: "llvm.x86.avx2.pmadd.wd"}[x.type.count]
    return call(b, name, vec(I32, x.type.count // 2), [x, y])


def _widen(b: Builder, x: Value) -> Value:
    """i16 -> i32, sums of neighbours."""
    return _pairs_words(b, x, splat(I16, x.type.count, 1))


def _quads_vnni(b: Builder, acc: Value, u: Value, s: Value) -> Value:
    """acc <n x i32> + sums of four products, unsigned x signed."""
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
Weight = Callable[[int, int], Value]
Activations = Callable[[int], Sequence[Value]]


def dot_words(b: Builder, rows: int, steps: int, weight: Weight, x: Activations, sums: Sequence[Value], signed: bool) -> list[list[Value]]:
    """The sums over `steps` word vectors (8 at most) of `rows` rows of weights by some vectors of activations: [row][vector].

    Args:
        weight: (row, step) -> bytes, `biased` where they are signed.
        x: step -> a vector for each of `sums`, of as many bytes.
        sums: what they start from, see `word_sums`.
    """
    if FORM == "avx2":
        return (_dot_words_signed if signed else _dot_words_unsigned)(b, rows, steps, weight, x, sums)
    acc = [list(sums) for _ in range(rows)]
    for k in range(steps):
        columns = x(k)
        for r in range(rows):
            w = weight(r, k)
            acc[r] = [_quads_vnni(b, a, w, v) if _VNNI else _quads_plain(b, a, w, v, signed) for a, v in zip(acc[r], columns, strict=True)]
    return acc


def _dot_words_unsigned(b: Builder, rows: int, steps: int, weight: Weight, x: Activations, sums: Sequence[Value]) -> list[list[Value]]:
    # the eight pair sums of a lane fit 16 bits (8 * 15 * 127 * 2 = 30480): one widening a block
    part: list[list[Value]] = [[] for _ in range(rows)]
    for k in range(steps):
        columns = x(k)
        for r in range(rows):
            w = weight(r, k)
            products = [_pairs_unsigned(b, w, v) for v in columns]
            part[r] = products if k == 0 else [b.add(p, m) for p, m in zip(part[r], products, strict=True)]
        if rows > 1:
            flat, n = _pin(b, [p for row in part for p in row]), len(sums)
            part = [flat[n * r : n * r + n] for r in range(rows)]
    return [[b.add(_widen(b, p), s) for p, s in zip(row, sums, strict=True)] for row in part]


def _dot_words_signed(b: Builder, rows: int, steps: int, weight: Weight, x: Activations, sums: Sequence[Value]) -> list[list[Value]]:
    acc = [list(sums) for _ in range(rows)]
    for k in range(steps):
        columns = x(k)
        for r in range(rows):
            w = weight(r, k)
            n, t = w.type.count, w.type
            size = call(b, f"llvm.abs.v{n}i8", t, [w, ir.Constant(ir.IntType(1), 0)])
            negative = b.icmp_signed("<", w, splat(I8, n, 0))
            for c, v in enumerate(columns):
                # |w| x (x with the sign of w): pair sums <= 2 * 128 * 127 fit 16 bits
                with_sign = b.select(negative, b.sub(splat(I8, n, 0), v), v)
                acc[r][c] = b.add(acc[r][c], _widen(b, _pairs_unsigned(b, size, with_sign)))
    return acc
