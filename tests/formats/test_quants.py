import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dairllm.formats.quants import dequantize, dequantize_q40, dequantize_q80, q80_of_q40, quantize, quantize_q40, quantize_q80
from dairllm.graph.types import FloatType, row_bytes

Q4_0, Q8_0 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0

values = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda blocks: blocks * 32)),
    elements=st.floats(-1e4, 1e4, width=32),
)


def half(raw: np.ndarray) -> float:
    return float(raw[:2].view("<f2")[0])


def test_a_q80_block_by_hand() -> None:
    x = np.zeros(32, np.float32)
    x[0], x[1], x[2], x[3], x[31] = 127, -127, 0.5, 1.5, -63.4
    raw = quantize_q80(x)
    # d = 127 / 127 = 1. 0.5 and 1.5 lie between two integers and go to the even one: 0 and 2. -63.4 goes to -63.
    assert half(raw) == 1.0
    assert raw[2:].view(np.int8).tolist() == [127, -127, 0, 2] + [0] * 27 + [-63]
    assert dequantize_q80(raw)[31] == -63.0


def test_q80_takes_the_inverse_of_the_scale_before_it_is_rounded_to_f16() -> None:
    x = np.zeros(32, np.float32)
    x[0], x[1] = 1000, 791.39
    raw = quantize_q80(x)
    # d = 1000 / 127 = 7.874016; as f16 (steps of 1/128 there) it is 7.875.
    # 791.39 / 7.874016 = 100.506 -> 101, where 791.39 / 7.875 = 100.494 would be 100. What comes back of 1000 is 127 * 7.875.
    assert half(raw) == 7.875
    assert raw[2:4].view(np.int8).tolist() == [127, 101]
    assert dequantize_q80(raw)[0] == np.float32(1000.125)


def test_a_q40_block_by_hand() -> None:
    x = np.zeros(32, np.float32)
    x[0], x[1], x[2], x[16], x[17] = -8, 7, 7.6, 0.49, 0.5
    raw = quantize_q40(x)
    # The largest magnitude is -8: d = -8 / -8 = 1. nibble = floor(x + 8.5), at most 15:
    # -8 -> 0, 7 -> 15, 7.6 -> 16 -> 15, 0 -> 8, 0.49 -> 8, 0.5 -> 9.
    # Byte 0: value 0 low (0), value 16 high (8): 0x80. Byte 1: value 1 low (15), value 17 high (9): 0x9f.
    assert half(raw) == 1.0
    assert raw[2:6].tolist() == [0x80, 0x9F, 0x8F, 0x88]
    assert dequantize_q40(raw)[[0, 1, 2, 16, 17, 3]].tolist() == [-8.0, 7.0, 7.0, 0.0, 1.0, 0.0]


def test_the_sign_of_a_q40_scale_is_against_that_of_the_largest_value() -> None:
    x = np.full(32, 1.0, np.float32)
    x[5] = 4.0
    raw = quantize_q40(x)
    # d = 4 / -8 = -0.5: 4 -> floor(-8 + 8.5) = 0, 1 -> floor(-2 + 8.5) = 6. Byte 5 holds values 5 and 21: 0x60.
    assert half(raw) == -0.5
    assert raw[7] == 0x60
    assert dequantize_q40(raw).tolist() == x.tolist()


def test_the_first_of_two_values_of_the_same_magnitude_gives_the_q40_scale() -> None:
    x = np.zeros(32, np.float32)
    x[3], x[9] = 2.0, -2.0
    assert half(quantize_q40(x)) == -0.25
    assert half(quantize_q40(-x)) == 0.25


@pytest.mark.parametrize("quantized", [FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-39])
def test_blocks_too_small_to_have_an_inverse_are_zeros(quantized: FloatType, value: float) -> None:
    raw = quantize(quantized, np.full(32, value, np.float32))
    assert not dequantize(quantized, raw).any()


@pytest.mark.parametrize("quantized", [FloatType.Q40, FloatType.Q80])
def test_values_that_are_not_finite_give_no_warning(quantized: FloatType) -> None:
    x = np.zeros((3, 32), np.float32)
    x[0, 0], x[1, 0], x[2, 0] = np.nan, np.inf, 3e38
    dequantize(quantized, quantize(quantized, x))


