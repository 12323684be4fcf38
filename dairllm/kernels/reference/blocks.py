"""Blocks of 32 values and what moves values between types: quantize, dequantize, cast, repeat_z.

Q40: 18 bytes, f16 scale d, then 16 bytes; byte j holds value j in its low nibble, value j + 16 in its high one; value = (nibble - 8) * d.
Q80: 34 bytes, f16 scale d, then 32 int8; value = q * d.

A row of n values is float32 [n], or uint8 [n / 32 * block bytes]; all functions take any number of leading axes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import BLOCK_VALUES, FloatType

__all__ = ["Floats", "Row", "cast", "dequantize", "quantize_q80", "repeat_z", "split_blocks"]

Floats = npt.NDArray[np.float32]
Row = npt.NDArray[Any]
"""float32 values or uint8 blocks, as the float type beside it says."""

_BLOCK_BYTES = {FloatType.Q40: 18, FloatType.Q80: 34}


def quantize_q80(x: Floats) -> npt.NDArray[np.uint8]:
    """float32 [..., n] -> Q80 blocks, uint8 [..., n / 32 * 34].

    d = max|x| / 127; q = x * (1 / d) to the nearest integer, ties to even, with d as it is before it is stored in half precision.
    Where d is zero, so small that 1 / d is infinite, or infinite itself, every q is 0. Of a block with a NaN d is NaN and every q 0.
    """
    values = np.asarray(x, np.float32)
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK_VALUES)
    out = np.empty((*blocks.shape[:-1], 34), np.uint8)
    with np.errstate(all="ignore"):
        d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        inverse = np.float32(1) / d
        usable = np.isfinite(inverse) & np.isfinite(d)
        q = np.where(usable, np.rint(blocks * np.where(usable, inverse, np.float32(0))), np.float32(0))
        out[..., :2] = d.astype("<f2").view(np.uint8)
    out[..., 2:] = q.astype(np.int8).view(np.uint8)
    return out.reshape(*values.shape[:-1], -1)


def split_blocks(float_type: FloatType, raw: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int32], Floats]:
    """Q40 or Q80 bytes [..., n / 32 * block bytes] -> (the integers, int32 [..., blocks, 32], the scales, float32 [..., blocks])."""
    blocks = np.asarray(raw).reshape(*raw.shape[:-1], -1, _BLOCK_BYTES[float_type])
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
    data = blocks[..., 2:]
    if float_type == FloatType.Q40:
        return np.concatenate([data & 15, data >> 4], -1).astype(np.int32) - 8, scales
    return np.ascontiguousarray(data).view(np.int8).astype(np.int32), scales


def dequantize(float_type: FloatType, row: Row) -> Floats:
    """A row of any type -> float32 [..., n]; each value of a block is q * d, rounded once."""
    if float_type in (FloatType.F32, FloatType.F16):
        return np.asarray(row, np.float32)
    q, d = split_blocks(float_type, row)
    with np.errstate(all="ignore"):
        values = q.astype(np.float32) * d[..., None]
    return values.reshape(*row.shape[:-1], -1)


def cast(row: Row, source: FloatType, target: FloatType) -> Row:
    """F32 or Q80 -> F32 or Q80: a copy where the types are equal.

    Raises:
        ValueError: another type.
    """
    if {source, target} - {FloatType.F32, FloatType.Q80}:
        raise ValueError(f"cast: {source.name} to {target.name}; only F32 and Q80 are cast")
    if source == target:
        return row.copy()
    return quantize_q80(row) if target == FloatType.Q80 else dequantize(source, row)


def repeat_z(row: Row, source: FloatType, target: FloatType, planes: int) -> Row:
    """[...] -> [planes, ...]: the row, cast once, in each plane."""
    return np.repeat(cast(row, source, target)[None], planes, 0)
