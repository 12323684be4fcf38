"""Matrix products. Weights are stored [outputs, inputs]: float32 [d, n], or uint8 [d, n / 32 * block bytes]."""

import numpy as np
import numpy.typing as npt

from dairllm.graph.types import FloatType
from dairllm.kernels.reference.blocks import Floats, Row, dequantize, quantize_q80, split_blocks

__all__ = ["expert_matmul", "matmul"]


def matmul(weights: Row, weight_type: FloatType, x: Row, x_type: FloatType) -> Floats:
    """x [..., n] times weights [d, n] -> float32 [..., d], summed in float64.

    Quantized weights meet Q80 activations: a float32 x is quantized first. Activations of -128, which quantizing never makes, count as
    -127. F32 weights meet float32: a Q80 x is dequantized.
    """
    if weight_type == FloatType.F32:
        w, v = weights.astype(np.float64), dequantize(x_type, x).astype(np.float64)
    else:
        w = _exact(*split_blocks(weight_type, weights))
        q, d = split_blocks(FloatType.Q80, quantize_q80(x) if x_type == FloatType.F32 else x)
        v = _exact(np.maximum(q, -127), d)
    with np.errstate(all="ignore"):
        return (v @ w.T).astype(np.float32)


def _exact(q: npt.NDArray[np.int32], d: Floats) -> npt.NDArray[np.float64]:
    """q * d without rounding, [..., blocks, 32] -> [..., n]."""
    with np.errstate(all="ignore"):
        values = q.astype(np.float64) * d[..., None].astype(np.float64)
    return values.reshape(*values.shape[:-2], -1)


def expert_matmul(weights: Row, weight_type: FloatType, x: Row, x_type: FloatType, active: npt.NDArray[np.integer]) -> Floats:
    """Plane e of row b goes through expert active[b, e].

    weights [experts, d, n]; x [k, rows, n]; active integers [rows, k] -> float32 [k, rows, d].
    """
    planes, rows = x.shape[:2]
    out = np.empty((planes, rows, weights.shape[1]), np.float32)
    for e in range(planes):
        for b in range(rows):
            out[e, b] = matmul(weights[active[b, e]], weight_type, x[e, b], x_type)
    return out
