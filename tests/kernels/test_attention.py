"""Rotary embedding, the KV cache, attention: one row dealt by chunks, a batch dealt by rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.graph.types import FloatType, RopeType
from dairllm.kernels import reference
from dairllm.kernels.sizes import attention_rows_together, attention_scratch_bytes
from tests.kernels import compiled, exact
from tests.kernels.agreement import THREADS, assert_close, assert_same_bits, check
from tests.kernels.samples import floats, rows_of_blocks, seeds

F16, Q80 = FloatType.F16, FloatType.Q80


def angles(positions, head_dim):
    return reference.rope_table(reference.rope_frequencies(head_dim, 10000.0), np.arange(positions))


@pytest.mark.parametrize("rope_type", list(RopeType))
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 6), (4, 8), (3, 16), (2, 24), (5, 64), (2, 128), (9, 80)])
@pytest.mark.parametrize("rows", [1, 5])
def test_turning_heads(rope_type, heads, head_dim, rows):
    x = floats(head_dim, rows, heads * head_dim)
    got, twin = check("rope", x, angles(rows, head_dim), rope_type)
    first, second, _ = reference.rope_pairs(heads * head_dim, head_dim, rope_type)
    size = np.empty_like(x)
    size[:, first] = size[:, second] = np.abs(x[:, first]) + np.abs(x[:, second])
    assert_close(got, twin, size)


def test_turning_keeps_lengths():
    x = floats(1, 4, 128, special=0)
    for rope_type in RopeType:
        turned = compiled.rope(x, angles(4, 32), rope_type)
        np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(x, axis=1), rtol=1e-5)
        assert_same_bits(turned[0], x[0])  # position 0


@pytest.mark.parametrize(("kv_dim", "head_dim"), [(8, 8), (24, 8), (48, 16), (128, 64), (72, 24)])
@pytest.mark.parametrize("positions", [[0], [63], [64], [69], [3, 4, 5, 6, 7], list(range(30, 70))])
def test_rows_go_to_their_place_in_the_cache(kv_dim, head_dim, positions):
    x = floats(1, len(positions), kv_dim)
    for threads in THREADS:
        cache = floats(2, 70, kv_dim)
        want = cache.copy()
        reference.shift(want, x, np.array(positions))
        compiled.shift(cache, x, np.array(positions), threads=threads, head_dim=head_dim)
        assert_same_bits(cache, want)


@pytest.mark.parametrize(("kv_dim", "head_dim"), [(8, 8), (24, 8), (72, 24), (128, 64)])
@pytest.mark.parametrize("positions", [[0], [63], [64], list(range(30, 70))])
def test_rows_go_to_a_cache_of_halves(kv_dim, head_dim, positions):
    x = floats(1, len(positions), kv_dim)
    assert (np.abs(x) > 65520).any() or len(positions) == 1  # what becomes infinite
    for threads in THREADS:
        cache = floats(2, 70, kv_dim, special=0).astype(np.float16)
        want = cache.copy()
        reference.shift(want, x, np.array(positions), F16)
        compiled.shift(cache, x, np.array(positions), F16, threads=threads, head_dim=head_dim)
        assert_same_bits(cache, want)


@pytest.mark.parametrize(("kv_dim", "head_dim"), [(32, 32), (96, 32), (128, 64), (192, 96), (640, 320)])
@pytest.mark.parametrize("positions", [[0], [63], [64], [3, 4, 5, 6, 7], list(range(30, 70))])
def test_rows_go_to_a_cache_of_blocks(kv_dim, head_dim, positions):
    x = floats(1, len(positions), kv_dim)
    for threads in THREADS:
        cache = rows_of_blocks(2, Q80, 70, kv_dim // 32)
        want = cache.copy()
        reference.shift(want, x, np.array(positions), Q80)
        compiled.shift(cache, x, np.array(positions), Q80, threads=threads, head_dim=head_dim)
        assert_same_bits(cache, want)


def check_attention(seed, rows, last, heads, group, head_dim, spread=1.0):
    """`rows` rows, the last of which stands at position `last`."""
    n_kv, length = -(-heads // group), last + 1
    q = floats(seed, rows, heads * head_dim, spread=spread, special=0.02)
    keys, values = (floats(seed + i, length, n_kv * head_dim, special=0.02) for i in (1, 2))
    q, keys, values = (np.clip(v, -1e4, 1e4) for v in (q, keys, values))
    args = q, keys, values, np.arange(last - rows + 1, length), head_dim, group
    got, twin = check("attention", *args)
    # the scores' rounding shifts the weights: by their size, at most
    largest = np.abs(q).max() * np.abs(keys).max() * np.sqrt(head_dim)
    assert_close(got, twin, np.abs(values).max() * (1 + largest))


@pytest.mark.parametrize("last", [0, 1, 2, 3, 4, 7, 8, 62, 63, 64, 65, 127, 128, 200, 321])
@pytest.mark.parametrize(("heads", "group"), [(4, 2), (3, 3)])
def test_one_row_at_any_position(last, heads, group):
    check_attention(last, 1, last, heads, group, 16)


@pytest.mark.parametrize(("rows", "last"), [(2, 1), (5, 70), (17, 130), (33, 96), (40, 39)])
def test_batches(rows, last):
    check_attention(rows, rows, last, 4, 2, 16)


@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 80, 96, 128, 192])
@pytest.mark.parametrize("rows", [1, 3])
def test_heads_of_any_width(head_dim, rows):
    check_attention(head_dim, rows, 70, 2, 1, head_dim)


@pytest.mark.parametrize("group", range(1, 10))
@pytest.mark.parametrize("rows", [1, 2])
def test_any_number_of_heads_on_one_key(group, rows):
    check_attention(group, rows, 66, 2 * group, group, 32)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (5, 3), (7, 4), (1, 4)])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_node_may_hold_part_of_a_group(heads, group, rows):
    check_attention(heads, rows, 66, heads, min(group, heads), 16)


@settings(max_examples=25, deadline=None)
@given(
    seed=seeds,
    last=st.integers(0, 150),
    rows=st.integers(1, 9),
    head_dim=st.sampled_from([8, 16, 64]),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_any_attention(seed, last, rows, head_dim, spread):
    check_attention(seed, min(rows, last + 1), last, 4, 2, head_dim, spread)


def test_scores_far_apart_leave_one_value():
    """The weights of all others are exactly zero, in other chunks too."""
    q, keys, values = np.full((1, 16), 100, np.float32), np.zeros((150, 16), np.float32), floats(1, 150, 16, special=0)
    keys[77] = 1
    for module in (compiled, exact):
        assert_same_bits(module.attention(q, keys, values, np.array([149]), 16, 1), values[77:78])


def test_a_row_has_the_same_bits_alone_and_in_any_batch():
    q, keys, values = floats(1, 40, 64, special=0), floats(2, 90, 32, special=0), floats(3, 90, 32, special=0)
    positions = np.arange(50, 90)
    alone = np.concatenate([compiled.attention(q[i : i + 1], keys, values, positions[i : i + 1], 16, 2) for i in range(40)])
    assert_same_bits(compiled.attention(q, keys, values, positions, 16, 2), alone)
    parts = [compiled.attention(q[part], keys, values, positions[part], 16, 2, threads=3) for part in (slice(7), slice(7, 40))]
    assert_same_bits(np.concatenate(parts), alone)


def check_rounded(seed, rows, last, heads, group, head_dim, cache_type):
    """As `check_attention`, over caches of another type; also demands that what is in them counts as its values."""
    n_kv, length = -(-heads // group), last + 1
    q = np.clip(floats(seed, rows, heads * head_dim, special=0.02), -1e4, 1e4)
    cached = [np.clip(floats(seed + i, length, n_kv * head_dim, special=0.02), -1e4, 1e4) for i in (1, 2)]
    keys, values = (x.astype(np.float16) if cache_type == F16 else reference.quantize_q80(x) for x in cached)
    positions = np.arange(last - rows + 1, length)
    got, twin = check("attention", q, keys, values, positions, head_dim, group, cache_type)
    read = [reference.dequantize(cache_type, x) for x in (keys, values)]
    assert_same_bits(got, compiled.attention(q, *read, positions, head_dim, group))
    largest = np.abs(q).max() * np.abs(read[0]).max() * np.sqrt(head_dim)
    assert_close(got, twin, np.abs(read[1]).max() * (1 + largest))


@pytest.mark.parametrize("cache_type", [F16, Q80])
@pytest.mark.parametrize("last", [0, 1, 3, 4, 7, 8, 62, 63, 64, 65, 128, 200])
@pytest.mark.parametrize(("heads", "group"), [(4, 2), (3, 3)])
def test_one_row_over_rounded_caches(last, heads, group, cache_type):
    check_rounded(last, 1, last, heads, group, 32, cache_type)


@pytest.mark.parametrize("cache_type", [F16, Q80])
@pytest.mark.parametrize(("rows", "last"), [(2, 1), (3, 65), (5, 70), (17, 130), (40, 39), (66, 129)])
def test_batches_over_rounded_caches(rows, last, cache_type):
    check_rounded(rows, rows, last, 4, 2, 32, cache_type)


@pytest.mark.parametrize(
    ("head_dim", "cache_type"), [*((n, F16) for n in (8, 24, 40, 64, 128, 192)), *((n, Q80) for n in (32, 64, 96, 128, 160, 256))]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_rounded_heads_of_any_width(head_dim, rows, cache_type):
    check_rounded(head_dim, rows, 70, 2, 1, head_dim, cache_type)


@pytest.mark.parametrize("cache_type", [F16, Q80])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (5, 3), (7, 4), (8, 8), (18, 9)])
@pytest.mark.parametrize("rows", [1, 2])
def test_any_group_over_rounded_caches(heads, group, rows, cache_type):
    check_rounded(heads, rows, 66, heads, group, 32, cache_type)


def test_halves_of_any_size():
    """Every finite half, the subnormal ones too."""
    bits = np.arange(0x7C00, dtype=np.uint16)
    keys = np.concatenate([bits, bits | 0x8000]).view(np.float16).reshape(-1, 512)
    values = keys[::-1].copy()
    check("attention", floats(1, 3, 1024, spread=1e-3, special=0), keys, values, np.arange(121, 124), 256, 2, F16)


def test_blocks_of_any_bytes():
    """-128 is read as it stands; scales may be of any size."""
    q = floats(1, 3, 128, spread=0.01, special=0)
    keys, values = (rows_of_blocks(seed, Q80, 90, 2) for seed in (2, 3))
    assert (keys == 0x80).any()
    check("attention", q, keys, values, np.arange(87, 90), 64, 2, Q80)


@pytest.mark.parametrize("cache_type", [F16, Q80])
def test_a_row_over_rounded_caches_has_the_same_bits_alone_and_in_any_batch(cache_type):
    q, positions = floats(1, 40, 128, special=0), np.arange(50, 90)
    raw = (floats(seed, 90, 64, special=0) for seed in (2, 3))
    keys, values = (x.astype(np.float16) if cache_type == F16 else reference.quantize_q80(x) for x in raw)
    alone = np.concatenate([compiled.attention(q[i : i + 1], keys, values, positions[i : i + 1], 32, 2, cache_type) for i in range(40)])
    for threads in THREADS:
        for start in (0, 1, 7):
            got = compiled.attention(q[start:], keys, values, positions[start:], 32, 2, cache_type, threads=threads)
            assert_same_bits(got, alone[start:])


@pytest.mark.parametrize("cache_type", [FloatType.F32, Q80])
@pytest.mark.parametrize(("max_chunks", "together"), [(2, 4), (5000, 3), (8000, 2), (20000, 1)])
def test_a_long_context_takes_fewer_rows_together(max_chunks, together, cache_type):
    """Room for a million positions must not take a thread's scratch along, nor change a bit."""
    assert attention_rows_together(1, 64, max_chunks) == together
    assert attention_scratch_bytes(1, 64, max_chunks) < 6 << 20
    q, positions = floats(1, 6, 64, special=0), np.arange(74, 80)
    keys, values = (reference.cast(floats(seed, 80, 64, special=0), FloatType.F32, cache_type) for seed in (2, 3))
    want = exact.attention(q, keys, values, positions, 64, 1, cache_type)
    assert_same_bits(compiled.attention(q, keys, values, positions, 64, 1, cache_type, max_chunks=max_chunks), want)
