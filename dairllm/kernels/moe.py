"""Routing to experts:

softmax over their scores and the choice of the k best. Rows of some hundred values: plain loops, sums in index order.
"""

import numpy as np

from dairllm.kernels.elementwise import exp_one
from dairllm.kernels.ir import load_f, load_i, store_f, store_i
from dairllm.kernels.kernel import kernel

__all__ = ["choose_experts", "softmax"]


@kernel
def softmax(x, n):
    """In place: exp(x - max), then times 1 / their sum in index order."""
    top = load_f(x)
    for i in range(1, n):
        top = max(top, load_f(x + 4 * i))
    total = np.float32(0)
    for i in range(n):
        e = exp_one(load_f(x + 4 * i) - top)
        store_f(x + 4 * i, e)
        total += e
    inverse = np.float32(1) / total
    for i in range(n):
        store_f(x + 4 * i, load_f(x + 4 * i) * inverse)


@kernel
def choose_experts(x, n, k, normalise, indexes, weights, weight_stride):
    """The k largest of x[n], ties to the lower index, NaN after all numbers:

    int64 indexes[k], F32 weights at weight_stride. With `normalise` the weights are divided by their sum, in the order
    chosen.
    """
    total = np.float32(0)
    for j in range(k):
        best, value = -1, np.float32(0)
        for i in range(n):
            v = load_f(x + 4 * i)
            if best >= 0 and not (v > value or (value != value and v == v)):
                continue
            taken = False
            for t in range(j):
                taken = taken or load_i(indexes + 8 * t) == i
            if not taken:
                best, value = i, v
        store_i(indexes + 8 * j, best)
        store_f(weights + j * weight_stride, value)
        total += value
    if normalise:
        for j in range(k):
            p = weights + j * weight_stride
            store_f(p, load_f(p) / total)
