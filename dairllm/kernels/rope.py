"""Rotary position embedding in place: pairs of a head turned by the angle of their position.

z0 = x0 * c - x1 * s, z1 = x1 * c + x0 * s, each product and sum rounded. The table holds (cos, sin) pairs, [position][head_dim / 2][2].
"""

from llvmlite import ir

from dairllm.kernels.ir import (
    V8,
    Builder,
    Value,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    load_f,
    shuffle,
    store,
    store_f,
    void,
)
from dairllm.kernels.kernel import kernel

__all__ = ["rotate_halves", "rotate_neighbours"]


@ir_function(void, i64, i64, i64)
def _rotate_vectors(b: Builder, x: Value, table: Value, vectors: Value) -> None:
    """Four neighbouring pairs a vector."""
    signs = ir.Constant(V8, [-1.0, 1.0] * 4)
    with for_range(b, vectors) as loop:
        o = b.mul(loop.index, k64(32))
        v, t = load(b, b.add(x, o), V8, 4), load(b, b.add(table, o), V8, 4)
        c, s = shuffle(b, t, t, (0, 0, 2, 2, 4, 4, 6, 6)), shuffle(b, t, t, (1, 1, 3, 3, 5, 5, 7, 7))
        other = shuffle(b, v, v, (1, 0, 3, 2, 5, 4, 7, 6))
        store(b, b.fadd(b.fmul(v, c), b.fmul(other, b.fmul(s, signs))), b.add(x, o), 4)


@kernel
def rotate_neighbours(x, table, head_dim, first, last):
    """LLAMA: pairs (2i, 2i + 1). Columns first..last of a row of heads, first even; `table` is the position's row."""
    c = first
    while c < last:
        d = c % head_dim
        run = min(head_dim - d, last - c)
        _rotate_vectors(x + 4 * c, table + 4 * d, run // 8)
        for i in range(run // 8 * 8, run, 2):
            p, t = x + 4 * (c + i), table + 4 * (d + i)
            x0, x1, cos, sin = load_f(p), load_f(p + 4), load_f(t), load_f(t + 4)
            store_f(p, x0 * cos - x1 * sin)
            store_f(p + 4, x1 * cos + x0 * sin)
        c += run


@kernel
def rotate_halves(x, table, head_dim):
    """FALCON: pairs (j, j + head_dim / 2) of one head at x."""
    half = head_dim // 2
    for j in range(half):
        p, q, t = x + 4 * j, x + 4 * (j + half), table + 8 * j
        x0, x1, cos, sin = load_f(p), load_f(q), load_f(t), load_f(t + 4)
        store_f(p, x0 * cos - x1 * sin)
        store_f(q, x1 * cos + x0 * sin)
