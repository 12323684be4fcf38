"""The numbers of threads that were fastest in a trial are taken, and only if they are clearly faster than the first ones."""

import pytest

from dairllm.paging.thread_tuning import Effort, possible_efforts
from dairllm.runtime.autotuner import Trial


def run(efforts: list[Effort], seconds: dict[Effort, float]) -> tuple[Trial[Effort], list[Effort]]:
    trial, tried = Trial(efforts, passes=3, settling=1), []
    while not trial.over:
        tried.append(trial.way)
        trial.passed(seconds[trial.way])
        assert len(tried) < 1000
    return trial, tried


def test_the_fastest_is_taken_after_each_was_tried_as_often() -> None:
    efforts = possible_efforts(None, None, most_threads=8, first_readers=2)
    assert efforts[0] == (8, 2)
    assert {effort.threads for effort in efforts} == {8, 7, 4}
    assert {effort.readers for effort in efforts} == {1, 2}
    trial, tried = run(efforts, dict.fromkeys(efforts, 1.0) | {Effort(7, 1): 0.8})
    assert trial.way == (7, 1)
    assert {tried.count(effort) for effort in efforts} == {len(tried) // len(efforts)}
    trial.passed(100.0)
    assert trial.way == (7, 1)  # it stays


def test_what_is_hardly_faster_is_not_taken() -> None:
    efforts = possible_efforts(None, None, most_threads=2, first_readers=1)
    trial, _ = run(efforts, dict.fromkeys(efforts, 1.0) | {Effort(1, 2): 0.98})
    assert trial.way == (2, 1)


def test_one_slow_pass_decides_nothing() -> None:
    efforts = [Effort(2, 2), Effort(1, 2)]
    trial, seen = Trial(efforts, passes=3, settling=1), 0
    while not trial.over:
        seen += trial.way == (1, 2)
        trial.passed(0.7 if trial.way == (1, 2) and seen != 2 else 1.0)
    assert trial.way == (1, 2)


@pytest.mark.parametrize(("threads", "readers"), [(1, 3), (16, 1)])
def test_what_is_set_is_not_tried(threads: int, readers: int) -> None:
    (effort,) = possible_efforts(threads, readers, most_threads=4, first_readers=2)
    assert effort == (min(threads, 4), readers)
    trial = Trial([effort])
    assert trial.over
    assert trial.way == effort


def test_one_thread_is_not_made_fewer() -> None:
    assert possible_efforts(None, 2, most_threads=1, first_readers=1) == [(1, 2)]
