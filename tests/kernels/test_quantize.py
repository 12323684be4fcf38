"""Quantizing to Q80 and back, on its own and within merge_add."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.formats import quants
from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from tests.kernels import compiled
from tests.kernels.agreement import THREADS, assert_same_bits, check
from tests.kernels.samples import arrays, floats, rows_of_blocks, seeds

F32, Q80 = FloatType.F32, FloatType.Q80


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 9, 17])
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_quantizing_rows(blocks, rows):
    x = floats(blocks, rows, 32 * blocks)
    got, twin = check("quantize_q80", x)
    assert_same_bits(got, twin)
    assert_same_bits(got, quants.quantize_q80(x))


@settings(max_examples=150, deadline=None)
@given(x=arrays(1, 32, limit=3e38) | arrays(1, 32, limit=1e-30) | arrays(1, 32, limit=1e-36) | arrays(1, 32, limit=200))
def test_quantizing_any_numbers(x):
    assert_same_bits(compiled.quantize_q80(x), reference.quantize_q80(x))


def test_ties_go_to_even():
    x = np.zeros((1, 32), np.float32)
    x[0, :8] = [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]
    q = compiled.quantize_q80(x)[0, 2:10].view(np.int8)
    assert q.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("size", [0.0, 1e-45, 2.0**-128 * 127, 2.0**-127 * 127, 1e-38, 1e-5, 65504 * 127.0, 65520 * 127.0, 3.4e38, np.inf])
def test_scales_at_the_ends_of_what_there_is(size):
    x = np.full((1, 32), size, np.float32)
    x[0, ::2] *= -1
    x[0, 3] = 0
    assert_same_bits(compiled.quantize_q80(x), reference.quantize_q80(x))


def test_every_scale_is_read_and_written_as_ieee_says():
    """All 63488 finite halves, as the scales of blocks; and floats half way between two of them."""
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[(halves & 0x7C00) != 0x7C00]
    raw = np.full((1, len(halves), 34), 1, np.uint8)
    raw[0, :, :2] = halves[:, None].view(np.uint8)
    raw = raw.reshape(1, -1)
    assert_same_bits(compiled.cast(raw, Q80, F32), reference.dequantize(Q80, raw))
    positive = halves[halves < 0x7C00].view(np.float16).astype(np.float32)
    middles = np.concatenate([positive, (positive[1:] + positive[:-1]) / 2])
    around = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf))])
    x = np.repeat(around * np.float32(127), 32)[None]
    assert_same_bits(compiled.quantize_q80(x), reference.quantize_q80(x))


@pytest.mark.parametrize("blocks", [1, 3, 9])
@pytest.mark.parametrize("rows", [1, 17])
def test_dequantizing_rows(blocks, rows):
    raw = rows_of_blocks(blocks, Q80, rows, blocks)
    got, twin = check("cast", raw, Q80, F32)
    assert_same_bits(got, twin)


@pytest.mark.parametrize("n", [1, 7, 31, 32, 33, 100])
def test_copying_rows(n):
    check("cast", floats(n, 3, n), F32, F32)


@pytest.mark.parametrize("planes", [1, 3])
def test_casting_planes(planes):
    check("cast", floats(1, planes, 5, 96), F32, Q80)
    check("cast", rows_of_blocks(1, Q80, planes * 5, 3).reshape(planes, 5, -1), Q80, F32)


@pytest.mark.parametrize("target", [F32, Q80])
def test_repeating_a_row_in_each_plane(target):
    got, twin = check("repeat_z", floats(1, 5, 96), F32, target, 3)
    assert_same_bits(got, twin)
    assert_same_bits(got[0], got[2])


@pytest.mark.parametrize("x_type", [F32, Q80])
@pytest.mark.parametrize("n_slices", [1, 2, 3, 5])
@pytest.mark.parametrize("n", [32, 96, 288])
def test_merging_slices(x_type, n_slices, n):
    y = floats(n, 6, n, special=0)
    x = floats(2, 6, n * n_slices, special=0) if x_type == F32 else rows_of_blocks(2, Q80, 6, n // 32 * n_slices)
    got, twin = check("merge_add", y, x, x_type)
    assert_same_bits(got, twin)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 70), n_slices=st.integers(1, 4))
def test_merging_float_slices_of_any_width(seed, n, n_slices):
    y, x = floats(seed, 2, n), floats(seed + 1, 2, n * n_slices)
    assert_same_bits(compiled.merge_add(y, x, F32, threads=1 + seed % 3), reference.merge_add(y, x, F32))


def test_a_merged_minus_128_counts_as_itself():
    raw = rows_of_blocks(1, Q80, 1, 1)
    raw[0, :2] = np.float16([1]).view(np.uint8)
    raw[0, 2:] = 0x80
    for threads in THREADS:
        assert (compiled.merge_add(np.zeros((1, 32), np.float32), raw, Q80, threads=threads) == -128).all()
