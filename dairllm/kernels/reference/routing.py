"""Routing to experts: softmax over their scores and the choice of the k best."""

import numpy as np
import numpy.typing as npt

from dairllm.kernels.reference.blocks import Floats

__all__ = ["moe_gate", "softmax"]


def softmax(x: Floats) -> Floats:
    """float32 [..., n] -> float32 [..., n] over the last axis."""
    v = x.astype(np.float64)
    e = np.exp(v - v.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), np.float32)


def moe_gate(x: Floats, k: int, normalise: bool) -> tuple[npt.NDArray[np.int64], Floats]:
    """The k largest of x float32 [rows, n], the best first, ties to the lower index: (indexes int64 [rows, k], weights float32 [rows, k]).

    With `normalise` the weights are divided by their sum.
    """
    indexes = np.argsort(-x, -1, kind="stable")[:, :k].astype(np.int64)
    weights = np.take_along_axis(x, indexes, -1)
    if normalise:
        exact = weights.astype(np.float64)
        weights = (exact / exact.sum(-1, keepdims=True)).astype(np.float32)
    return indexes, weights
