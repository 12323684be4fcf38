"""Rotary position embedding, the KV cache and attention over it."""

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import FloatType, RopeType
from dairllm.kernels.reference.blocks import Floats, Row, cast, dequantize

__all__ = ["attention", "rope", "rope_frequencies", "rope_pairs", "rope_table", "shift"]


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float = 0.0,
    high_freq_factor: float = 0.0,
    orig_max_seq_len: int = 0,
) -> npt.NDArray[np.float64]:
    """Radians a position for each pair of a head: float64 [head_dim / 2], rescaled by Llama 3.1's rule where factor is not 1.

    The rule: a wave longer than the original context / low_freq_factor is slowed down by factor, one shorter than the original context /
    high_freq_factor is kept, in between it goes linearly.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if factor == 1:
        return frequency
    turns = orig_max_seq_len * frequency / (2 * np.pi)  # within the original context
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def rope_table(frequencies: npt.NDArray[np.floating], positions: npt.NDArray[np.integer]) -> Floats:
    """(cos, sin) of position * frequency: float32 [positions, head_dim / 2, 2]."""
    angle = np.asarray(positions)[:, None] * np.asarray(frequencies, np.float64)
    return np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)


def rope_pairs(n: int, head_dim: int, rope_type: RopeType) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Which columns of a row of n = heads * head_dim values turn together: (first, second, number of the pair in its head), each [n / 2].

    LLAMA and LLAMA3_1: neighbours, (2i, 2i + 1). FALCON: half a head apart, (j, j + head_dim / 2).
    """
    pair = np.arange(n // 2)
    head, i = pair // (head_dim // 2), pair % (head_dim // 2)
    if rope_type == RopeType.FALCON:
        first = head * head_dim + i
        return first, first + head_dim // 2, i
    return 2 * pair, 2 * pair + 1, i


def rope(x: Floats, table: Floats, rope_type: RopeType) -> Floats:
    """x float32 [rows, heads * head_dim], table float32 [rows, head_dim / 2, 2], the (cos, sin) of each row's position -> x turned."""
    first, second, pair = rope_pairs(x.shape[-1], 2 * table.shape[1], rope_type)
    cos, sin = (table[:, pair, i].astype(np.float64) for i in (0, 1))
    out = np.empty_like(x)
    out[:, first] = x[:, first] * cos - x[:, second] * sin
    out[:, second] = x[:, second] * cos + x[:, first] * sin
    return out


def shift(cache: Row, x: Floats, positions: npt.NDArray[np.integer], cache_type: FloatType = FloatType.F32) -> None:
    """Writes x float32 [rows, kv_dim] into a cache [seq_len, kv_dim values or blocks' bytes] at the rows' positions."""
    with np.errstate(over="ignore"):  # to half precision: infinite
        cache[positions] = x.astype(np.float16) if cache_type == FloatType.F16 else cast(x, FloatType.F32, cache_type)


def attention(
    q: Floats,
    keys: Row,
    values: Row,
    positions: npt.NDArray[np.integer],
    head_dim: int,
    group: int,
    cache_type: FloatType = FloatType.F32,
) -> Floats:
    """softmax(q . k / sqrt(head_dim)) times v, over positions 0..positions[b].

    q float32 [rows, heads * head_dim]; keys, values [seq_len, kv heads * head_dim], float32, float16 or uint8 blocks as cache_type
    says, which count as their values; query head h uses KV head h // group. Returns float32 [rows, heads * head_dim].
    """
    keys, values = dequantize(cache_type, keys), dequantize(cache_type, values)
    out = np.empty_like(q)
    for b, position in enumerate(positions):
        k, v = (cache[: position + 1].astype(np.float64) for cache in (keys, values))
        for head in range(q.shape[1] // head_dim):
            mine = slice(head * head_dim, (head + 1) * head_dim)
            shared = slice(head // group * head_dim, (head // group + 1) * head_dim)
            score = k[:, shared] @ q[b, mine].astype(np.float64) / np.sqrt(head_dim)
            weight = np.exp(score - score.max())
            out[b, mine] = weight @ v[:, shared] / weight.sum()
    return out
