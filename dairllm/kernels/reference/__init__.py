"""The numpy twins of the kernels: every op of the graph, plain and obviously right, in any order of sums.

Pure functions of arrays (``shift`` alone writes into the cache that it is given). Where a result is a sum it is taken in float64, so that
a kernel agrees within the rounding of its own float32 arithmetic; the order that fixes a kernel's bits is defined in docs/arithmetic.md.
"""

from dairllm.kernels.reference.attention import attention, rope, rope_frequencies, rope_pairs, rope_table, shift
from dairllm.kernels.reference.blocks import Floats, Row, cast, dequantize, quantize_q80, repeat_z, split_blocks
from dairllm.kernels.reference.elementwise import embedding, gelu, inv_rms, merge_add, merge_sum, mul, rms_norm, scale, silu
from dairllm.kernels.reference.matmul import expert_matmul, matmul
from dairllm.kernels.reference.routing import moe_gate, softmax

__all__ = [
    "Floats",
    "Row",
    "attention",
    "cast",
    "dequantize",
    "embedding",
    "expert_matmul",
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
    "rope_frequencies",
    "rope_pairs",
    "rope_table",
    "scale",
    "shift",
    "silu",
    "softmax",
    "split_blocks",
]
