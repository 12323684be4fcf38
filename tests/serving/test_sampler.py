"""The sampler: greedy, temperature, top-p, and that a draw depends on nothing but what it should."""

import math
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dairllm.errors import ConfigError, EngineError
from dairllm.serving.sampler import Sampler

LOGITS = np.float32([0.0, 2.0, 1.0, -1.0, 2.0, -math.inf])


def probabilities(logits, temperature):
    e = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return e / e.sum()


def nucleus(logits, temperature, top_p):
    """Ids of the fewest most probable tokens that reach top_p, by sorting."""
    p = probabilities(logits, temperature)
    order = np.argsort(-p, kind="stable")
    return set(order[: 1 + int(np.searchsorted(p[order].cumsum(), top_p * (1 - 1e-9)))].tolist())


def frequencies(sampler, logits, n):
    counts = Counter(sampler.sample(logits) for _ in range(n))
    return np.array([counts[i] / n for i in range(logits.size)])


def test_greedy_takes_the_best_and_of_equal_ones_the_lower_id():
    assert Sampler().sample(LOGITS) == 1


@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
def test_tokens_are_as_frequent_as_their_probability(temperature):
    n = 8000
    found = frequencies(Sampler(temperature, seed=5), LOGITS, n)
    assert np.abs(found - probabilities(LOGITS, temperature)).max() < 4 * math.sqrt(0.25 / n)
    assert found[5] == 0


def test_top_p_draws_from_the_nucleus_in_proportion():
    logits = np.log(np.float32([0.05, 0.4, 0.15, 0.3, 0.1]))
    found = frequencies(Sampler(1.0, 0.8, seed=1), logits, 8000)
    assert found[[0, 4]].tolist() == [0, 0]
    assert np.abs(found[[1, 2, 3]] - np.array([0.4, 0.15, 0.3]) / 0.85).max() < 0.02


def test_of_equal_tokens_at_the_edge_of_the_nucleus_the_lower_ids_stay():
    found = frequencies(Sampler(1.0, 0.5), np.zeros(8, np.float32), 1000)
    assert (found[:4] > 0.2).all()
    assert found[4:].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_the_nucleus_holds_one_token_at_least(top_p):
    assert {Sampler(1.0, top_p, seed).sample(LOGITS) for seed in range(50)} == {1}


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-12, 12, width=32)),
    temperature=st.floats(0.25, 4),
    top_p=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**64 - 1),
)
def test_whatever_is_drawn_lies_in_the_nucleus(logits, temperature, top_p, seed):
    # one part in a million: the sampler's exponentials are float32
    assert Sampler(temperature, top_p, seed).sample(logits) in nucleus(logits, temperature, min(1.0, top_p + 1e-5))


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_the_nucleus_of_a_large_vocabulary_is_the_sorted_one(spread, top_p):
    logits = (np.random.default_rng(3).standard_normal(50_000) * spread).astype(np.float32)
    sampler = Sampler(1.0, top_p, 11)
    drawn = {sampler.sample(logits) for _ in range(50)}
    assert drawn <= nucleus(logits, 1.0, top_p + 1e-5)
    assert len(drawn) > 1 or len(nucleus(logits, 1.0, top_p)) < 50


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6, 100])
def test_top_k_draws_from_the_k_best_in_proportion(k):
    logits = np.log(np.float32([0.05, 0.4, 0.15, 0.3, 0.1, 1e-3]))
    p = probabilities(logits, 1.0)
    expected = np.where(p >= np.sort(p)[-min(k, 6)], p, 0)
    found = frequencies(Sampler(1.0, top_k=k, seed=3), logits, 8000)
    assert np.abs(found - expected / expected.sum()).max() < 0.02
    assert (found[expected == 0] == 0).all()


def test_of_equal_tokens_at_the_edge_of_top_k_the_lower_ids_stay():
    found = frequencies(Sampler(1.0, top_k=3), np.zeros(8, np.float32), 500)
    assert (found[:3] > 0.2).all()
    assert found[3:].tolist() == [0] * 5


def test_min_p_draws_from_what_is_not_much_less_probable_than_the_best():
    logits = np.log(np.float32([0.05, 0.4, 0.15, 0.3, 0.1]))
    found = frequencies(Sampler(1.0, min_p=0.3, seed=4), logits, 8000)
    assert found[[0, 4]].tolist() == [0, 0]  # below 0.3 x 0.4
    assert np.abs(found[[1, 2, 3]] - np.array([0.4, 0.15, 0.3]) / 0.85).max() < 0.02
    assert {Sampler(1.0, min_p=1.0, seed=seed).sample(logits) for seed in range(20)} == {1}


