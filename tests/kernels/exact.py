"""docs/arithmetic.md as a program: float32 operations one by one in the defined order, with an fma that rounds once. Slow and exact.

The functions have the names and arguments of dairllm.kernels.reference, so that whatever runs on one runs on the other. What that package
does not sum, but computes by the definition's own operations, is taken from it.
"""

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import FloatType, RopeType
from dairllm.kernels.reference import (
    Floats,
    Row,
    cast,
    dequantize,
    embedding,
    merge_add,
    merge_sum,
    mul,
    quantize_q80,
    repeat_z,
    rms_norm,
    rope_pairs,
    scale,
    shift,
    split_blocks,
)

__all__ = [
    "attention",
    "cast",
    "dequantize",
    "embedding",
    "exp",
    "expert_matmul",
    "fma",
    "fold_halves",
    "gelu",
    "inv_rms",
    "matmul",
    "merge_add",
    "merge_sum",
    "moe_gate",
    "mul",
    "quantize_q80",
    "repeat_z",
    "rms_norm",
    "rope",
    "scale",
    "shift",
    "silu",
    "softmax",
]

CHUNK = 64
_F = np.float32


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> Floats:
    """a * b + c of float32 arrays, rounded once to float32.

    The product of two float32 is exact in float64. Its sum with c is not; but when that is rounded to odd (where inexact, to the neighbour
    whose last bit is 1), rounding it once more to float32 gives what a single rounding would: float64 has more than two further bits, and
    the last of them says on which side of a float32 midpoint the exact sum lies.
    """
    a, b, c = (np.asarray(v, np.float32).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        product = a * b
        total = product + c
        # Knuth's two-sum: total + error is exact
        part = total - product
        error = (product - (total - part)) + (c - part)
        bits = np.atleast_1d(total).view(np.int64)
        error = np.atleast_1d(error)
        fix = (error != 0) & np.isfinite(error) & np.isfinite(bits.view(np.float64)) & (bits & 1 == 0)
        away = (error > 0) == (bits >= 0)  # the exact sum lies further from zero
        odd = np.where(fix, bits + np.where(away, 1, -1), bits).view(np.float64)
        return odd.reshape(np.shape(total)).astype(np.float32)


def fold_halves(acc: Floats) -> Floats:
    """Sum over the last axis, of 2^k values, by halves: i + n / 2, ..., + 2, + 1."""
    with np.errstate(all="ignore"):
        while acc.shape[-1] > 1:
            half = acc.shape[-1] // 2
            acc = acc[..., :half] + acc[..., half:]
    return acc[..., 0]


def _padded(x: Floats, multiple: int) -> Floats:
    """The last axis filled with zeros to a multiple."""
    missing = -x.shape[-1] % multiple
    return np.concatenate([x, np.zeros((*x.shape[:-1], missing), np.float32)], -1) if missing else x


def _dot(a: Floats, b: Floats, lanes: int) -> Floats:
    """Dot products over the last axis (leading axes broadcast): acc[i mod lanes], then halves."""
    a, b = _padded(a, lanes), _padded(b, lanes)
    acc = np.zeros((*np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), lanes), np.float32)
    for i in range(0, a.shape[-1], lanes):
        acc = fma(a[..., i : i + lanes], b[..., i : i + lanes], acc)
    return fold_halves(acc)


def exp(x: Floats) -> Floats:
    """The polynomial of the definition."""
    x = np.asarray(x, np.float32)
    low = x < _F(-87.3)
    x = np.minimum(np.where(low, _F(-87.3), x), _F(88.3))
    k = np.rint(x * _F(1.4426950216293335))
    r = fma(k, _F(-0.693359375), x)
    r = fma(k, _F(2.12194440e-4), r)
    p: Floats = np.full_like(r, 1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, _F(coefficient))
    p = fma(p, r * r, r) + _F(1)
    return np.where(low, _F(0), np.ldexp(p, k.astype(np.int32))).astype(np.float32)


