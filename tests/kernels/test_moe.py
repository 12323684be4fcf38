"""Routing to experts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels import compiled, exact
from tests.kernels.agreement import assert_close, assert_same_bits, check
from tests.kernels.samples import arrays, floats, seeds


@pytest.mark.parametrize("n", [1, 2, 7, 8, 60, 128, 257])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_softmax(n, rows):
    got, twin = check("softmax", floats(n, rows, n, special=0))
    assert_close(got, twin, twin + 1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(x=arrays(2, 9, limit=3e38) | arrays(2, 9, limit=50))
def test_softmax_of_any_numbers(x):
    with np.errstate(over="ignore"):  # a difference of more than the largest number is -inf, and its exponential 0
        assert_same_bits(compiled.softmax(x), exact.softmax(x))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 3), (8, 8), (60, 4), (128, 8)])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_gate(normalise, n, k, rows):
    x = exact.softmax(floats(n, rows, n, special=0))
    (indexes, weights), (twin_indexes, twin_weights) = check("moe_gate", x, k, normalise)
    assert_same_bits(indexes, twin_indexes)
    assert_close(weights, twin_weights, twin_weights)


def test_of_equal_experts_the_lower_comes_first():
    x = np.float32([[0.1, 0.3, 0.2, 0.3, 0.3, 0.2]])
    indexes, weights = compiled.moe_gate(x, 5, False)
    assert indexes.tolist() == [[1, 3, 4, 2, 5]]
    assert_same_bits(weights, x[:, [1, 3, 4, 2, 5]])


@settings(max_examples=40, deadline=None)
@given(seed=seeds, n=st.integers(1, 40), data=st.data())
def test_gates_of_few_different_values(seed, n, data):
    x = np.random.default_rng(seed).choice(np.float32([0.0, 0.25, 0.5, 1e-30]), (3, n))
    k = data.draw(st.integers(1, n))
    check("moe_gate", x, k, False)
