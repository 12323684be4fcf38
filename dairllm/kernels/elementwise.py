"""Ops that treat each value alone: copy, add, multiply, scale, the activations, and RMS norm's second half.

Each works on columns first..last of one row at an address; vectors of eight, then one by one. A value's bits do not
depend on which of the two computed it.
"""

from collections.abc import Callable
from typing import Any

from dairllm.kernels.ir import (
    F32,
    I32,
    V8,
    Builder,
    Value,
    broadcast,
    const,
    emit_exp,
    f32,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    splat,
    store,
    vec,
    void,
)

__all__ = ["add", "copy", "exp_one", "gelu", "gelu_multiply", "multiply", "norm", "scale", "silu", "silu_multiply"]

Emit = Callable[..., Value]


def _vectors_then_values(b: Builder, n: Value, emit: Callable[[Value, Value], None]) -> None:
    """emit(byte offset, vector type) over n floats."""
    vectors = b.lshr(n, k64(3))
    with for_range(b, vectors) as loop:
        emit(b.mul(loop.index, k64(32)), V8)
    done = b.shl(vectors, k64(3))
    with for_range(b, b.sub(n, done)) as loop:
        emit(b.mul(b.add(done, loop.index), k64(4)), vec(F32, 1))


def _map(compute: Emit, n_inputs: int, with_scalar: bool = False) -> Any:
    """(out, n, *inputs[, scalar]): out[i] = compute(inputs[i]..., scalar); out may be one of the inputs."""

    def emit(b: Builder, out: Value, n: Value, *values: Value) -> None:
        inputs, scalar = values[:n_inputs], values[n_inputs:]

        def step(offset: Value, t: Value) -> None:
            x = [load(b, b.add(p, offset), t) for p in inputs]  # weights in a file need not be aligned
            x += [broadcast(b, s, t.count) for s in scalar]
            store(b, compute(b, *x), b.add(out, offset), 4)

        _vectors_then_values(b, n, step)

    emit.__name__ = compute.__name__
    return ir_function(void, *[i64] * (2 + n_inputs), *([f32] if with_scalar else []))(emit)


def _splat(x: Value, v: float) -> Value:
    return splat(F32, x.type.count, v)


def _copy(b: Builder, x: Value) -> Value:
    return x


def _add(b: Builder, x: Value, y: Value) -> Value:
    return b.fadd(x, y)


def _multiply(b: Builder, x: Value, y: Value) -> Value:
    return b.fmul(x, y)


def _norm(b: Builder, x: Value, w: Value, inverse: Value) -> Value:
    """w * (x * inverse), each product rounded."""
    return b.fmul(w, b.fmul(x, inverse))


def _silu(b: Builder, x: Value) -> Value:
    """x / (1 + exp(-x)). Minus is 0 - x, so that -0 has a defined sign."""
    return b.fdiv(x, b.fadd(_splat(x, 1.0), emit_exp(b, b.fsub(_splat(x, 0.0), x))))


def _gelu(b: Builder, x: Value) -> Value:
    """0.5 x (1 + tanh(u)), u = sqrt(2 / pi) * x * (1 + 0.044715 x^2), as x / (1 + exp(-2u)), which is the same function with one exp."""
    u = b.fmul(b.fmul(_splat(x, 2 * 0.7978845608028654), x), b.fadd(_splat(x, 1.0), b.fmul(b.fmul(_splat(x, 0.044715), x), x)))
    return b.fdiv(x, b.fadd(_splat(x, 1.0), emit_exp(b, b.fsub(_splat(x, 0.0), u))))


def _silu_multiply(b: Builder, x: Value, y: Value) -> Value:
    return b.fmul(_silu(b, x), y)


def _gelu_multiply(b: Builder, x: Value, y: Value) -> Value:
    return b.fmul(_gelu(b, x), y)


copy = _map(_copy, 1)
add = _map(_add, 2)
multiply = _map(_multiply, 2)
scale = _map(_multiply, 1, with_scalar=True)
norm = _map(_norm, 2, with_scalar=True)
silu = _map(_silu, 1)
gelu = _map(_gelu, 1)
silu_multiply = _map(_silu_multiply, 2)
gelu_multiply = _map(_gelu_multiply, 2)


@ir_function(f32, f32)
def exp_one(b: Builder, x: Value) -> Value:
    return b.extract_element(emit_exp(b, broadcast(b, x, 1)), const(I32, 0))
