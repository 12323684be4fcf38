"""The slow definition itself: its fma against rational arithmetic, its exp against the real one."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from tests.kernels import exact
from tests.kernels.agreement import assert_same_bits
from tests.kernels.samples import floats

numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_float32(value: Fraction) -> float:
    """Rounded once, ties to even; by counting units in the last place."""
    if value == 0:
        return 0.0
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += (size >= Fraction(2) ** (exponent + 1)) - (size < Fraction(2) ** exponent)
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(size / unit) * unit  # a Fraction rounds ties to even
    found = float("inf") if rounded >= 2**128 else float(rounded)
    return found if value > 0 else -found


@settings(max_examples=500)
@given(a=numbers, b=numbers, c=numbers)
@example(a=1 + 2**-23, b=1 + 2**-23, c=2.0**-60)  # just above the middle of two float32: rounding twice would go down
@example(a=1 + 2**-23, b=1 - 2**-23, c=-(2.0**-149))
@example(a=3e38, b=2.0, c=-3e38)
@example(a=1e-30, b=1e-30, c=1e-45)
@example(a=2.0**-75, b=2.0**-75, c=0.0)
@example(a=2.0**-75, b=2.0**-75, c=2.0**-149)
def test_fma_rounds_once(a, b, c):
    want = nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))
    assert float(exact.fma(a, b, c)) == want


def test_fma_of_products_that_all_but_cancel():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4000)).astype(np.float32)
    c = (-(a.astype(np.float64) * b) * rng.choice([1, 2.0**-24, 2.0**-25, 2.0**24, 2.0**-48, 3.0], 4000)).astype(np.float32)
    want = [nearest_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c, strict=True)]
    assert exact.fma(a, b, c).tolist() == want


def test_fma_keeps_zeros_and_infinities():
    inf = np.inf
    assert_same_bits(
        exact.fma(np.float32([-0.0, 0, -0.0, 1]), np.float32([1, 0, 1, 1]), np.float32([-0.0, 0, 0, -1])), np.float32([-0.0, 0, 0, 0])
    )
    assert exact.fma([inf, 1, 3e38], [2, 1, 3e38], [1, -inf, 0]).tolist() == [inf, -inf, inf]
    assert np.isnan(exact.fma([inf, inf], [0, 1], [1, -inf])).all()


def test_the_tree_folds_halves():
    values = np.float32([1e8, 1, -1e8, 3, 5e7, 2, 7, -5e7])
    a = values
    want = ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
    assert exact.fold_halves(values) == want
    assert exact.fold_halves(np.concatenate([values, values])) == 2 * want


def test_exp_is_close_to_the_real_one():
    x = np.linspace(-87.3, 88.3, 200_001, dtype=np.float32)
    x = x[(x >= np.float32(-87.3)) & (x <= np.float32(88.3))]
    real = np.exp(x.astype(np.float64))
    assert (np.abs(exact.exp(x) - real) / real).max() < 1e-7


def test_exp_at_its_ends():
    ends = np.float32([0, -0.0, -87.3, -87.31, -np.inf, 88.3, 88.4, np.inf])
    found = exact.exp(ends)
    assert found[:2].tolist() == [1, 1]
    assert found[2] > 0
    assert found[3:5].tolist() == [0, 0]
    assert found[5] == found[6] == found[7] < np.inf


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
def test_rows_of_one_term_are_that_term(weight_type):
    """One block whose scale is 1 and one value: every order gives the same."""
    x = np.zeros((1, 32), np.float32)
    x[0, 5] = 127
    weights = np.zeros((1, 32), np.float32)
    weights[0, 5] = -3
    if weight_type != FloatType.F32:
        raw = np.zeros(18 if weight_type == FloatType.Q40 else 34, np.uint8)
        raw[:2] = np.float16([1]).view(np.uint8)
        raw[2:] = 0x88 if weight_type == FloatType.Q40 else 0
        raw[2 + 5] = 0x85 if weight_type == FloatType.Q40 else 253
        weights = raw[None]
    for module in (exact, reference):
        assert module.matmul(weights, weight_type, x, FloatType.F32) == -381


def test_a_sum_does_follow_its_order():
    """The definition is one order among many: a plain sum has other bits."""
    w, x = floats(1, 50, 256, special=0), floats(2, 1, 256, special=0)
    defined = exact.matmul(w, FloatType.F32, x, FloatType.F32)[0]
    plain = np.zeros(50, np.float32)
    for i in range(256):
        plain = exact.fma(w[:, i], x[0, i], plain)
    assert (defined != plain).sum() > 10
    np.testing.assert_allclose(defined, plain, rtol=1e-4, atol=1e-2)
