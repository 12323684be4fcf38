"""Ops that treat values, or whole rows, alone.

Where an op is one or two float32 operations a value these are the definition's own (docs/arithmetic.md); elsewhere float64 inside.
"""

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import FloatType
from dairllm.kernels.reference.blocks import Floats, Row, dequantize

__all__ = ["embedding", "gelu", "inv_rms", "merge_add", "merge_sum", "mul", "rms_norm", "scale", "silu"]


def embedding(table: Floats, tokens: npt.NDArray[np.integer]) -> Floats:
    """table float32 [vocab, dim], tokens integers [rows] -> float32 [rows, dim]."""
    return np.asarray(table[tokens], np.float32)


def merge_add(y: Floats, x: Row, x_type: FloatType) -> Floats:
    """y float32 [..., n] plus each slice of x in order -> float32 [..., n]. x is a row of (x / n) slices of n values, F32 or Q80."""
    out, values = y.copy(), dequantize(x_type, x)
    n = y.shape[-1]
    with np.errstate(all="ignore"):
        for first in range(0, values.shape[-1], n):
            out = out + values[..., first : first + n]
    return out


def merge_sum(x: Floats) -> Floats:
    """float32 [planes, ...] -> float32 [...]: the planes summed in order, the first one as it is."""
    total: Floats = x[0].copy()
    with np.errstate(all="ignore"):
        for plane in x[1:]:
            total = total + plane
    return total


def inv_rms(x: Floats, epsilon: float, n_columns: int = 1) -> Floats:
    """float32 [..., n] -> float32 [..., n_columns]: 1 / sqrt(mean of squares + epsilon) of each of n_columns equal parts."""
    parts = x.reshape(*x.shape[:-1], n_columns, -1).astype(np.float64)
    return np.asarray(1 / np.sqrt(np.mean(parts * parts, -1) + np.float64(np.float32(epsilon))), np.float32)


def rms_norm(x: Floats, inverse: Floats, weight: Floats) -> Floats:
    """weight * (inverse * x): x float32 [..., n], inverse float32 [..., n_columns], weight float32 [n / n_columns], shared by all parts."""
    parts = x.reshape(*x.shape[:-1], inverse.shape[-1], -1)
    with np.errstate(all="ignore"):
        out = weight * (parts * inverse[..., None])
    return np.asarray(out, np.float32).reshape(x.shape)


def silu(x: Floats) -> Floats:
    """x / (1 + exp(-x)), float32 [...]."""
    v = x.astype(np.float64)
    with np.errstate(over="ignore"):
        return np.asarray(v / (1 + np.exp(-v)), np.float32)


def gelu(x: Floats) -> Floats:
    """0.5 x (1 + tanh(u)), u = sqrt(2 / pi) x (1 + 0.044715 x^2), float32 [...].

    As x / (1 + exp(-2 u)), which is the same and loses nothing where the tanh is close to -1.
    """
    v = x.astype(np.float64)
    u = np.sqrt(2 / np.pi) * v * (1 + 0.044715 * v * v)
    with np.errstate(over="ignore"):
        return np.asarray(v / (1 + np.exp(-2 * u)), np.float32)


def mul(x: Floats, y: Floats) -> Floats:
    """Element by element, float32 [...]."""
    with np.errstate(all="ignore"):
        return x * y


def scale(x: Floats, factors: Floats) -> Floats:
    """x float32 [planes, rows, n] times factors float32 [planes, rows]: each row its own."""
    with np.errstate(all="ignore"):
        return np.asarray(x * factors[..., None], np.float32)
