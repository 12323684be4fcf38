"""LLVM IR by hand: what the kernels are written in where numba's scalar loops do not become vectors.

An *emitter* is a Python function that takes an ``ir.IRBuilder`` and values and appends instructions; `ir_function`
makes one callable from kernels. Addresses are int64. Vectors of floats have 8 lanes everywhere: the order of
sums is defined by lanes (docs/arithmetic.md), not by the width of a register. No fast-math flag is ever set, so LLVM
keeps that order, and neither fuses nor splits a multiply and an add.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "F16",
    "F32",
    "I8",
    "I16",
    "I32",
    "I64",
    "LANES",
    "V8",
    "VOID",
    "Builder",
    "Value",
    "at",
    "broadcast",
    "call",
    "concat",
    "const",
    "emit_exp",
    "f32",
    "float_zero",
    "fma",
    "fold_eight",
    "for_range",
    "halves",
    "i64",
    "ir_function",
    "k64",
    "lane_sum",
    "load",
    "load_f",
    "load_i",
    "prefetch",
    "shuffle",
    "splat",
    "store",
    "store_f",
    "store_i",
    "to_integer",
    "tree_max",
    "tree_sum",
    "tree_sum_of",
    "var",
    "vec",
    "void",
]

Builder = Any
Value = Any

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()
LANES = 8
V8 = ir.VectorType(F32, LANES)

i64, f32, void = types.int64, types.float32, types.void


def vec(t: Value, n: int) -> Value:
    return ir.VectorType(t, n)


def const(t: Value, v: Any) -> Value:
    return ir.Constant(t, v)


def k64(v: int) -> Value:
    return ir.Constant(I64, v)


def splat(t: Value, n: int, v: Any) -> Value:
    return ir.Constant(vec(t, n), [v] * n)


def float_zero(n: int = LANES) -> Value:
    return splat(F32, n, 0.0)


def call(b: Builder, name: str, returns: Value, args: Sequence[Value]) -> Value:
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, [a.type for a in args]), name), args)


def at(b: Builder, address: Value, offset: int) -> Value:
    return b.add(address, k64(offset)) if offset else address


def load(b: Builder, address: Value, t: Value, align: int = 1) -> Value:
    r = b.load(b.inttoptr(address, t.as_pointer()))
    r.align = align
    return r


def store(b: Builder, v: Value, address: Value, align: int = 1) -> None:
    b.store(v, b.inttoptr(address, v.type.as_pointer())).align = align


def prefetch(b: Builder, address: Value) -> None:
    """Read-ahead into every cache level. Beyond the end of a mapping it is harmless: a prefetch never faults."""
    call(b, "llvm.prefetch.p0", VOID, [b.inttoptr(address, I8.as_pointer()), const(I32, 0), const(I32, 3), const(I32, 1)])


def shuffle(b: Builder, x: Value, y: Value, mask: Iterable[int]) -> Value:
    lanes = list(mask)
    return b.shuffle_vector(x, y, ir.Constant(vec(I32, len(lanes)), lanes))


def concat(b: Builder, x: Value, y: Value) -> Value:
    return shuffle(b, x, y, range(2 * x.type.count))


def halves(b: Builder, x: Value) -> tuple[Value, Value]:
    n = x.type.count
    return shuffle(b, x, x, range(n // 2)), shuffle(b, x, x, range(n // 2, n))


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    t = x.type
    return call(b, f"llvm.fma.v{t.count}f32" if isinstance(t, ir.VectorType) else "llvm.fma.f32", t, [x, y, z])


def broadcast(b: Builder, scalar: Value, n: int = LANES) -> Value:
    v = b.insert_element(ir.Constant(vec(scalar.type, n), ir.Undefined), scalar, const(I32, 0))
    return shuffle(b, v, v, [0] * n)


def var(b: Builder, t: Value, value: Value | None = None) -> Value:
    """A stack slot that LLVM turns into registers."""
    p = cgutils.alloca_once(b, t)
    if value is not None:
        b.store(value, p)
    return p


def for_range(b: Builder, count: Value) -> Any:
    return cgutils.for_range(b, count, intp=I64)


def lane_sum(b: Builder, v: Value, add: Callable[[Value, Value], Value]) -> Value:
    """Lanes of v folded by halves: i + (i + n/2), until one is left."""
    while v.type.count > 1:
        v = add(*halves(b, v))
    return b.extract_element(v, const(I32, 0))


def fold_eight(b: Builder, vectors: Sequence[Value], op: Callable[[Value, Value], Value]) -> Value:
    """Eight vectors of eight lanes -> lane i: those of vectors[i], folded as `lane_sum` does.

    Two vectors at a time; so paired, they end in order and no step but the first crosses the halves of a register.
    """

    def folded(x: Value, y: Value, low: tuple[int, ...], high: tuple[int, ...]) -> Value:
        return op(shuffle(b, x, y, low), shuffle(b, x, y, high))

    fours = [folded(vectors[i], vectors[i + 4], (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)) for i in range(4)]
    pairs = [folded(fours[i], fours[i + 1], (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)) for i in (0, 2)]
    return folded(pairs[0], pairs[1], (0, 2, 8, 10, 4, 6, 12, 14), (1, 3, 9, 11, 5, 7, 13, 15))


def tree_sum(b: Builder, v: Value) -> Value:
    """The sum over lanes in the defined order; for eight: ((0+4)+(2+6)) + ((1+5)+(3+7))."""
    return lane_sum(b, v, b.fadd)


def tree_sum_of(b: Builder, values: Sequence[Value]) -> Value:
    """The same tree over a list."""
    while len(values) > 1:
        half = len(values) // 2
        values = [b.fadd(values[i], values[i + half]) for i in range(half)]
    return values[0]


def tree_max(b: Builder, v: Value) -> Value:
    return lane_sum(b, v, lambda x, y: b.select(b.fcmp_ordered(">", x, y), x, y))


def emit_exp(b: Builder, x: Value) -> Value:
    """exp of a vector of F32, relative error about 1e-7; exactly 0 below -87.3, saturated above 88.3.

    Cody and Waite's reduction with ln 2 in two parts and the minimax polynomial of Cephes' expf; every step rounds as
    written (docs/arithmetic.md).
    """
    n = x.type.count

    def s(value: float) -> Value:
        return splat(F32, n, value)

    low = b.fcmp_ordered("<", x, s(-87.3))
    x = b.select(low, s(-87.3), x)
    x = b.select(b.fcmp_ordered(">", x, s(88.3)), s(88.3), x)
    # to the nearest integer, ties to even: adding 1.5 * 2^23 leaves it in the low bits, on any processor
    magic = b.fadd(b.fmul(x, s(1.4426950216293335)), s(12582912.0))
    k = b.fsub(magic, s(12582912.0))
    r = fma(b, k, s(-0.693359375), x)
    r = fma(b, k, s(2.12194440e-4), r)
    p = s(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(b, p, r, s(c))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), s(1.0))
    exponent = b.sub(b.bitcast(magic, vec(I32, n)), splat(I32, n, 0x4B400000 - 127))
    scale = b.bitcast(b.shl(exponent, splat(I32, n, 23)), x.type)
    return b.select(low, s(0.0), b.fmul(p, scale))


def ir_function(returns: Any, *arg_types: Any) -> Callable[[Callable[..., Value]], Any]:
    """Decorator: an emitter ``f(b, *values)`` becomes callable from kernels with these numba types."""

    def wrap(emit: Callable[..., Value]) -> Any:
        def typed(*_: Any) -> tuple[Any, Any]:
            def codegen(context: Any, builder: Builder, signature: Any, values: Sequence[Value]) -> Value:
                r = emit(builder, *values)
                return context.get_dummy_value() if returns is types.void else r

            return returns(*arg_types), codegen

        # numba reads the number of parameters off the function itself
        by_arity: list[Callable[..., Any]] = [
            lambda context: typed(),
            lambda context, a: typed(),
            lambda context, a, c: typed(),
            lambda context, a, c, d: typed(),
            lambda context, a, c, d, e: typed(),
            lambda context, a, c, d, e, f: typed(),
            lambda context, a, c, d, e, f, g: typed(),
            lambda context, a, c, d, e, f, g, h: typed(),
            lambda context, a, c, d, e, f, g, h, i: typed(),
        ]
        function = by_arity[len(arg_types)]
        function.__name__ = emit.__name__
        return intrinsic(function)

    return wrap


@ir_function(f32, i64)
def load_f(b: Builder, p: Value) -> Value:
    return load(b, p, F32, 4)


@ir_function(void, i64, f32)
def store_f(b: Builder, p: Value, v: Value) -> None:
    store(b, v, p, 4)


@ir_function(i64, i64)
def load_i(b: Builder, p: Value) -> Value:
    return load(b, p, I64, 8)


@ir_function(void, i64, i64)
def store_i(b: Builder, p: Value, v: Value) -> None:
    store(b, v, p, 8)


@ir_function(i64, f32)
def to_integer(b: Builder, v: Value) -> Value:
    """Towards 0. NaN is 0, and what no int64 can be the nearest that is: `int` leaves those undefined."""
    return call(b, "llvm.fptosi.sat.i64.f32", I64, [v])
