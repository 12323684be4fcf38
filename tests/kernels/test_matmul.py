"""Matrix products of all weight types: rows, tiles of a batch, experts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from tests.kernels import compiled, exact
from tests.kernels.agreement import THREADS, assert_close, assert_same_bits, check
from tests.kernels.samples import floats, rows_of_blocks, seeds

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80
QUANTIZED = [Q40, Q80]


def size_of_terms(weights, weight_type, x, x_type):
    """sum of |w| |x|: what a sum's rounding is measured by."""
    w, v = np.abs(reference.dequantize(weight_type, weights)), np.abs(reference.dequantize(x_type, x))
    return v.astype(np.float64) @ w.astype(np.float64).T


def check_matmul(weights, weight_type, x, x_type):
    got, twin = check("matmul", weights, weight_type, x, x_type)
    assert_close(got, twin, size_of_terms(weights, weight_type, x, x_type))


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("blocks", range(1, 18))
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 17])
def test_quantized_rows_of_every_length(weight_type, blocks, rows):
    check_matmul(rows_of_blocks(blocks, weight_type, 40, blocks), weight_type, rows_of_blocks(rows, Q80, rows, blocks), Q80)


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("rows", range(1, 41))
def test_quantized_batches_of_every_size(weight_type, rows):
    check_matmul(rows_of_blocks(7, weight_type, 64, 9), weight_type, rows_of_blocks(rows, Q80, rows, 9), Q80)


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 7, 8, 12, 31, 32, 33, 36, 63, 64, 95, 100])
@pytest.mark.parametrize("rows", [1, 6, 33])
def test_any_number_of_outputs(weight_type, outputs, rows):
    check_matmul(rows_of_blocks(outputs, weight_type, outputs, 3), weight_type, rows_of_blocks(rows, Q80, rows, 3), Q80)


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 3, 5, 20])
def test_activations_that_come_as_values_are_quantized(weight_type, rows):
    weights, x = rows_of_blocks(1, weight_type, 32, 5), floats(rows, rows, 5 * 32, special=0)
    got, twin = check("matmul", weights, weight_type, x, F32)
    assert_close(got, twin, size_of_terms(weights, weight_type, reference.quantize_q80(x), Q80))


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 20])
def test_activations_too_large_for_a_scale_give_the_defined_infinities(weight_type, rows):
    weights, x = rows_of_blocks(1, weight_type, 32, 5), floats(rows, rows, 5 * 32)
    assert not np.isfinite(exact.matmul(weights, weight_type, x, F32)).all()
    assert_same_bits(compiled.matmul(weights, weight_type, x, F32), exact.matmul(weights, weight_type, x, F32))


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 16])
def test_long_rows(weight_type, rows):
    check_matmul(rows_of_blocks(5, weight_type, 8, 176), weight_type, rows_of_blocks(rows, Q80, rows, 176), Q80)


@pytest.mark.parametrize("weight_type", QUANTIZED)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("weight_byte", [0x00, 0x7F, 0x80, 0x88, 0xFF])
@pytest.mark.parametrize("activation_byte", [0x7F, 0x80, 0x81])
def test_extreme_bytes_overflow_no_register(weight_type, rows, weight_byte, activation_byte):
    weights, x = rows_of_blocks(1, weight_type, 32, 8), rows_of_blocks(2, Q80, rows, 8)
    for raw, byte in ((weights, weight_byte), (x, activation_byte)):
        blocks = raw.reshape(len(raw), 8, -1)
        blocks[..., :2] = np.float16([0.5]).view(np.uint8)
        blocks[..., 2:] = byte
    check_matmul(weights, weight_type, x, Q80)


@pytest.mark.parametrize("weight_type", QUANTIZED)
def test_an_activation_of_minus_128_counts_as_minus_127(weight_type):
    weights, x = rows_of_blocks(1, weight_type, 32, 4), rows_of_blocks(2, Q80, 6, 4)
    clamped = x.copy().reshape(6, 4, 34)
    values = clamped[..., 2:]
    values[values == 0x80] = 0x81
    assert (clamped.reshape(x.shape) != x).any()
    assert_same_bits(compiled.matmul(weights, weight_type, x, Q80), compiled.matmul(weights, weight_type, clamped.reshape(x.shape), Q80))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, weight_type=st.sampled_from(QUANTIZED), blocks=st.integers(1, 40), rows=st.integers(1, 40), outputs=st.integers(1, 70))
