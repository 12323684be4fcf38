"""Numpy codecs of the block types: the definition of their bytes, and the oracle of the kernels that do the same faster.

32 values of a row make a block (distributed-llama's ``NnBlockQ40`` and ``NnBlockQ80``; the same bytes as GGML's Q4_0 and Q8_0)::

    Q40  18 bytes: f16 d, 16 bytes of which byte j holds value j in its low nibble and value j + 16 in its high nibble
         value = (nibble - 8) * d.    d = (value of largest magnitude, with its sign; the first of equals) / -8
         nibble = min(15, floor(x * (1 / d) + 8.5))
    Q80  34 bytes: f16 d, 32 int8
         value = q * d.               d = max |x| / 127,  q = x * (1 / d) rounded to nearest, ties to even

All arithmetic is float32. The inverse is taken of d as it is before its rounding to f16. A block whose d is zero, or too small to have an
inverse, is all zeros. Values that are not finite give blocks without meaning, never an error: who writes files checks them before.
"""

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import BLOCK_VALUES, FloatType, row_bytes

__all__ = ["dequantize", "dequantize_q40", "dequantize_q80", "q80_of_q40", "quantize", "quantize_q40", "quantize_q80"]

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

_HALF = BLOCK_VALUES // 2


def quantize_q40(x: FloatArray) -> ByteArray:
    """Q40 blocks of the rows of `x`.

    Args:
        x: float32 [..., n], n a multiple of 32.

    Returns:
        uint8 [..., n / 32 * 18].

    Raises:
        ValueError: n is not a whole number of blocks.
    """
    blocks = _blocks(x, FloatType.Q40)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1, keepdims=True), axis=-1)
    d = largest / np.float32(-8)
    with np.errstate(all="ignore"):
        scaled = blocks * _inverse(d)
        scaled += np.float32(8.5)
        nibbles = np.minimum(scaled, np.float32(15), out=scaled).astype(np.uint8)  # never negative: its floor is its integer part
    out = np.empty((*blocks.shape[:-1], row_bytes(FloatType.Q40, BLOCK_VALUES)), np.uint8)
    out[..., :2] = _half(d)
    np.left_shift(nibbles[..., _HALF:], 4, out=out[..., 2:])
    out[..., 2:] |= nibbles[..., :_HALF]
    return out.reshape(*x.shape[:-1], row_bytes(FloatType.Q40, x.shape[-1]))


def dequantize_q40(raw: ByteArray) -> FloatArray:
    """Values of Q40 rows: uint8 [..., blocks * 18] to float32 [..., blocks * 32].

    Raises:
        ValueError: the last axis is not a whole number of blocks.
    """
    blocks = _raw_blocks(raw, FloatType.Q40)
    out = np.empty((*blocks.shape[:-1], BLOCK_VALUES), np.float32)
    np.bitwise_and(blocks[..., 2:], 15, out=out[..., :_HALF], casting="unsafe")
    np.right_shift(blocks[..., 2:], 4, out=out[..., _HALF:], casting="unsafe")
    out -= np.float32(8)
    with np.errstate(invalid="ignore"):
        out *= _single(blocks)
    return out.reshape(*raw.shape[:-1], -1)


def quantize_q80(x: FloatArray) -> ByteArray:
    """Q80 blocks of the rows of `x`: float32 [..., n] to uint8 [..., n / 32 * 34].

    Raises:
        ValueError: n is not a whole number of blocks.
    """
    blocks = _blocks(x, FloatType.Q80)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
    out = np.empty((*blocks.shape[:-1], row_bytes(FloatType.Q80, BLOCK_VALUES)), np.uint8)
    out[..., :2] = _half(d)
    with np.errstate(all="ignore"):
        scaled = blocks * _inverse(d)
        out[..., 2:] = np.rint(scaled, out=scaled).astype(np.int8).view(np.uint8)
    return out.reshape(*x.shape[:-1], row_bytes(FloatType.Q80, x.shape[-1]))


