"""Logprobs against a softmax in float64."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dairllm.errors import EngineError
from dairllm.serving.logprobs import score

ROWS = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-30, 30, width=32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max()
    return x - np.log(np.exp(x).sum())


@given(ROWS, st.integers(0, 199), st.integers(0, 20))
def test_it_is_the_logarithm_of_the_softmax(logits: np.ndarray, token: int, n_top: int) -> None:
    token %= logits.size
    found, expected = score(logits, token, n_top), log_softmax(logits)
    assert found.token == token
    assert found.logprob == pytest.approx(expected[token], abs=2e-5)
    order = np.argsort(-logits, kind="stable")[:n_top]
    assert found.top_ids.tolist() == order.tolist(), "of equal ones the lower id"
    np.testing.assert_allclose(found.top_logprobs, expected[order], atol=2e-5)


@given(ROWS)
def test_the_best_is_the_same_number_as_its_token(logits: np.ndarray) -> None:
    """Evaluations ask by == whether the greedy choice is the token that was given."""
    for n_top in (1, 3):
        best = int(logits.argmax())
        assert score(logits, best, n_top).logprob == float(score(logits, best, n_top).top_logprobs[0])


def test_a_forbidden_token_has_no_probability() -> None:
    assert score(np.float32([0.0, -math.inf]), 1, 2).logprob == -math.inf
    assert score(np.float32([0.0, -math.inf]), 0, 2).logprob == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_gone_wrong_are_an_error(bad: float) -> None:
    with pytest.raises(EngineError, match=f"the best logit is {bad}"):
        score(np.float32([0.0, bad, 1.0]), 0, 1)