def test_quantized_products_of_any_shape(seed, weight_type, blocks, rows, outputs):
    weights, x = rows_of_blocks(seed, weight_type, outputs, blocks), rows_of_blocks(seed + 1, Q80, rows, blocks)
    got = compiled.matmul(weights, weight_type, x, Q80, threads=1 + seed % 3)
    assert_same_bits(got, exact.matmul(weights, weight_type, x, Q80))


@pytest.mark.parametrize("n", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 577])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_float_rows_of_every_length(n, rows):
    check_matmul(floats(n, 37, n), F32, floats(rows, rows, n), F32)


@pytest.mark.parametrize("outputs", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("rows", range(1, 10))
def test_float_batches(outputs, rows):
    check_matmul(floats(outputs, outputs, 48), F32, floats(rows, rows, 48), F32)


@settings(max_examples=40, deadline=None)
@given(
    seed=seeds, n=st.integers(1, 200), rows=st.integers(1, 12), outputs=st.integers(1, 70), spread=st.sampled_from([1e-38, 1e-20, 1.0, 1e8])
)
def test_float_products_of_any_shape(seed, n, rows, outputs, spread):
    weights, x = floats(seed, outputs, n, spread=spread), floats(seed + 1, rows, n, spread=spread)
    assert_same_bits(compiled.matmul(weights, F32, x, F32, threads=1 + seed % 3), exact.matmul(weights, F32, x, F32))


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("rows", [1, 2, 5, 17])
def test_experts(weight_type, rows):
    n_experts, k, outputs, blocks = 6, 3, 40, 3
    if weight_type == F32:
        weights, x, x_type = floats(1, n_experts, outputs, 32 * blocks), floats(rows, k, rows, 32 * blocks), F32
    else:
        weights = rows_of_blocks(1, weight_type, n_experts * outputs, blocks).reshape(n_experts, outputs, -1)
        x, x_type = rows_of_blocks(rows, Q80, k * rows, blocks).reshape(k, rows, -1), Q80
    active = np.random.default_rng(rows).integers(0, n_experts, (rows, k))
    got, twin = check("expert_matmul", weights, weight_type, x, x_type, active)
    for e in range(k):
        for b in range(rows):
            size = size_of_terms(weights[active[b, e]], weight_type, x[e, b], x_type)
            assert_close(got[e, b], twin[e, b], size)


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("used", [1, 2, 7])
def test_a_batch_of_any_choice_of_experts_has_the_bits_of_its_rows_alone(weight_type, used):
    """Many rows through one expert, experts that nobody chose, the same one twice in a row, and indexes that there are none of."""
    n_experts, k, rows, outputs, blocks = 7, 2, 23, 150, 9
    if weight_type == F32:
        weights, x, x_type = floats(1, n_experts, outputs, 32 * blocks), floats(2, k, rows, 32 * blocks), F32
    else:
        weights = rows_of_blocks(1, weight_type, n_experts * outputs, blocks).reshape(n_experts, outputs, -1)
        x, x_type = rows_of_blocks(2, Q80, k * rows, blocks).reshape(k, rows, -1), Q80
    active = np.random.default_rng(used).integers(7 - used, n_experts, (rows, k))
    active[3] = active[11] = (-5, 1 << 40)
    alone = [compiled.expert_matmul(weights, weight_type, x[:, i : i + 1], x_type, active[i : i + 1]) for i in range(rows)]
    for threads in THREADS:
        assert_same_bits(compiled.expert_matmul(weights, weight_type, x, x_type, active, threads), np.concatenate(alone, 1))
        some = compiled.expert_matmul(weights, weight_type, x[:, 4:], x_type, active[4:], threads)
        assert_same_bits(some, np.concatenate(alone[4:], 1))


@pytest.mark.parametrize(("weight_type", "x_type"), [(F32, F32), (Q40, Q80), (Q80, Q80)])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(weight_type, x_type):
    weights = floats(1, 64, 96) if weight_type == F32 else rows_of_blocks(1, weight_type, 64, 3)
    x = floats(2, 40, 96) if x_type == F32 else rows_of_blocks(2, Q80, 40, 3)
    alone = np.concatenate([compiled.matmul(weights, weight_type, x[i : i + 1], x_type) for i in range(40)])
    assert_same_bits(compiled.matmul(weights, weight_type, x, x_type), alone)
    assert_same_bits(np.concatenate([compiled.matmul(weights, weight_type, part, x_type) for part in (x[:7], x[7:])]), alone)
