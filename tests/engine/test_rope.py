"""The table of rotary angles: exact where the definition is exact, and the same bits everywhere."""

import hashlib
import math
import time
from decimal import Decimal, localcontext

import numpy as np
import pytest

from dairllm.engine.rope import MAX_POSITIONS, cos_sin, rope_frequencies, rope_table
from dairllm.errors import GraphError
from dairllm.graph.types import RopeConfig, RopeType, Size
from dairllm.kernels import reference

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803482534211706798")


def config(head_dim=64, theta=10000.0, seq_len=64, rope_type=RopeType.LLAMA, factor=1.0, low=0.0, high=0.0, context=0):
    return RopeConfig(
        rope_type, 1, 0, 0, factor, low, high, context, 0, 0, 0, 0, 0, 0, 0, 0, seq_len, head_dim, 1, theta, Size.none()
    )  # fmt: skip


LLAMA31 = {"theta": 500000.0, "rope_type": RopeType.LLAMA3_1, "factor": 8.0, "low": 1.0, "high": 4.0, "context": 8192}


def exact_cos_sin(angle: Decimal) -> tuple[Decimal, Decimal]:
    """By their series, to 60 digits."""
    with localcontext() as context:
        context.prec = 90
        x = angle % (2 * PI)
        terms = [Decimal(1)]
        for k in range(1, 80):
            terms.append(terms[-1] * x / k)
        return sum(terms[0::4]) - sum(terms[2::4]), sum(terms[1::4]) - sum(terms[3::4])


def ulp(value: np.float32) -> Decimal:
    return Decimal(float(np.spacing(np.abs(value))))


@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0), (96, 1e6), (2, 10000.0), (80, 1.5), (64, 3e38), (64, 1.0)])
def test_frequencies_are_the_exact_ones_rounded_once(head_dim, theta):
    found = rope_frequencies(config(head_dim, theta))
    assert found.dtype == np.float32
    assert found.shape == (head_dim // 2,)
    with localcontext() as context:
        context.prec = 50
        for i, frequency in enumerate(found):
            exact = Decimal(float(np.float32(theta))) ** (Decimal(-2 * i) / head_dim)
            assert abs(Decimal(float(frequency)) - exact) <= ulp(frequency) / 2, i


@pytest.mark.parametrize("rope_type", [RopeType.LLAMA, RopeType.LLAMA3_1])
def test_llama_31_rescales_long_waves(rope_type):
    c = config(128, **LLAMA31 | {"rope_type": rope_type})
    plain, scaled = rope_frequencies(config(128, 500000.0)), rope_frequencies(c)
    wave = 2 * np.pi / plain
    assert (scaled == plain)[wave < 8192 / 4].all()
    assert (scaled == plain / np.float32(8))[wave > 8192].all()
    between = (wave > 8192 / 4) & (wave < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    twin = reference.rope_frequencies(128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, orig_max_seq_len=8192)
    np.testing.assert_allclose(scaled, twin, rtol=2e-7)


def test_falcon_knows_no_scaling():
    c = config(128, **LLAMA31 | {"rope_type": RopeType.FALCON})
    assert np.array_equal(rope_frequencies(c), rope_frequencies(config(128, 500000.0)))


def test_the_table_holds_the_nearest_cosines_and_sines():
    c = config(64, 10000.0, seq_len=40_000)
    table, frequencies = rope_table(c), rope_frequencies(c)
    assert table.shape == (40_000, 32, 2)
    assert table.flags.c_contiguous
    rng = np.random.default_rng(0)
    for position, pair in [
        (0, 0),
        (1, 0),
        (22, 0),
        (355, 0),
        (39_999, 31),
        *zip(rng.integers(0, 40_000, 300), rng.integers(0, 32, 300), strict=True),
    ]:
        exact = exact_cos_sin(int(position) * Decimal(float(frequencies[pair])))
        for found, right in zip(table[position, pair], exact, strict=True):
            assert abs(Decimal(float(found)) - right) <= ulp(found) * Decimal("0.5001"), (position, pair)


def test_the_table_agrees_with_the_twin():
    c = config(64, 10000.0, seq_len=3000)
    twin = reference.rope_table(rope_frequencies(c), np.arange(3000))
    np.testing.assert_allclose(rope_table(c), twin, rtol=0, atol=6e-8)


def test_large_angles_and_those_at_quarter_turns():
    angles = [MAX_POSITIONS - 1.0, 11.0, 355.0, 103993.0, 5419351.0, *(k * math.pi / 2 for k in (1, 2, 3, 4, 1001, 8_000_000))]
    cosines, sines = cos_sin(np.array(angles))
    for angle, *found in zip(angles, cosines, sines, strict=True):
        for value, right in zip(found, exact_cos_sin(Decimal(angle)), strict=True):
            # near a zero the value keeps its leading digits: the reduction loses nothing
            assert abs(Decimal(float(value)) - right) <= max(abs(right) * Decimal("1e-12"), Decimal("1e-25")), angle


def test_the_bits_are_these_on_every_machine():
    plain, scaled = config(64, 10000.0, seq_len=5000), config(128, seq_len=5000, **LLAMA31)
    digests = [hashlib.sha256(rope_table(c).tobytes()).hexdigest()[:16] for c in (plain, scaled)]
    assert digests == ["03c5ad5a266c7b4b", "a9543252c0fee91a"]


def test_a_long_context_takes_a_second_at_most_and_no_large_temporaries():
    c = config(128, 500000.0, seq_len=16_384)
    start = time.perf_counter()
    rope_table(c)
    assert time.perf_counter() - start < 1  # 0.04 s on a free core: an eighth of 131072 positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 63}, "heads of 63"),
        ({"head_dim": 0}, "heads of 0"),
        ({"theta": 0.0}, "a base of 0"),
        ({"theta": -1.0}, "a base of -1"),
        ({"theta": math.nan}, "a base of nan"),
        ({"theta": 0.99}, "a base of 0.99"),
        ({"seq_len": 0}, "0 positions"),
        ({"seq_len": MAX_POSITIONS + 1}, "positions"),
        ({"factor": 0.0}, "scaling by 0"),
        ({"factor": math.nan}, "scaling by nan"),
        ({"factor": 8.0, "low": math.inf}, "frequency factors inf"),
        ({"factor": 8.0, "context": -1}, "context -1"),
        ({"factor": 0.25, "low": 1e6, "high": 1e7, "context": 100}, "4.0 radians a position"),
    ],
)
def test_numbers_that_no_rotation_can_have(changes, message):
    with pytest.raises(GraphError, match=message):
        rope_table(config(**changes))


@pytest.mark.parametrize(
    "changes", [{"low": 4.0, "high": 4.0, "context": 100}, {"low": 0.0, "high": 0.0}, {"low": 8.0, "high": 1.0, "context": 100}]
)
def test_odd_scaling_numbers_give_finite_angles(changes):
    assert np.isfinite(rope_table(config(factor=8.0, **changes))).all()
