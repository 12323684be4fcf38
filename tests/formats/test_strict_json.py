from typing import Any

import pytest

from dairllm.formats.strict_json import read_json, whole_number


def test_a_document() -> None:
    assert read_json(b'{"a": [1, 2.5, "x", null]}') == {"a": [1, 2.5, "x", None]}


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[Infinity]", "-Infinity", "1e400", "-1e400", "[" * 100_000, '{"a":' * 100_000, b"\xff", "9" * 5000],
    ids=lambda text: repr(text[:10]),
)
def test_what_is_none(text: Any) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the parser's, of many kinds
        read_json(text)


def test_whole_numbers() -> None:
    assert whole_number(2**70) == 2**70
    for value in (-1, 1.0, True, "1", None, [], float("inf")):
        with pytest.raises(ValueError, match="a whole number"):
            whole_number(value)
