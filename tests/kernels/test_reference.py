"""The twins against what is written down elsewhere: the codecs of files, textbook formulas, hand-made numbers."""

import math

import numpy as np
import pytest

from dairllm.formats import quants
from dairllm.graph.types import FloatType, RopeType
from dairllm.kernels import reference
from tests.kernels.samples import floats, rows_of_blocks

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80


def test_blocks_are_those_of_files():
    x = floats(1, 3, 96, special=0)
    assert np.array_equal(reference.quantize_q80(x), quants.quantize_q80(x))
    for float_type in (Q40, Q80):
        raw = rows_of_blocks(1, float_type, 3, 3)
        assert np.array_equal(reference.dequantize(float_type, raw), quants.dequantize(float_type, raw))


def test_a_block_by_hand():
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.float16([0.5]).view(np.uint8)
    raw[0, 2] = 0xF1  # value 0: (1 - 8) / 2, value 16: (15 - 8) / 2
    values = reference.dequantize(Q40, raw)[0]
    assert values[[0, 1, 16, 17]].tolist() == [-3.5, -4, 3.5, -4]


@pytest.mark.parametrize("weight_type", [Q40, Q80])
def test_products_are_those_of_the_values(weight_type):
    weights, x = rows_of_blocks(1, weight_type, 20, 4), rows_of_blocks(2, Q80, 5, 4)
    blocks = x.reshape(5, 4, 34)[..., 2:]
    blocks[blocks == 0x80] = 0
    want = reference.dequantize(Q80, x).astype(np.float64) @ reference.dequantize(weight_type, weights).T.astype(np.float64)
    np.testing.assert_allclose(reference.matmul(weights, weight_type, x, Q80), want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def test_float_weights_take_quantized_activations_as_their_values():
    weights, x = floats(1, 20, 64, special=0), rows_of_blocks(2, Q80, 5, 2)
    values = reference.dequantize(Q80, x)
    assert np.array_equal(reference.matmul(weights, F32, x, Q80), reference.matmul(weights, F32, values, F32))


def test_experts_take_the_plane_and_the_row_that_chose_them():
    weights = np.stack([np.full((1, 2), e + 1, np.float32) for e in range(3)])
    x = np.float32([[[1, 0], [10, 0]], [[100, 0], [1000, 0]]])
    out = reference.expert_matmul(weights, F32, x, F32, np.array([[0, 2], [1, 0]]))
    assert out[..., 0].tolist() == [[1, 20], [300, 1000]]


def test_only_f32_and_q80_are_cast():
    with pytest.raises(ValueError, match="cast: F32 to Q40"):
        reference.cast(floats(1, 1, 32), F32, Q40)


def test_activations_are_the_textbook_ones():
    x = np.linspace(-9, 9, 181, dtype=np.float32)
    tanh = np.array([0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * v * (1 + 0.044715 * v * v))) for v in x.astype(float)])
    np.testing.assert_allclose(reference.gelu(x), tanh, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(reference.silu(x), [v / (1 + math.exp(-v)) for v in x.astype(float)], rtol=1e-6)


def test_a_norm_by_parts_is_that_of_each_part():
    x, weight = floats(1, 2, 12, special=0), floats(2, 4, special=0)
    whole = reference.rms_norm(x, reference.inv_rms(x, 1e-5, 3), weight)
    parts = [reference.rms_norm(part, reference.inv_rms(part, 1e-5), weight) for part in np.split(x, 3, 1)]
    np.testing.assert_array_equal(whole, np.concatenate(parts, 1))


def test_pairs_that_turn_together():
    neighbours, halves = (reference.rope_pairs(8, 4, kind) for kind in (RopeType.LLAMA, RopeType.FALCON))
    assert [a.tolist() for a in neighbours] == [[0, 2, 4, 6], [1, 3, 5, 7], [0, 1, 0, 1]]
    assert [a.tolist() for a in halves] == [[0, 1, 4, 5], [2, 3, 6, 7], [0, 1, 0, 1]]


def test_a_quarter_turn():
    table = np.float32([[[0, 1], [1, 0]]])
    x = np.float32([[1, 2, 3, 4]])
    assert reference.rope(x, table, RopeType.LLAMA).tolist() == [[-2, 1, 3, 4]]
    assert reference.rope(x, table, RopeType.FALCON).tolist() == [[-3, 2, 1, 4]]


def test_attention_to_equal_keys_is_the_mean_of_the_values():
    values = floats(1, 6, 8, special=0)
    out = reference.attention(floats(2, 1, 16), np.ones((6, 8), np.float32), values, np.array([3]), 8, 2)
    np.testing.assert_allclose(out[0], np.tile(values[:4].mean(0), 2), rtol=1e-5, atol=1e-6)


def test_the_gate_by_hand():
    indexes, weights = reference.moe_gate(np.float32([[0.1, 0.4, 0.2, 0.4]]), 3, True)
    assert indexes.tolist() == [[1, 3, 2]]
    np.testing.assert_allclose(weights, [[0.4, 0.4, 0.2]], rtol=1e-6)
