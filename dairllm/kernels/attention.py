"""Attention over a KV cache laid out [kv head][position][head_dim], F32, F16 or Q80 blocks, positions padded to whole chunks.

The order (docs/arithmetic.md): chunks of CHUNK positions; within a chunk scores q.k by acc[i mod 8], times 1 /
sqrt(head_dim); the chunk's maximum; e = exp(score - maximum), their sum by acc[position mod 8]; out[d] = fma(e, v[d],
out[d]) in position order. Chunks are then folded in order by their maxima. So neither the number of threads nor the
batch changes a bit. The query heads that share a KV head are computed together, and K or V of a chunk fits the
first-level cache. A cache of another type than F32 is read as its values: a chunk is converted into a thread's own memory
and then goes the same way.
"""

from typing import Any

import numpy as np

from dairllm.graph.types import FloatType
from dairllm.kernels.elementwise import exp_one
from dairllm.kernels.half import halves_to_values
from dairllm.kernels.ir import (
    F32,
    V8,
    Builder,
    Value,
    at,
    broadcast,
    emit_exp,
    f32,
    float_zero,
    fma,
    fold_eight,
    for_range,
    i64,
    ir_function,
    k64,
    load,
    load_f,
    prefetch,
    splat,
    store,
    store_f,
    tree_max,
    tree_sum,
    var,
    void,
)
from dairllm.kernels.kernel import kernel
from dairllm.kernels.quantize import blocks_to_values
from dairllm.kernels.sizes import CHUNK

__all__ = ["attend_chunk", "fold_head"]

F16, Q80 = int(FloatType.F16), int(FloatType.Q80)


@ir_function(void, i64, i64, i64, i64, f32)
def _score_eight(b: Builder, q: Value, k: Value, head_bytes: Value, out: Value, scale: Value) -> None:
    """out[8 positions] = q . k[position] * scale, of one head. More heads at a time have no register for what they share."""
    keys = [b.add(k, b.mul(head_bytes, k64(p))) for p in range(8)]
    acc = [var(b, V8, float_zero()) for _ in keys]
    with for_range(b, b.lshr(head_bytes, k64(5))) as loop:
        o = b.mul(loop.index, k64(32))
        x = load(b, b.add(q, o), V8, 4)
        for key, total in zip(keys, acc, strict=True):
            b.store(fma(b, x, load(b, b.add(key, o), V8, 4), b.load(total)), total)

    scores = fold_eight(b, [b.load(total) for total in acc], b.fadd)
    store(b, b.fmul(scores, broadcast(b, scale)), out, 4)


@ir_function(f32, i64, i64)
def _vector_max(b: Builder, p: Value, vectors: Value) -> Value:
    m = var(b, V8, splat(F32, 8, float("-inf")))
    with for_range(b, vectors) as loop:
        v, old = load(b, b.add(p, b.mul(loop.index, k64(32))), V8, 4), b.load(m)
        b.store(b.select(b.fcmp_ordered(">", v, old), v, old), m)
    return tree_max(b, b.load(m))


@ir_function(f32, i64, i64, f32)
def _vector_exp(b: Builder, p: Value, vectors: Value, top: Value) -> Value:
    """p = exp(p - top) in place; returns the sum."""
    total, tops = var(b, V8, float_zero()), broadcast(b, top)
    with for_range(b, vectors) as loop:
        a = b.add(p, b.mul(loop.index, k64(32)))
        e = emit_exp(b, b.fsub(load(b, a, V8, 4), tops))
        store(b, e, a, 4)
        b.store(b.fadd(b.load(total), e), total)
    return tree_sum(b, b.load(total))


def _value_tile(heads: int, vectors: int) -> Any:
    @ir_function(void, i64, i64, i64, i64, i64, i64)
    def value_tile(b: Builder, weights: Value, weight_stride: Value, v: Value, head_bytes: Value, count: Value, out: Value) -> None:
        """out[head][:8 * vectors] = sum over positions of weight[head][position] * v[position][:8 * vectors]"""
        acc = [[var(b, V8, float_zero()) for _ in range(vectors)] for _ in range(heads)]
        with for_range(b, count) as loop:
            p = b.add(v, b.mul(loop.index, head_bytes))
            vs = [load(b, at(b, p, 32 * i), V8, 4) for i in range(vectors)]
            for h in range(heads):
                w = broadcast(b, load(b, b.add(b.add(weights, b.mul(weight_stride, k64(h))), b.mul(loop.index, k64(4))), F32, 4))
                for i in range(vectors):
                    b.store(fma(b, w, vs[i], b.load(acc[h][i])), acc[h][i])
        for h in range(heads):
            for i in range(vectors):
                store(b, b.load(acc[h][i]), b.add(b.add(out, b.mul(head_bytes, k64(h))), k64(32 * i)), 4)

    return value_tile


_value_1, _value_2, _value_3, _value_4 = _value_tile(1, 8), _value_tile(2, 4), _value_tile(3, 2), _value_tile(4, 2)
_value_narrow = _value_tile(1, 1)


@ir_function(void, i64, i64, i64, i64, i64, f32, i64)
def _fold_chunks(
    b: Builder, part: Value, part_stride: Value, coefficients: Value, chunks: Value, vectors: Value, inverse: Value, out: Value
) -> None:
    """out[:] = inverse * sum over chunks of coefficient[chunk] * part[chunk][:]"""
    acc = var(b, V8)
    with for_range(b, vectors) as loop:
        b.store(float_zero(), acc)
        o = b.mul(loop.index, k64(32))
        with for_range(b, chunks) as c:
            w = broadcast(b, load(b, b.add(coefficients, b.mul(c.index, k64(4))), F32, 4))
            b.store(fma(b, w, load(b, b.add(b.add(part, o), b.mul(part_stride, c.index)), V8, 4), b.load(acc)), acc)
        store(b, b.fmul(b.load(acc), broadcast(b, inverse)), b.add(out, o), 4)


