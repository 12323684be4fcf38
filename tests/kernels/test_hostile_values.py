"""Zeros, infinities, NaN, the largest and the smallest numbers: each op has the result that docs/arithmetic.md defines, and raises nothing.

Every form of the kernels computes the same cases in tests/kernels/test_forms.py.
"""

import platform

import numpy as np
import pytest

from dairllm.formats import quants
from dairllm.graph.types import FloatType
from dairllm.kernels import reference
from dairllm.kernels.objects.loader import MACHINES
from tests.kernels import compiled, exact
from tests.kernels.agreement import THREADS, assert_same_bits
from tests.kernels.form_digests import hostile_cases
from tests.kernels.samples import HOSTILE, defined_blocks, floats, hostile
from tests.kernels.start_kernels import own_objects

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80
CASES = list(hostile_cases())


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="objects of x86-64")
def test_compiled_code_has_nothing_to_raise():
    """An exception would be among the object's constants, and numba calls those so."""
    for name, (_, raw) in own_objects().items():
        assert raw.count(b"picklebuf") == 0, name


@pytest.mark.parametrize(("name", "args"), CASES, ids=[f"{number} {name}" for number, (name, _) in enumerate(CASES)])
def test_ops_have_the_defined_bits(name, args):
    with np.errstate(all="ignore"):
        want = getattr(exact, name)(*args)
        for threads in THREADS:
            got = getattr(compiled, name)(*args, threads=threads)
            for one, other in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
                if name == "quantize_q80":
                    one, other = defined_blocks(one), defined_blocks(other)
                assert_same_bits(one, other)


@pytest.mark.parametrize("threads", THREADS)
def test_the_norm_of_zeros(threads):
    """With an epsilon of 0 it raised, and the threads were gone."""
    x = np.zeros((3, 64), np.float32)
    inverse = compiled.inv_rms(x, 0.0, 2, threads)
    assert_same_bits(inverse, np.full((3, 2), np.inf, np.float32))
    assert np.isnan(compiled.rms_norm(x, inverse, np.ones(32, np.float32), threads)).all()
    assert np.isnan(compiled.inv_rms(x, -1.0, 2, threads)).all()


@pytest.mark.parametrize("threads", THREADS)
def test_weights_of_experts_that_sum_to_zero(threads):
    x = np.float32([[0, 0, -1, -2], [3, -3, -4, -5], [-0.0, -0.0, -1, -1], [2, 1, 1, 0]])
    indexes, weights = compiled.moe_gate(x, 2, True, threads)
    assert indexes.tolist() == [[0, 1]] * 4
    assert_same_bits(weights, np.float32([[np.nan, np.nan], [np.inf, -np.inf], [np.nan, np.nan], [2 / 3, 1 / 3]]))


def test_a_nan_is_the_last_that_a_gate_chooses():
    x = np.float32([[np.nan, 1, -np.inf, np.nan, 2]])
    indexes, weights = compiled.moe_gate(x, 5, False)
    assert indexes.tolist() == [[4, 1, 2, 0, 3]]
    assert_same_bits(weights, np.float32([[2, 1, -np.inf, np.nan, np.nan]]))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_softmax_with_a_nan_or_an_infinity_is_nan(rows):
    for value in (np.nan, np.inf):
        x = floats(1, rows, 40, special=0)
        x[:, 7] = value
        assert np.isnan(compiled.softmax(x)).all()
    assert np.isnan(compiled.softmax(np.full((rows, 40), -np.inf, np.float32))).all()
    x = np.full((rows, 3), -np.inf, np.float32)
    x[:, 1] = -3e38
    assert_same_bits(compiled.softmax(x), np.tile(np.float32([0, 1, 0]), (rows, 1)))


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FC00123, 0xFFC000FF, 0x7F800001, 0xFFFFFFFF])
@pytest.mark.parametrize("place", [0, 5, 8, 31])
def test_a_block_with_a_nan_is_nan(payload, place):
    """Wherever it is and whatever its payload: no bit of that reaches the integers."""
    x = floats(3, 1, 32 * 16, special=0)  # eight blocks at a time
    x.view(np.uint32)[0, 3 * 32 + place] = payload
    some = x[:, : 32 * 7].copy()  # one by one
    for row in (x, some):
        blocks = compiled.quantize_q80(row).reshape(-1, 34)
        want = reference.quantize_q80(row).reshape(-1, 34)
        assert np.isnan(blocks[3, :2].copy().view(np.float16)[0])
        assert not blocks[3, 2:].any()
        others = np.arange(len(blocks)) != 3
        assert_same_bits(blocks[others], want[others])
        assert_same_bits(defined_blocks(blocks), defined_blocks(want))
        assert np.isnan(compiled.cast(blocks.reshape(1, -1), Q80, F32)[0, 96:128]).all()


@pytest.mark.parametrize("rows", [1, 4, 17])
@pytest.mark.parametrize("weight_type", [Q40, Q80])
def test_what_is_packed_with_a_nan_makes_its_row_nan_alone(rows, weight_type):
    x = floats(1, rows, 96, special=0)
    x[0, 40] = np.nan
    weights = np.random.default_rng(2).standard_normal((16, 96)).astype(np.float32)
    got = compiled.matmul(quants.quantize(weight_type, weights), weight_type, x, F32)
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1:]).all()


@pytest.mark.parametrize("threads", THREADS)
def test_tokens_that_are_no_tokens(threads):
    tokens = np.float32([np.nan, np.inf, -np.inf, -1, 2.9, 1e30, -0.0, 5])
    table = floats(1, 5, 40, special=0)
    assert_same_bits(compiled.embedding(table, tokens, threads), table[[0, 4, 0, 0, 2, 4, 0, 4]])


@pytest.mark.parametrize("weight_type", [F32, Q40, Q80])
@pytest.mark.parametrize("rows", [1, 6])
def test_experts_that_there_are_not(weight_type, rows):
    weights = quants.quantize(weight_type, floats(1, 3 * 8, 64, special=0)).reshape(3, 8, -1)
    weights = weights.view(np.float32) if weight_type == F32 else weights
    x = floats(2, 2 * rows, 64, special=0).reshape(2, rows, 64)
    active = np.random.default_rng(3).choice([-(2**62), -1, 0, 2, 3, 2**62], (rows, 2))
    got = compiled.expert_matmul(weights, weight_type, x, F32, active)
    assert_same_bits(got, exact.expert_matmul(weights, weight_type, x, F32, np.clip(active, 0, 2)))


@pytest.mark.parametrize("value", HOSTILE, ids=str)
@pytest.mark.parametrize("cache_type", [F32, FloatType.F16, Q80])
def test_caches_hold_what_is_not_finite(value, cache_type):
    """A row of K or V is rounded as it is written, NaN and infinities too."""
    x = hostile(4, 3, 64)
    x[1] = value
    with np.errstate(over="ignore"):
        want = quants.quantize(cache_type, x)
    cache = np.zeros_like(want) if cache_type == Q80 else np.zeros((3, 64), np.float32 if cache_type == F32 else np.float16)
    compiled.shift(cache, x, np.arange(3), cache_type, head_dim=32)
    if cache_type == Q80:
        assert_same_bits(defined_blocks(cache), defined_blocks(want))
    else:
        values = want.view(cache.dtype)
        assert_same_bits(cache.astype(np.float32), values.astype(np.float32))
