import pytest

from dairllm.bench.results import Measured, ratio
from dairllm.bench.table import heading, lines, svg

CONDITIONS = {
    "date": "2026-01-01",
    "model": "a.m",
    "processor": "A & B",
    "processors": 2,
    "threads": 2,
    "kernels": "avx2",
    "busy": 0,
    "load": [0.5],
}


@pytest.fixture
def found() -> list[Measured]:
    return [
        Measured("tokens", "generation at 128", "tokens/s", [20.0, 30.0, 22.0], {"other": [10.0, 10.0, 20.0]}, bound=44.0),
        Measured("paging", "a token, 25 % of the weights in memory", "ms", [100.0, 200.0], {"other": [400.0, 500.0]}, bound=75.0),
        Measured("kernels", "rope, 1 row", "ms", [0.25]),
    ]


def test_ratios_are_those_of_pairs() -> None:
    rates = ratio([20, 30, 22], [10, 10, 20], more_is_better=True)
    assert (rates.median, rates.least, rates.most) == (2.0, 1.1, 3.0)
    times = ratio([100, 200], [400, 500], more_is_better=False)
    assert (times.median, times.least, times.most) == (3.25, 2.5, 4.0)


def test_shares_of_the_bound(found: list[Measured]) -> None:
    assert [each.share_of_bound for each in found] == [0.5, 0.5, None]


def test_json(found: list[Measured]) -> None:
    assert found[0].as_json() == {
        "bench": "tokens",
        "what": "generation at 128",
        "unit": "tokens/s",
        "dairllm": {"median": 22.0, "samples": [20.0, 30.0, 22.0]},
        "bound": {"tokens/s": 44.0, "share": 0.5},
        "peers": {"other": {"median": 10.0, "samples": [10.0, 10.0, 20.0], "ratio": {"median": 2.0, "least": 1.1, "most": 3.0}}},
    }
    assert found[2].as_json()["bound"] is None
    assert found[2].as_json()["peers"] == {}


def test_a_table(found: list[Measured]) -> None:
    table = lines(found)
    assert len(table) == 4
    assert table[1].split("  ")[0] == "generation at 128"
    assert "22 tokens/s" in table[1]
    assert "50% of 44" in table[1]
    assert table[1].endswith("2.00 (1.10 .. 3.00) x other (10)")
    assert heading(CONDITIONS) == "2026-01-01, a.m, A & B, 2 processors, 2 threads, kernels avx2, load 0.5"


def test_a_picture_has_a_bar_for_everyone(found: list[Measured]) -> None:
    picture = svg(found, CONDITIONS)
    assert picture.startswith("<svg ")
    assert picture.count("<rect ") == 1 + 3 + 3  # the ground, then ours, theirs and the limit; what has neither is left out
    assert "A &amp; B" in picture
    assert "rope" not in picture