@given(values)
@settings(max_examples=60, deadline=None)
def test_q80_is_within_half_a_step(x: np.ndarray) -> None:
    back = dequantize_q80(quantize_q80(x))
    step = np.abs(x.reshape(-1, 32)).max(1, keepdims=True) / 127
    # Half a step for the rounding, and 127 * 2^-11 of a step for that of the scale to f16 (2^-25 is its smallest step's half).
    bound = step * (0.5 + 127 / 2048) + 127 * 2**-25
    assert (np.abs(back - x).reshape(-1, 32) <= bound * 1.0001).all()


@given(values)
@settings(max_examples=60, deadline=None)
def test_q40_is_within_a_step(x: np.ndarray) -> None:
    back = dequantize_q40(quantize_q40(x))
    step = np.abs(x.reshape(-1, 32)).max(1, keepdims=True) / 8
    # Half a step, except for values next to the other end of the scale, where nibble 16 is missing: one step.
    assert (np.abs(back - x).reshape(-1, 32) <= (step * (1 + 8 / 2048) + 8 * 2**-25) * 1.0001).all()


@given(values)
@settings(max_examples=40, deadline=None)
def test_quantizing_what_was_quantized_changes_no_value(x: np.ndarray) -> None:
    for float_type in (FloatType.Q40, FloatType.F16, FloatType.F32):
        once = dequantize(float_type, quantize(float_type, x))
        assert np.array_equal(dequantize(float_type, quantize(float_type, once)), once)


def test_blocks_are_those_of_gguf() -> None:
    x = np.random.default_rng(1).standard_normal((64, 256), dtype=np.float32)
    q40, q80 = quantize_q40(x), quantize_q80(x)
    assert np.array_equal(q40, gguf.quants.quantize(x, Q4_0))
    assert np.array_equal(dequantize_q40(q40), gguf.quants.dequantize(q40, Q4_0))
    assert np.array_equal(dequantize_q80(q80), gguf.quants.dequantize(q80, Q8_0))
    # gguf-py rounds halves away from zero, we to even: only exact halves may differ, and random values have none.
    assert np.array_equal(q80, gguf.quants.quantize(x, Q8_0))


@pytest.mark.parametrize("float_type", [FloatType.F32, FloatType.F16, FloatType.Q40, FloatType.Q80])
def test_shapes(float_type: FloatType) -> None:
    x = np.zeros((2, 3, 64), np.float32)
    raw = quantize(float_type, x)
    assert raw.dtype == np.uint8
    assert raw.shape == (2, 3, row_bytes(float_type, 64))
    assert dequantize(float_type, raw).shape == x.shape
    assert dequantize(float_type, raw).dtype == np.float32


def test_rows_need_not_be_contiguous() -> None:
    x = np.random.default_rng(2).standard_normal((8, 128), dtype=np.float32)
    assert np.array_equal(quantize_q80(x[::2, 32:96]), quantize_q80(x[::2, 32:96].copy()))
    raw = quantize_q40(x)
    assert np.array_equal(dequantize_q40(raw[::2, 18:54]), dequantize_q40(raw)[::2, 32:96])


def test_a_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 33 values is not a whole number of Q40 blocks"):
        quantize_q40(np.zeros(33, np.float32))
    with pytest.raises(ValueError, match="a row of 35 bytes is not a whole number of Q80 blocks of 34"):
        dequantize_q80(np.zeros(35, np.uint8))
    with pytest.raises(ValueError, match="NONE"):
        quantize(FloatType.NONE, np.zeros(32, np.float32))
    with pytest.raises(ValueError, match="NONE"):
        dequantize(FloatType.NONE, np.zeros(32, np.uint8))


def test_q40_blocks_have_the_same_values_as_q80() -> None:
    raw = np.frombuffer(np.random.default_rng(2).bytes(3 * 5 * 18), np.uint8).reshape(3, 5 * 18).copy()
    raw.reshape(-1, 18)[:, :2] = np.array([-0.0371], "<f2").view(np.uint8)
    found = q80_of_q40(raw)
    assert found.shape == (3, 5 * 34)
    assert np.array_equal(dequantize_q80(found), dequantize_q40(raw))
    assert found.reshape(-1, 34)[:, 2:].view(np.int8).min() == -8