@settings(max_examples=60, deadline=None)
@given(
    logits=hnp.arrays(np.float32, st.integers(1, 300), elements=st.floats(-12, 12, width=32)),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    seed=st.integers(0, 2**64 - 1),
)
def test_the_filters_are_those_of_transformers(logits, top_k, top_p, min_p, seed):
    """TopKLogitsWarper, TopPLogitsWarper and MinPLogitsWarper, one after the other, in float64."""
    scores = logits.astype(np.float64)
    if top_k:
        scores[scores < np.sort(scores)[-min(top_k, scores.size)]] = -math.inf
    order = np.argsort(-scores, kind="stable")
    p = probabilities(scores, 1.0)
    before = p[order].cumsum() - p[order]
    scores[order[before > top_p + 1e-5]] = -math.inf
    p = probabilities(scores, 1.0)
    scores[p < (min_p - 1e-5) * p.max()] = -math.inf
    token = Sampler(1.0, top_p, seed, top_k=top_k, min_p=min_p).sample(logits)
    assert scores[token] > -math.inf


def test_the_ids_of_a_seed_are_these_on_every_machine():
    """Recorded once: a change of any bit of the arithmetic or of the generator shows here."""
    logits = np.arange(-500, 500, dtype=np.float32) * np.float32(0.006)
    drawn = {top_p: [Sampler(0.9, top_p, 42, draws=k).sample(logits) for k in range(8)] for top_p in (1.0, 0.6)}
    assert drawn == {
        1.0: [922, 726, 731, 548, 997, 783, 809, 719],
        0.6: [958, 894, 895, 872, 998, 907, 914, 893],
    }


def test_a_resumed_generation_goes_on_with_the_same_tokens():
    whole = Sampler(1.0, 0.9, seed=7)
    ids = [whole.sample(LOGITS) for _ in range(20)]
    resumed = Sampler(1.0, 0.9, seed=7, draws=12)
    assert [resumed.sample(LOGITS) for _ in range(8)] == ids[12:]
    assert resumed.draws == 20


def test_seeds_and_draws_differ():
    logits = np.zeros(1 << 16, np.float32)
    one, other = (Sampler(1.0, seed=seed) for seed in (1, 2))
    first, second = ([s.sample(logits) for _ in range(100)] for s in (one, other))
    assert len(set(first)) > 95
    assert len(set(first) & set(second)) < 5
    assert Sampler(1.0, seed=-1).sample(logits) == Sampler(1.0, seed=2**64 - 1).sample(logits)


def test_the_logits_are_left_as_they_are():
    logits = LOGITS.copy()
    logits.setflags(write=False)
    Sampler(0.7, 0.9).sample(logits)


def test_a_change_of_vocabulary_is_followed():
    sampler = Sampler(1.0, 0.9)
    assert sampler.sample(np.float32([0, 90])) == 1
    assert sampler.sample(np.float32([0, 1, 2, 90])) == 3


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e300])
def test_extreme_temperatures_are_greedy_or_flat(temperature):
    drawn = {Sampler(temperature, seed=seed).sample(LOGITS) for seed in range(200)}
    assert drawn == ({1, 4} if temperature < 1 else {0, 1, 2, 3, 4})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_numbers_gone_wrong_are_an_error_that_names_the_logit(bad, temperature):
    logits = LOGITS.copy()
    logits[3] = bad
    with pytest.raises(EngineError, match=f"logit 3 of 6 is {bad}"):
        Sampler(temperature).sample(logits)


@pytest.mark.parametrize("logits", [np.full(4, -np.inf, np.float32), np.zeros(0, np.float32), np.zeros((2, 3), np.float32)])
def test_logits_that_leave_no_choice_are_an_error(logits):
    with pytest.raises(EngineError, match="logit"):
        Sampler(1.0).sample(logits)


@pytest.mark.parametrize("some", [{"top_k": -1}, {"min_p": 1.5}, {"min_p": -0.1}, {"min_p": math.nan}])
def test_filters_out_of_range_are_named(some):
    with pytest.raises(ConfigError, match=next(iter(some))):
        Sampler(1.0, **some)


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (math.nan, 1), (math.inf, 1), (1, 1.5), (1, -0.1), (1, math.nan)])
def test_settings_out_of_range_are_named(temperature, top_p):
    with pytest.raises(ConfigError, match="temperature" if top_p == 1 else "top_p"):
        Sampler(temperature, top_p)


def test_a_large_vocabulary_is_sampled_in_milliseconds():
    logits = (np.random.default_rng(0).standard_normal(150_000) * 3).astype(np.float32)
    sampler, times = Sampler(0.8, 0.95), []
    for _ in range(20):
        start = time.perf_counter()
        sampler.sample(logits)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02  # 1.8 ms on a free core
