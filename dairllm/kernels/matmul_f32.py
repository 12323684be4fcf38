"""F32 weights times F32 activations, and sums of squares.

The order of sums (docs/arithmetic.md): acc[i mod 16] = fma(w[i], x[i], acc[i mod 16]), a row being padded with zeros
to a multiple of 16, then halves: i + 8, + 4, + 2, + 1.
"""

from collections.abc import Sequence

from llvmlite import ir
from numba.core import cgutils

from dairllm.kernels.ir import (
    F32,
    I64,
    V8,
    Builder,
    Value,
    at,
    f32,
    float_zero,
    fma,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    prefetch,
    store,
    store_f,
    tree_sum,
    var,
    void,
)
from dairllm.kernels.kernel import kernel
from dairllm.kernels.matmul_row import PREFETCH_BYTES

__all__ = ["emit_dot_products", "matmul_f32", "sum_squares"]

_COLUMNS = 4  # rows of the batch that share one reading of a weight row


def _copy_tail(b: Builder, source: Value, count: Value) -> Value:
    """The last `count` < 16 values of a row, followed by zeros, on the stack."""
    copy = cgutils.alloca_once(b, ir.ArrayType(F32, 16))
    copy.align = 32
    address = b.ptrtoint(copy, I64)
    store(b, float_zero(), address, 32)
    store(b, float_zero(), at(b, address, 32), 32)
    with for_range(b, count) as loop:
        o = b.mul(loop.index, k64(4))
        store(b, load(b, b.add(source, o), F32), b.add(address, o), 4)
    return address


def emit_dot_products(b: Builder, w: Value, xs: Sequence[Value], n: Value) -> list[Value]:
    """Dot products of one weight row with several rows, n values each."""
    acc = [[var(b, V8, float_zero()) for _ in range(2)] for _ in xs]

    def step(weights: Value, rows: Sequence[Value]) -> None:
        for i in range(2):
            v = load(b, at(b, weights, 32 * i), V8)  # weights in a file need not be aligned
            for row, sums in zip(rows, acc, strict=True):
                b.store(fma(b, v, load(b, at(b, row, 32 * i), V8, 4), b.load(sums[i])), sums[i])

    with for_range(b, b.lshr(n, k64(4))) as loop:
        o = b.mul(loop.index, k64(64))
        prefetch(b, at(b, b.add(w, o), PREFETCH_BYTES))
        step(b.add(w, o), [b.add(x, o) for x in xs])
    rest = b.and_(n, k64(15))
    with b.if_then(b.icmp_unsigned("!=", rest, k64(0))):
        o = b.mul(b.sub(n, rest), k64(4))
        step(_copy_tail(b, b.add(w, o), rest), [_copy_tail(b, b.add(x, o), rest) for x in xs])
    return [tree_sum(b, b.fadd(b.load(low), b.load(high))) for low, high in acc]


@ir_function(f32, i64, i64, i64)
def _dot(b: Builder, w: Value, x: Value, n: Value) -> Value:
    return emit_dot_products(b, w, [x], n)[0]


@ir_function(void, i64, i64, i64, i64, i64, i64)
def _dot_columns(b: Builder, w: Value, x: Value, x_stride: Value, n: Value, out: Value, out_stride: Value) -> None:
    rows = [b.add(x, b.mul(x_stride, k64(c))) for c in range(_COLUMNS)]
    for c, v in enumerate(emit_dot_products(b, w, rows, n)):
        store(b, v, b.add(out, b.mul(out_stride, k64(c))), 4)


@ir_function(f32, i64, i64)
def sum_squares(b: Builder, x: Value, n: Value) -> Value:
    return emit_dot_products(b, x, [x], n)[0]


@kernel
def matmul_f32(out, out_stride, x, x_stride, n_rows, weights, row_stride, n, first, last):
    """out[row][first..last] = weight rows times n_rows rows of x."""
    for r in range(first, last):
        w = weights + r * row_stride
        m = 0
        while m + _COLUMNS <= n_rows:
            _dot_columns(w, x + m * x_stride, x_stride, n, out + m * out_stride + 4 * r, out_stride)
            m += _COLUMNS
        while m < n_rows:
            store_f(out + m * out_stride + 4 * r, _dot(w, x + m * x_stride, n))
            m += 1
