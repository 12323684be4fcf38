"""What a pass usually takes, and how long a node may be silent in one."""

import pytest

from dairllm.runtime.pass_clock import FEW, FIRST_SECONDS, FLOOR_SECONDS, PassClock


class Time:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def clock(time: Time) -> PassClock:
    return PassClock(time)


def passes(clock: PassClock, time: Time, rows: int, *seconds: float) -> None:
    for each in seconds:
        with clock.running(rows):
            time.now += each


def test_nothing_is_usual_in_the_beginning(clock: PassClock, time: Time) -> None:
    assert clock.usual_seconds(1) is None
    passes(clock, time, 1, *[2.0] * (FEW - 1))
    assert (clock.usual_seconds(1), clock.silence(1)) == (None, FIRST_SECONDS)
    passes(clock, time, 1, 2.0)
    assert (clock.usual_seconds(1), clock.silence(1)) == (2.0, 20.0)


def test_ten_usual_passes_with_a_floor(clock: PassClock, time: Time) -> None:
    passes(clock, time, 1, *[0.02] * 20)
    assert clock.silence(1) == FLOOR_SECONDS == 5.0
    passes(clock, time, 1, *[3.0] * 20)
    assert clock.silence(1) == 30.0


def test_no_longer_than_a_minute_or_two_passes(clock: PassClock, time: Time) -> None:
    passes(clock, time, 1, *[10.0] * 8)
    assert clock.silence(1) == 60.0
    passes(clock, time, 1, *[100.0] * 20)
    assert clock.silence(1) == 200.0


def test_one_slow_pass_is_not_usual(clock: PassClock, time: Time) -> None:
    """The first one reads from a cold disk."""
    passes(clock, time, 1, 40.0, *[1.0] * 6)
    assert clock.usual_seconds(1) == 1.0


def test_a_prompt_is_given_time_in_proportion_to_its_rows(clock: PassClock, time: Time) -> None:
    passes(clock, time, 1, *[0.1] * 8)
    assert clock.usual_seconds(32) == pytest.approx(3.2)
    assert clock.silence(32) == pytest.approx(32.0)
    passes(clock, time, 32, *[0.8] * 8)
    assert clock.usual_seconds(32) == pytest.approx(0.8), "once there were some, they say more"
    assert clock.usual_seconds(16) == pytest.approx(0.8), "no longer than a larger one"
    assert clock.usual_seconds(1) == pytest.approx(0.1)


def test_a_larger_pass_bounds_a_smaller_one(clock: PassClock, time: Time) -> None:
    passes(clock, time, 32, *[0.9] * 4)
    assert clock.usual_seconds(1) == pytest.approx(0.9)


def test_the_pass_in_hand_is_timed_and_one_that_fails_teaches_nothing(clock: PassClock, time: Time) -> None:
    passes(clock, time, 1, *[1.0] * 5)
    assert clock.running_seconds == 0.0

    def fail() -> None:
        time.now += 50.0
        assert clock.running_seconds == 50.0
        raise OSError("gone")

    for _ in range(20):
        with pytest.raises(OSError, match="gone"), clock.running(1):
            fail()
    assert clock.running_seconds == 0.0
    assert clock.usual_seconds(1) == 1.0


def test_an_opening_begins_anew(clock: PassClock, time: Time) -> None:
    passes(clock, time, 1, *[0.1] * 9)
    clock.forget()
    assert clock.silence(1) == FIRST_SECONDS