def q80_of_q40(raw: ByteArray) -> ByteArray:
    """Q40 rows as Q80 rows of exactly the same values (the same d): uint8 [..., blocks * 18] to uint8 [..., blocks * 34].

    Raises:
        ValueError: the last axis is not a whole number of blocks.
    """
    blocks = _raw_blocks(raw, FloatType.Q40)
    out = np.empty((*blocks.shape[:-1], row_bytes(FloatType.Q80, BLOCK_VALUES)), np.uint8)
    out[..., :2] = blocks[..., :2]
    np.bitwise_and(blocks[..., 2:], 15, out=out[..., 2 : 2 + _HALF])
    np.right_shift(blocks[..., 2:], 4, out=out[..., 2 + _HALF :])
    out[..., 2:] -= 8  # wraps around, as int8 has it
    return out.reshape(*raw.shape[:-1], -1)


def dequantize_q80(raw: ByteArray) -> FloatArray:
    """Values of Q80 rows: uint8 [..., blocks * 34] to float32 [..., blocks * 32].

    Raises:
        ValueError: the last axis is not a whole number of blocks.
    """
    blocks = _raw_blocks(raw, FloatType.Q80)
    out = blocks[..., 2:].view(np.int8).astype(np.float32)
    with np.errstate(invalid="ignore"):
        out *= _single(blocks)
    return out.reshape(*raw.shape[:-1], -1)


def quantize(float_type: FloatType, x: FloatArray) -> ByteArray:
    """Bytes of the rows of `x` in any storage type: float32 [..., n] to uint8 [..., bytes of a row].

    Raises:
        ValueError: there is no such type, or n is not a whole number of its blocks.
    """
    if float_type == FloatType.Q40:
        return quantize_q40(x)
    if float_type == FloatType.Q80:
        return quantize_q80(x)
    if float_type == FloatType.F32:
        return np.ascontiguousarray(x, "<f4").view(np.uint8)
    if float_type == FloatType.F16:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(x, "<f2").view(np.uint8)
    raise ValueError(f"no values are stored as {float_type.name}")


def dequantize(float_type: FloatType, raw: ByteArray) -> FloatArray:
    """Values of rows stored in any type: uint8 [..., bytes of a row] to float32 [..., n].

    Raises:
        ValueError: there is no such type, or the last axis is not a whole number of its blocks or values.
    """
    if float_type == FloatType.Q40:
        return dequantize_q40(raw)
    if float_type == FloatType.Q80:
        return dequantize_q80(raw)
    if float_type == FloatType.F32:
        return np.ascontiguousarray(raw).view("<f4").astype(np.float32, copy=False)
    if float_type == FloatType.F16:
        return np.ascontiguousarray(raw).view("<f2").astype(np.float32)
    raise ValueError(f"no values are stored as {float_type.name}")


def _blocks(x: FloatArray, float_type: FloatType) -> FloatArray:
    """`x` as float32 [..., n / 32, 32]."""
    row_bytes(float_type, x.shape[-1])
    return np.ascontiguousarray(x, np.float32).reshape(*x.shape[:-1], x.shape[-1] // BLOCK_VALUES, BLOCK_VALUES)


def _raw_blocks(raw: ByteArray, float_type: FloatType) -> ByteArray:
    """`raw` as uint8 [..., blocks, bytes of a block]."""
    block_bytes = row_bytes(float_type, BLOCK_VALUES)
    if raw.shape[-1] % block_bytes:
        raise ValueError(f"a row of {raw.shape[-1]} bytes is not a whole number of {float_type.name} blocks of {block_bytes} bytes")
    return np.ascontiguousarray(raw).reshape(*raw.shape[:-1], raw.shape[-1] // block_bytes, block_bytes)


def _inverse(d: FloatArray) -> FloatArray:
    """1 / d, and 0 where that is not finite."""
    inverse = np.divide(np.float32(1), d)
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half(d: FloatArray) -> ByteArray:
    """The bytes of d as f16: float32 [..., 1] to uint8 [..., 2]."""
    with np.errstate(over="ignore"):
        return d.astype("<f2").view(np.uint8)


def _single(blocks: ByteArray) -> FloatArray:
    """The d of every block: uint8 [..., bytes of a block] to float32 [..., 1]."""
    return np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32)