def matmul(weights: Row, weight_type: FloatType, x: Row, x_type: FloatType) -> Floats:
    if weight_type == FloatType.F32:
        return _dot(weights, dequantize(x_type, x)[..., None, :], 16)
    qx, dx = split_blocks(FloatType.Q80, quantize_q80(x) if x_type == FloatType.F32 else x)
    qw, dw = split_blocks(weight_type, weights)
    qx = np.maximum(qx, -127)
    acc = np.zeros((*x.shape[:-1], weights.shape[0], 8), np.float32)
    with np.errstate(all="ignore"):
        for b in range(dw.shape[-1]):
            integer = qx[..., b, :] @ qw[:, b].T
            acc[..., b % 8] = fma(integer.astype(np.float32), dx[..., b, None] * dw[:, b], acc[..., b % 8])
    return fold_halves(acc)


def expert_matmul(weights: Row, weight_type: FloatType, x: Row, x_type: FloatType, active: npt.NDArray[np.integer]) -> Floats:
    planes, rows = x.shape[:2]
    out = np.empty((planes, rows, weights.shape[1]), np.float32)
    for e in range(planes):
        for b in range(rows):
            out[e, b] = matmul(weights[active[b, e]], weight_type, x[e, b], x_type)
    return out


def inv_rms(x: Floats, epsilon: float, n_columns: int = 1) -> Floats:
    parts = x.reshape(*x.shape[:-1], n_columns, -1)
    out: Floats = _F(1) / np.sqrt(_dot(parts, parts, 16) / _F(parts.shape[-1]) + _F(epsilon))
    return out


def silu(x: Floats) -> Floats:
    return x / (_F(1) + exp(_F(0) - x))


def gelu(x: Floats) -> Floats:
    with np.errstate(over="ignore"):
        u = (_F(1.5957691216057308) * x) * (_F(1) + (_F(0.044715) * x) * x)
    return x / (_F(1) + exp(_F(0) - u))


def rope(x: Floats, table: Floats, rope_type: RopeType) -> Floats:
    first, second, pair = rope_pairs(x.shape[-1], 2 * table.shape[1], rope_type)
    cos, sin = table[:, pair, 0], table[:, pair, 1]
    out = np.empty_like(x)
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out


def attention(
    q: Floats,
    keys: Row,
    values: Row,
    positions: npt.NDArray[np.integer],
    head_dim: int,
    group: int,
    cache_type: FloatType = FloatType.F32,
) -> Floats:
    keys, values = dequantize(cache_type, keys), dequantize(cache_type, values)
    heads = q.shape[-1] // head_dim
    of_head = np.arange(heads) // group
    factor = _F(1) / np.sqrt(_F(head_dim))
    k = keys.reshape(len(keys), -1, head_dim)
    v = values.reshape(len(values), -1, head_dim)
    out = np.empty_like(q)
    for row, position in enumerate(positions):
        query = q[row].reshape(heads, 1, head_dim)
        tops, sums, parts = [], [], []
        for start in range(0, position + 1, CHUNK):
            stop = min(start + CHUNK, position + 1)
            score = _dot(query, k[start:stop, of_head].swapaxes(0, 1), 8) * factor  # [heads, positions]
            top = score.max(-1)
            e = exp(score - top[:, None])
            acc = np.zeros((heads, 8), np.float32)
            for p in range(stop - start):
                acc[:, p % 8] = acc[:, p % 8] + e[:, p]
            part = np.zeros((heads, head_dim), np.float32)
            for p in range(stop - start):
                part = fma(e[:, p, None], v[start + p, of_head], part)
            tops.append(top)
            sums.append(fold_halves(acc))
            parts.append(part)
        highest = np.max(tops, 0)
        total = np.zeros(heads, np.float32)
        result = np.zeros((heads, head_dim), np.float32)
        for top, chunk_sum, part in zip(tops, sums, parts, strict=True):
            w = exp(top - highest)
            total = fma(w, chunk_sum, total)
            result = fma(w[:, None], part, result)
        out[row] = (result * (_F(1) / total)[:, None]).reshape(-1)
    return out


def softmax(x: Floats) -> Floats:
    e = exp(x - x.max(-1, keepdims=True))
    out: Floats = e * (_F(1) / _sum_in_order(e))[..., None]
    return out


def moe_gate(x: Floats, k: int, normalise: bool) -> tuple[npt.NDArray[np.int64], Floats]:
    indexes = np.argsort(-x, -1, kind="stable")[:, :k].astype(np.int64)
    weights = np.take_along_axis(x, indexes, -1)
    return indexes, weights / _sum_in_order(weights)[:, None] if normalise else weights


def _sum_in_order(x: Floats) -> Floats:
    total = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):
        total = total + x[..., i]
    return total
