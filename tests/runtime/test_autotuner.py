"""The numbers of threads that were fastest in a tuner are taken, and only if they are clearly faster than the first ones."""

import pytest

from dairllm.paging.thread_configuration import ThreadConfiguration, thread_configurations
from dairllm.runtime.autotuner import Autotuner


def run(
    configurations: list[ThreadConfiguration], seconds: dict[ThreadConfiguration, float]
) -> tuple[Autotuner[ThreadConfiguration], list[ThreadConfiguration]]:
    tuner, tried = Autotuner(configurations, passes=3, settling=1), []
    while not tuner.over:
        tried.append(tuner.configuration)
        tuner.passed(seconds[tuner.configuration])
        assert len(tried) < 1000
    return tuner, tried


def test_the_fastest_is_taken_after_each_was_tried_as_often() -> None:
    configurations = thread_configurations(None, None, most_threads=8, first_readers=2)
    assert configurations[0] == (8, 2)
    assert {configuration.threads for configuration in configurations} == {8, 7, 4}
    assert {configuration.readers for configuration in configurations} == {1, 2}
    tuner, tried = run(configurations, dict.fromkeys(configurations, 1.0) | {ThreadConfiguration(7, 1): 0.8})
    assert tuner.configuration == (7, 1)
    assert {tried.count(configuration) for configuration in configurations} == {len(tried) // len(configurations)}
    tuner.passed(100.0)
    assert tuner.configuration == (7, 1)  # it stays


def test_what_is_hardly_faster_is_not_taken() -> None:
    configurations = thread_configurations(None, None, most_threads=2, first_readers=1)
    tuner, _ = run(configurations, dict.fromkeys(configurations, 1.0) | {ThreadConfiguration(1, 2): 0.98})
    assert tuner.configuration == (2, 1)


def test_one_slow_pass_decides_nothing() -> None:
    configurations = [ThreadConfiguration(2, 2), ThreadConfiguration(1, 2)]
    tuner, seen = Autotuner(configurations, passes=3, settling=1), 0
    while not tuner.over:
        seen += tuner.configuration == (1, 2)
        tuner.passed(0.7 if tuner.configuration == (1, 2) and seen != 2 else 1.0)
    assert tuner.configuration == (1, 2)


@pytest.mark.parametrize(("threads", "readers"), [(1, 3), (16, 1)])
def test_what_is_set_is_not_tried(threads: int, readers: int) -> None:
    (configuration,) = thread_configurations(threads, readers, most_threads=4, first_readers=2)
    assert configuration == (min(threads, 4), readers)
    tuner = Autotuner([configuration])
    assert tuner.over
    assert tuner.configuration == configuration


def test_one_thread_is_not_made_fewer() -> None:
    assert thread_configurations(None, 2, most_threads=1, first_readers=1) == [(1, 2)]
