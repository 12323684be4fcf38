"""Ops that treat each value alone, norms, and sums over planes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.kernels import reference
from tests.kernels import compiled, exact
from tests.kernels.agreement import assert_close, assert_same_bits, check
from tests.kernels.samples import arrays, floats, seeds

WIDTHS = [1, 7, 8, 9, 31, 32, 33, 40, 64, 100]


@pytest.mark.parametrize("name", ["silu", "gelu"])
@pytest.mark.parametrize("n", WIDTHS)
def test_activations(name, n):
    x = floats(n, 2, 5, n, spread=2)
    got, twin = check(name, x)
    # far out on the left, exp ends at 2e38 and gelu's argument is rounded: a share of x, not of a result close to zero
    assert_close(got, twin, np.abs(twin) + (1e-25 if name == "silu" else 1) * np.abs(x))


@pytest.mark.parametrize("name", ["silu", "gelu"])
@settings(max_examples=60, deadline=None)
@given(x=arrays(1, 40, limit=3e38) | arrays(1, 40, limit=100))
def test_activations_of_any_numbers(name, x):
    assert_same_bits(getattr(compiled, name)(x), getattr(exact, name)(x))


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_activations_at_their_ends(name):
    x = np.float32([[0.0, -0.0, 1e-45, -1e-45, 20, -20, 87.3, -87.3, 88.4, -88.4, 200, -200, 1e19, -1e19, 3e38, -3e38, np.inf]])
    assert_same_bits(getattr(compiled, name)(x), getattr(exact, name)(x))


def test_exp_has_the_defined_bits():
    x = np.concatenate(
        [
            np.linspace(-90, 90, 20_001, dtype=np.float32),
            np.float32([0, -0.0, -87.3, 88.3, -np.inf, np.inf, 1e-45, -3e38]),
            np.nextafter(np.float32([-87.3, -87.3, 88.3, 88.3]), np.float32([-100, 0, 0, 100])),
        ]
    )
    assert_same_bits(compiled.exp(x), exact.exp(x))


def test_exp_of_halves_of_ln_2():
    """Where the reduction's rounding to an integer is undecided."""
    middles = ((np.arange(-126, 127) + 0.5) * np.log(2)).astype(np.float32)
    x = np.concatenate([middles, *(np.nextafter(middles, np.float32(to)) for to in (-200, 200))])
    assert_same_bits(compiled.exp(x), exact.exp(x))


@pytest.mark.parametrize("n", WIDTHS)
def test_products(n):
    x, y, factors = floats(1, 2, 5, n), floats(2, 2, 5, n), floats(3, 2, 5)
    for got, twin in (check("mul", x, y), check("scale", x, factors)):
        assert_same_bits(got, twin)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("planes", [1, 2, 3, 8])
def test_sums_over_planes(n, planes):
    x = floats(n, planes, 5, n, special=0.3)
    got, twin = check("merge_sum", x)
    assert_same_bits(got, twin)


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_embedding_rows(rows):
    table = floats(1, 50, 40)
    tokens = np.random.default_rng(0).integers(0, 50, rows)
    got, twin = check("embedding", table, tokens)
    assert_same_bits(got, twin)


@pytest.mark.parametrize(("n", "n_columns"), [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (100, 1), (577, 1), (64, 4), (96, 3), (60, 4)])
@pytest.mark.parametrize("rows", [1, 5])
def test_inverse_root_mean_squares(n, n_columns, rows):
    got, twin = check("inv_rms", floats(n, rows, n, special=0.02), 1e-5, n_columns)
    assert_close(got, twin, twin)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 200), epsilon=st.sampled_from([1e-5, 1e-6, 1e-12]), spread=st.sampled_from([1e-20, 1e-3, 1.0, 1e4]))
def test_inverse_root_mean_squares_of_any_row(seed, n, epsilon, spread):
    x = floats(seed, 2, n, spread=spread, special=0)
    assert_same_bits(compiled.inv_rms(x, epsilon, threads=1 + seed % 3), exact.inv_rms(x, epsilon))


@pytest.mark.parametrize(("width", "n_columns"), [(1, 1), (33, 1), (64, 1), (16, 4), (8, 9), (24, 3), (100, 2)])
def test_norms(width, n_columns):
    x, weight = floats(1, 5, width * n_columns), floats(2, width)
    inverse = np.abs(floats(3, 5, n_columns))
    got, twin = check("rms_norm", x, inverse, weight)
    assert_same_bits(got, twin)


def test_a_norm_of_a_norm_has_unit_size():
    x = floats(5, 3, 256, special=0)
    for module in (compiled, exact, reference):
        y = module.rms_norm(x, module.inv_rms(x, 1e-6), np.ones(256, np.float32))
        np.testing.assert_allclose(np.sqrt(np.mean(y.astype(np.float64) ** 2, -1)), 1, rtol=1e-4)
