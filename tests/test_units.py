"""Sizes and times are read as people write them, and written so that they can be read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"), [("2GiB", 2**31), ("512MiB", 2**29), ("1.5KiB", 1536), ("17B", 17), ("2GB", 2 * 10**9), ("1 TiB", 2**40)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("250ms", 0.25), ("1.5h", 5400), ("10m", 600), ("20us", 2e-5)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "5", 5, 5.0, None, True, "s", "-5s", "5 parsecs", "5S", "\u0665s", "5s\n", "1e3s", "5ss", [], "9" * 40 + "s"]
)
def test_what_is_no_time_is_refused_with_what_was_found(text: object) -> None:
    with pytest.raises(ValueError, match="expected a time such as 5s"):
        parse_duration(text)
    with pytest.raises(ValueError, match="expected a size such as 2GiB"):
        parse_size(text)


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0B"), (2**31, "2GiB"), (1536, "1.5KiB"), (1023, "1023B"), (10**12, "931.32GiB")])
def test_sizes_are_written_in_the_largest_unit(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (5, "5s"), (0.25, "250ms"), (90, "1.5m"), (7200, "2h")])
def test_durations_are_written_in_the_largest_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(1, 2**50))
def test_a_written_size_reads_back_within_its_two_decimals(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == pytest.approx(nbytes, rel=0.005)


@given(st.floats(1e-5, 1e6))
def test_a_written_duration_reads_back_within_its_two_decimals(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=0.005)
