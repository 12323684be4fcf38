"""Half precision to float and back, rounding to nearest even: scales of blocks, rows of KV caches.

F16C has instructions for both. Without it LLVM would call functions that are not there, so the portable form does it
in integer arithmetic; the bits are the same.
"""

from llvmlite import ir

from dairllm.kernels import forms
from dairllm.kernels.ir import F16, F32, I16, I32, V8, Builder, Value, for_range, i64, ir_function, k64, load, store, vec, void

__all__ = ["emit_from_half", "emit_to_half", "halves_to_values", "values_to_halves"]

_NATIVE = forms.current() != "portable"


def _like(t: Value, of: Value) -> Value:
    return vec(t, of.count) if isinstance(of, ir.VectorType) else t


def _k(t: Value, v: float) -> Value:
    return ir.Constant(t, [v] * t.count) if isinstance(t, ir.VectorType) else ir.Constant(t, v)


def emit_from_half(b: Builder, h: Value) -> Value:
    """i16 bits (a scalar or a vector) -> F32."""
    wide, single = _like(I32, h.type), _like(F32, h.type)
    if _NATIVE:
        return b.fpext(b.bitcast(h, _like(F16, h.type)), single)
    bits = b.zext(h, wide)
    magnitude = b.shl(b.and_(bits, _k(wide, 0x7FFF)), _k(wide, 13))
    # 2^112 moves the exponent's bias from 15 to 127 and normalises what was subnormal
    value = b.bitcast(b.fmul(b.bitcast(magnitude, single), _k(single, 2.0**112)), wide)
    special = b.icmp_unsigned(">=", magnitude, _k(wide, 0x7C00 << 13))
    value = b.select(special, b.or_(magnitude, _k(wide, 0x7F800000)), value)
    return b.bitcast(b.or_(value, b.shl(b.and_(bits, _k(wide, 0x8000)), _k(wide, 16))), single)


def emit_to_half(b: Builder, f: Value) -> Value:
    """F32 (a scalar or a vector) -> i16 bits."""
    wide, short, single = _like(I32, f.type), _like(I16, f.type), f.type
    if _NATIVE:
        return b.bitcast(b.fptrunc(f, _like(F16, f.type)), short)
    bits = b.bitcast(f, wide)
    magnitude = b.and_(bits, _k(wide, 0x7FFFFFFF))
    sign = b.and_(b.lshr(bits, _k(wide, 16)), _k(wide, 0x8000))
    # normal: rebias, round by adding half a unit (less one where the last kept bit is even), drop 13 bits
    odd = b.and_(b.lshr(magnitude, _k(wide, 13)), _k(wide, 1))
    normal = b.lshr(b.add(b.add(magnitude, odd), _k(wide, 0xFFF - (112 << 23))), _k(wide, 13))
    # subnormal: adding 0.5 rounds at the last bit that a half has there
    half = b.bitcast(b.fadd(b.bitcast(magnitude, single), _k(single, 0.5)), wide)
    value = b.select(b.icmp_unsigned("<", magnitude, _k(wide, 0x38800000)), b.sub(half, _k(wide, 0x3F000000)), normal)
    value = b.select(b.icmp_unsigned(">=", magnitude, _k(wide, 0x47800000)), _k(wide, 0x7C00), value)
    value = b.select(b.icmp_unsigned(">", magnitude, _k(wide, 0x7F800000)), _k(wide, 0x7E00), value)
    return b.trunc(b.or_(value, sign), short)


@ir_function(void, i64, i64, i64)
def values_to_halves(b: Builder, x: Value, vectors: Value, halves: Value) -> None:
    """`vectors` times 8 values."""
    with for_range(b, vectors) as loop:
        v = load(b, b.add(x, b.mul(loop.index, k64(32))), V8, 4)
        store(b, emit_to_half(b, v), b.add(halves, b.mul(loop.index, k64(16))), 2)


@ir_function(void, i64, i64, i64)
def halves_to_values(b: Builder, halves: Value, vectors: Value, x: Value) -> None:
    with for_range(b, vectors) as loop:
        h = load(b, b.add(halves, b.mul(loop.index, k64(16))), vec(I16, 8), 2)
        store(b, emit_from_half(b, h), b.add(x, b.mul(loop.index, k64(32))), 4)