_AHEAD_BYTES = 4096
"""How far ahead of their use keys are asked for."""


@ir_function(void, i64, i64)
def _ask_for(b: Builder, p: Value, n_bytes: Value) -> None:
    with for_range(b, b.lshr(n_bytes, k64(6))) as loop:
        prefetch(b, b.add(p, b.mul(loop.index, k64(64))))


@ir_function(f32, f32, f32, f32)
def _fma_one(b: Builder, x: Value, y: Value, z: Value) -> Value:
    return fma(b, x, y, z)


_NEG_INF = np.float32(-np.inf)


@kernel
def _score_chunk(q, keys, head_bytes, heads, count, scale, scores, stats):
    """scores[head][position] = exp(score - maximum), stats[head] = (maximum, sum). Keys are read up to the next multiple of 8 positions."""
    stride, vectors = CHUNK * 4, (count + 7) // 8
    for p in range(0, 8 * vectors, 8):
        _ask_for(keys + p * head_bytes + _AHEAD_BYTES, 8 * head_bytes)
        for h in range(heads):
            _score_eight(q + h * head_bytes, keys + p * head_bytes, head_bytes, scores + h * stride + 4 * p, scale)
    for h in range(heads):
        s = scores + h * stride
        for p in range(count, vectors * 8):
            store_f(s + 4 * p, _NEG_INF)  # lanes beyond the last position
        top = _vector_max(s, vectors)
        store_f(stats + 8 * h, top)
        store_f(stats + 8 * h + 4, _vector_exp(s, vectors, top))


@kernel
def _weigh_chunk(scores, values, head_bytes, heads, count, out):
    """out[head][head_dim] = sum over positions of score * value."""
    stride = CHUNK * 4
    h = 0
    while h < heads:
        left = heads - h
        s, o = scores + h * stride, out + h * head_bytes
        taken = min(left, 4)
        step = 256 if taken == 1 else 128 if taken == 2 else 64
        d = 0
        while d + step <= head_bytes:
            if taken == 4:
                _value_4(s, stride, values + d, head_bytes, count, o + d)
            elif taken == 3:
                _value_3(s, stride, values + d, head_bytes, count, o + d)
            elif taken == 2:
                _value_2(s, stride, values + d, head_bytes, count, o + d)
            else:
                _value_1(s, stride, values + d, head_bytes, count, o + d)
            d += step
        for i in range(taken):
            for e in range(d, head_bytes, 32):
                _value_narrow(s + i * stride, stride, values + e, head_bytes, count, o + i * head_bytes + e)
        h += taken


@kernel
def _count(positions, row, first):
    """How many positions of the chunk that begins at `first` a row attends to; none is 0 or less."""
    return min(int(load_f(positions + 4 * row)) + 1 - first, CHUNK)


@kernel
def _as_values(cache, cache_type, count, head_bytes, room):
    """Address of `count` positions' rows as F32: where they lie, or in `room`, as which they are read."""
    if cache_type == Q80:
        blocks_to_values(cache, 0, count * (head_bytes // 128), room)
        return room
    if cache_type == F16:
        halves_to_values(cache, count * (head_bytes // 32), room)
        return room
    return cache


@kernel
def attend_chunk(
    q, q_row, rows, positions, keys, values, cache_type, first, head_bytes, heads, scale, scores, room, out, out_row, stats, stats_row
):
    """One KV head's chunk of positions from `first` on, for `rows` rows and the `heads` query heads that use it.

    A row that attends to any of them gets out[head][head_dim] and stats[head] = (maximum, sum). Several rows share what
    is brought into the cache and turned into values.

    scores: CHUNK floats a row and head; room: CHUNK rows of a head. head_dim is a multiple of 8, for blocks of 32.
    """
    most = 0
    for i in range(rows):
        most = max(most, _count(positions, i, first))
    row_scores = heads * CHUNK * 4
    k = _as_values(keys, cache_type, most, head_bytes, room)
    for i in range(rows):
        count = _count(positions, i, first)
        if count > 0:
            _score_chunk(q + i * q_row, k, head_bytes, heads, count, scale, scores + i * row_scores, stats + i * stats_row)
    v = _as_values(values, cache_type, most, head_bytes, room)
    for i in range(rows):
        count = _count(positions, i, first)
        if count > 0:
            _weigh_chunk(scores + i * row_scores, v, head_bytes, heads, count, out + i * out_row)


@kernel
def fold_head(parts, part_stride, stats, stats_stride, chunks, head_bytes, coefficients, out):
    """The chunks of one query head -> its attention output. coefficients: scratch of `chunks` floats."""
    top = _NEG_INF
    for c in range(chunks):
        top = max(top, load_f(stats + c * stats_stride))
    total = np.float32(0)
    for c in range(chunks):
        w = exp_one(load_f(stats + c * stats_stride) - top)
        store_f(coefficients + 4 * c, w)
        total = _fma_one(w, load_f(stats + c * stats_stride + 4), total)
    _fold_chunks(parts, part_stride, coefficients, chunks, head_bytes // 32, np.float32(1) / total, out)
