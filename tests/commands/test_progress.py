"""Signs of life: late enough not to disturb, and none that moves where nobody sees it."""

import asyncio
import time

import pytest
import structlog

from dairllm.commands import progress
from tests.patience import PATIENCE, comes, until


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.05)


def test_what_is_quick_is_silent(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", PATIENCE)
    with progress.waiting("working"):
        pass
    assert capsys.readouterr() == ("", "")


def test_what_takes_long_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.waiting("working"):
        assert comes(lambda: capsys.readouterr() == ("", "working ...\n"))


def test_a_bar_without_a_terminal_is_such_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.byte_bar("converting") as report:
        assert report is None
        assert comes(lambda: capsys.readouterr() == ("", "converting ...\n"))


def test_a_few_things_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.count_bar("working", 2) as report:
        report("on this", 0)
        report("on that", 1)
    assert capsys.readouterr() == ("", "working: on this (1 of 2) ...\nworking: on that (2 of 2) ...\n")


def test_at_a_terminal_it_moves_and_goes_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    with progress.waiting("working"):
        time.sleep(0.5)
    with progress.byte_bar("converting") as report:
        assert report is not None
        report("layer 0", 5, 10)
    for total in (1, 2):
        with progress.count_bar("working", total) as count:
            count("on this", 0)
    assert capsys.readouterr().out == ""


async def test_a_service_tells_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELLING_SECONDS", 0.05)
    with structlog.testing.capture_logs() as logs:
        async with progress.telling("working"):
            await until(lambda: len(logs) >= 2)
        told = list(logs)
        await asyncio.sleep(0.2)
    assert {entry["event"] for entry in told} == {"working"}
    assert all(0 <= entry["seconds"] <= PATIENCE for entry in told)
    assert logs == told, "nothing is told when it is over"


async def test_a_service_does_not_tell_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", PATIENCE)
    with structlog.testing.capture_logs() as logs:
        async with progress.telling("working"):
            await asyncio.sleep(0)
    assert logs == []


def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), progress.waiting("working"):
        raise KeyError


def test_no_color_means_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert progress.is_watched()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not progress.is_watched()
