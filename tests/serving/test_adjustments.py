"""What a request changes about logits: against transformers' and OpenAI's formulas, written out token by token."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import ConfigError
from dairllm.serving.adjustments import Adjustments
from dairllm.serving.sampler import Sampler

LOGITS = np.float32([2.0, -1.0, 0.5, 3.0, -math.inf, 0.0])


def changed(adjustments: Adjustments, logits: np.ndarray = LOGITS) -> list[float]:
    out = np.empty_like(logits)
    adjustments.apply(logits, out)
    return out.tolist()


def formula(logits, prompt, said, repetition, frequency, presence, bias):
    """transformers: `score = where(score < 0, score * penalty, score / penalty)` for ids of prompt and answer.
    OpenAI: `mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence`."""
    counts = Counter(said)
    found = []
    for token, value in enumerate(logits.tolist()):
        value += bias.get(token, 0.0)
        if token in counts or token in prompt:
            value = value * repetition if value < 0 else value / repetition
        found.append(value - counts[token] * frequency - (counts[token] > 0) * presence)
    return found


def test_a_repetition_penalty_divides_what_is_positive_and_multiplies_the_rest() -> None:
    adjustments = Adjustments([0, 1, 4, 0], repetition=2.0)
    assert changed(adjustments) == [1.0, -2.0, 0.5, 3.0, -math.inf, 0.0]
    adjustments.add(3)
    assert changed(adjustments) == [1.0, -2.0, 0.5, 1.5, -math.inf, 0.0], "the answer's tokens too, each once"


def test_frequency_and_presence_count_the_answer_alone() -> None:
    adjustments = Adjustments([0, 1], frequency=0.5, presence=0.25)
    assert changed(adjustments) == LOGITS.tolist()
    for token in (3, 3, 2):
        adjustments.add(token)
    assert changed(adjustments) == [2.0, -1.0, -0.25, 1.75, -math.inf, 0.0]


def test_a_bias_is_added() -> None:
    assert changed(Adjustments(bias={5: 4.0, 3: -100.0, 4: 100.0})) == [2.0, -1.0, 0.5, -97.0, -math.inf, 4.0]


@pytest.mark.parametrize("repetition", [1e-320, 1e-50, 1e-40, 1e-30, 1e30, 1e300])
def test_no_penalty_makes_an_infinity(repetition: float) -> None:
    """Which the sampler would take for a model whose numbers have overflowed."""
    logits = np.float32([1e15, -1e15, 0.0, 3.0, -math.inf, 1.0])
    adjustments = Adjustments(range(6), repetition=repetition, frequency=1e38, presence=-1e38)
    for token in (0, 1, 1, 1, 1, 2, 4):
        adjustments.add(token)
    found = changed(adjustments, logits)
    assert found[4] == -math.inf, "which forbids a token"
    assert all(math.isfinite(value) for token, value in enumerate(found) if token != 4)
    assert 0 <= Sampler(adjustments=Adjustments(range(6), repetition=repetition)).sample(logits) < 6


def test_an_infinity_of_the_model_stays() -> None:
    found = changed(Adjustments([0, 1], repetition=2.0, presence=1.0), np.float32([math.inf, math.nan, 1.0]))
    assert found[0] == math.inf
    assert math.isnan(found[1])


def test_the_logits_are_left_as_they_are() -> None:
    logits = LOGITS.copy()
    logits.setflags(write=False)
    Sampler(adjustments=Adjustments([1], repetition=1.5, bias={2: 1.0})).sample(logits)


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 199), max_size=300),
    said=st.lists(st.integers(0, 199), max_size=300),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    frequency=st.sampled_from([-2.0, 0.0, 0.1, 2.0]),
    presence=st.sampled_from([-1.5, 0.0, 1.5]),
    bias=st.dictionaries(st.integers(0, 199), st.floats(-100, 100, width=32), max_size=20),
    cut=st.integers(0, 300),
)
def test_it_is_the_formulas_whenever_it_is_resumed(prompt, said, repetition, frequency, presence, bias, cut) -> None:
    logits = (np.random.default_rng(len(said)).standard_normal(200) * 5).astype(np.float32)
    adjustments = Adjustments(prompt, repetition=repetition, frequency=frequency, presence=presence, bias=bias, generated=said[:cut])
    for token in said[cut:]:
        adjustments.add(token)
    expected = formula(logits, prompt, said, repetition, frequency, presence, bias)
    np.testing.assert_allclose(changed(adjustments, logits), expected, rtol=1e-5, atol=1e-4)


def test_a_sampler_tells_of_each_token() -> None:
    """With a large frequency penalty the best two take turns."""
    logits = np.float32([0.0, 10.0, 9.5, 1.0])
    for temperature in (0.0, 1e-6):
        sampler = Sampler(temperature, adjustments=Adjustments(frequency=1.0))
        assert [sampler.sample(logits) for _ in range(4)] == [1, 2, 1, 2]
        assert sampler.draws == 4


def test_a_resumed_generation_goes_on_with_the_same_tokens() -> None:
    logits = (np.random.default_rng(1).standard_normal(50)).astype(np.float32)
    settings = {"repetition": 1.2, "frequency": 0.7, "presence": 0.3, "bias": {7: 2.0}}
    whole = Sampler(1.0, 0.9, 7, top_k=20, min_p=0.01, adjustments=Adjustments([1, 2], **settings))
    ids = [whole.sample(logits) for _ in range(30)]
    resumed = Sampler(1.0, 0.9, 7, top_k=20, min_p=0.01, draws=12, adjustments=Adjustments([1, 2], generated=ids[:12], **settings))
    assert [resumed.sample(logits) for _ in range(18)] == ids[12:]


def test_adjustments_that_change_nothing_cost_nothing() -> None:
    assert Adjustments([1, 2]).change_nothing
    assert Adjustments([1], bias={}).change_nothing
    for some in ({"repetition": 1.1}, {"frequency": 0.1}, {"presence": -0.1}, {"bias": {1: 0.5}}):
        assert not Adjustments(**some).change_nothing


def test_a_large_vocabulary_costs_its_copy() -> None:
    """Ten thousand seen tokens of 150,000: no Python for each of them."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(150_000).astype(np.float32)
    adjustments = Adjustments(rng.integers(0, 150_000, 10_000).tolist(), repetition=1.1, presence=0.5)
    out, times = np.empty_like(logits), []
    for token in range(50):
        adjustments.add(token)
        start = time.perf_counter()
        adjustments.apply(logits, out)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.01  # 0.2 ms on a free core


@pytest.mark.parametrize(
    ("some", "message"),
    [
        ({"repetition": 0.0}, "repetition_penalty: 0.0; expected a number above 0"),
        ({"repetition": math.nan}, "repetition_penalty: nan"),
        ({"frequency": math.inf}, "frequency_penalty: inf; expected a finite number"),
        ({"presence": math.nan}, "presence_penalty: nan"),
        ({"bias": {3: math.inf}}, "logit_bias of token 3: inf"),
    ],
)
def test_numbers_that_cannot_be_are_named(some, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Adjustments(**some)
