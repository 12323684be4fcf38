"""What a file or a peer says is quoted in messages; whatever it says, a terminal shows one line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.errors import ConfigError, DairllmError, FormatError, RefusedError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 日本, ▁", "plain, é, 日本, ▁"),
        ("\x1b[2J\x07\x00\x7f", "\\x1b[2J\\x07\\x00\\x7f"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b31m", "\\x9b31m"),
        ("turned \u202e round\u2028", "turned \\u202e round\\u2028"),
        ("\udcff\ud800", "\\udcff\\ud800"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 200 + "..."),
        ("\x1b" * 60, "\\x1b" * 50 + "..."),
        (ValueError("no\n"), "no\\n"),
    ],
)
def test_what_is_shown(text: object, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(), st.integers(1, 50))
def test_any_text_is_one_short_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit + 3
    shown.encode()


@pytest.mark.parametrize("kind", [DairllmError, ConfigError, RefusedError])
def test_messages_are_one_line(kind: type[DairllmError]) -> None:
    assert str(kind("it says \x1b]0;title\x07\nand more")) == "it says \\x1b]0;title\\x07\\nand more"
    assert len(str(kind("x" * 10**6))) == 4003


def test_a_file_is_quoted_in_part() -> None:
    error = FormatError(Path("a\nb"), 5, "y" * 1000, "z\x1b" * 1000)
    assert str(error).startswith("a\\nb, byte 5: expected yyyy")
    assert str(error).endswith("...")
    assert "z\\x1bz\\x1b" in str(error)
    assert len(str(error)) < 900
