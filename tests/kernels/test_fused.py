"""Ops that are computed as one leave what they leave when they are computed one after the other: the values, and their panels."""

import pytest

from tests.kernels import compiled
from tests.kernels.agreement import THREADS, assert_same_bits
from tests.kernels.samples import floats

ROWS = (1, 5, 13, 16, 33, 45)
"""In row panels, in tiles, and some in each."""


@pytest.mark.parametrize("always_rows", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 9, 17])
@pytest.mark.parametrize("rows", ROWS)
def test_a_norm_and_packing(rows, blocks, always_rows):
    x, inverse, weight = floats(1, rows, 32 * blocks, special=0.01), floats(2, rows, 1), floats(3, 32 * blocks)
    for threads in THREADS:
        want = compiled.rms_norm(x, inverse, weight, threads)
        kept, panels = compiled.norm_and_pack(x, inverse, weight, threads, always_rows)
        assert_same_bits(kept, want)
        assert_same_bits(panels, compiled.pack(want[None], threads, always_rows))


@pytest.mark.parametrize("always_rows", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("planes", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2, 9])
@pytest.mark.parametrize("rows", ROWS)
def test_an_activation_a_multiplication_and_packing(rows, blocks, planes, activation, always_rows):
    x, y = floats(1, planes, rows, 32 * blocks, spread=3, special=0.01), floats(2, planes, rows, 32 * blocks, special=0.01)
    for threads in THREADS:
        want = compiled.mul(getattr(compiled, activation)(x, threads), y, threads)
        kept, panels = compiled.activate_and_pack(activation, x, y, threads, always_rows)
        assert_same_bits(kept, want)
        assert_same_bits(panels, compiled.pack(want, threads, always_rows))
