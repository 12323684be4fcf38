import io
import sys
from pathlib import Path
from typing import Any

import pytest
import structlog

from dairllm.commands import convert
from dairllm.errors import ConfigError, FormatError
from dairllm.formats.convert import Conversion
from dairllm.formats.random_model import small_spec
from dairllm.graph.types import FloatType


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command hands on, in place of a conversion."""
    calls: list[Any] = []

    def conversion(*arguments: Any) -> Conversion:
        calls.extend(arguments)
        if arguments[3] is not None:
            arguments[3]("embedding", 5, 10)
        return Conversion(small_spec(), {Path("out/x.m"): 2048, Path("out/x.t"): 10}, 0, ("mind the gap",))

    monkeypatch.setattr(convert, "convert_gguf", conversion)
    return calls


@pytest.mark.parametrize(
    ("weights", "weight_type"), [("auto", None), ("q40", FloatType.Q40), ("Q80", FloatType.Q80), ("f32", FloatType.F32)]
)
def test_what_was_written_is_printed(
    asked: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, weights: str, weight_type: FloatType | None
) -> None:
    with structlog.testing.capture_logs() as logs:
        convert.run(tmp_path / "x.gguf", tmp_path / "x.m", weights)
    assert asked == [tmp_path / "x.gguf", tmp_path / "x.m", weight_type, None]
    captured = capsys.readouterr()
    assert captured.out == "out/x.m  2KiB\nout/x.t  10B\n"
    assert captured.err == ""
    assert [(log["log_level"], log["event"]) for log in logs] == [("warning", "mind the gap")]


@pytest.mark.parametrize(("terminal", "no_color", "bar"), [(True, None, True), (True, "1", False), (False, None, False)])
def test_a_bar_only_where_somebody_sees_it(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool, no_color: str | None, bar: bool
) -> None:
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    with structlog.testing.capture_logs():
        convert.run(tmp_path / "x.gguf", tmp_path / "x.m")
    assert (asked[3] is not None) == bar
    assert bool(out.getvalue()) == bar


def test_into_a_folder(asked: list[Any], tmp_path: Path) -> None:
    with structlog.testing.capture_logs():
        convert.run(tmp_path / "some-model.Q4_K_M.gguf", tmp_path)
    assert asked[1] == tmp_path / "some-model.Q4_K_M.m"


def test_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--weights is one of auto, q40, q80, f32, not 'q41'"):
        convert.run(tmp_path / "x.gguf", tmp_path / "x.m", "q41")
    with pytest.raises(FormatError, match="expected a GGUF file, found a folder"):
        convert.run(tmp_path, tmp_path / "x.m")
    with pytest.raises(FormatError, match="no file of this name"):
        convert.run(tmp_path / "x.gguf", tmp_path / "x.m")
