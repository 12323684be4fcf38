"""Quantizing to Q80 and back, on its own and within merge_add."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.formats import quants
from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from dairllm.kernels.panels import GROUP_BYTES, TILE_BLOCK_BYTES, in_tiles, row_panel_bytes
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
    want = reference.quantize_q80(x)
    assert_same_bits(compiled.quantize_q80(x), want)
    eight = np.tile(x, (1, 8))  # which is another kernel
    eight[0, 32:64] *= np.float32(0.5)
    got = compiled.quantize_q80(eight)
    assert_same_bits(got, reference.quantize_q80(eight))
    assert_same_bits(got[:, :34], want)


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


def unpacked(panels, rows, blocks):
    """The panels' memory -> integers [rows, blocks, 32], seeds and scales [rows, blocks], by the layout that panels.py tells of."""
    in_rows = panels[: rows * row_panel_bytes(blocks)].reshape(rows, -1, GROUP_BYTES)
    in_columns = panels[in_rows.size :].reshape(-1, blocks, TILE_BLOCK_BYTES)
    found = []
    for row in range(rows):
        for block in range(blocks):
            if row < in_tiles(rows):
                place, lanes, lane = in_columns[row // 16, block], 16, row % 16
            else:
                place, lanes, lane = in_rows[row, block // 8], 8, block % 8
            found.append(place.reshape(10, lanes, 4)[:, lane])
    words = np.array(found).reshape(rows, blocks, 40)
    return words[..., :32].view(np.int8), words[..., 32:36].copy().view(np.int32)[..., 0], words[..., 36:].copy().view(np.float32)[..., 0]


@pytest.mark.parametrize("blocks", [1, 8, 9, 16, 21])
@pytest.mark.parametrize("rows", [1, 3, 13, 16, 21])
def test_panels_hold_the_blocks(rows, blocks):
    """Packed one by one and eight at a time, in rows and columns of tiles, as many of each as the threads' parts make."""
    x = floats(blocks, rows, 32 * blocks)
    x[0, 5] = np.inf
    want = reference.quantize_q80(x).reshape(rows, blocks, 34)
    for threads in THREADS:
        integers, seeds, scales = unpacked(compiled.pack(x[None], threads), rows, blocks)
        assert_same_bits(scales, want[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))
        assert_same_bits(integers, want[..., 2:].view(np.int8))
        assert_same_bits(seeds, -8 * want[..., 2:].view(np.int8).sum(-1, dtype=np.int32))


def test_a_nan_is_packed_alike_however_it_is_packed():
    """One by one in a row of 7 blocks, else eight at a time: all integers of its block are 0."""
    x = floats(7, 1, 7 * 32)
    x[0, 40], x[0, 100] = np.nan, np.uint32(0x7FC00123).view(np.float32)
    (want, *_), (got, *_) = unpacked(compiled.pack(x[None]), 1, 7), unpacked(compiled.pack(np.tile(x, (1, 8))[None]), 1, 56)
    assert_same_bits(got.reshape(8, 7, 32), np.tile(want, (8, 1, 1)))
    assert want.any(-1).tolist() == [[True, False, True, False, True, True, True]]


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
