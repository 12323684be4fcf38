"""Values of fields as clients write them, brought into one form: what `dairllm.api.schema` validates with.

JSON has one type of number: 16.0 is an integer, as JSON Schema says. Lists and strings are bounded here.
"""

from collections.abc import Mapping
from typing import Any, LiteralString, NoReturn

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

__all__ = ["MAX_PROMPTS", "Prompt", "as_bias", "as_content", "as_count", "as_off", "as_prompts", "as_stop", "as_whole", "fail"]

MAX_PROMPTS = 256
"""Of one request."""
_MAX_STOPS, _MAX_STOP_CHARACTERS, _MAX_STOPS_CHARACTERS = 1024, 1024, 1 << 14
_MAX_BIASES = 1024

Prompt = str | tuple[int, ...]


def fail(message: str, code: LiteralString = "invalid_value") -> NoReturn:
    raise PydanticCustomError(code, "{message}", {"message": message})


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _unless(nothing: int) -> BeforeValidator:
    """For a number that has one value to say nothing, as null does."""

    def validate(value: object) -> object:
        value = _whole(value)
        return None if type(value) is int and value == nothing else value

    return BeforeValidator(validate)


as_whole = BeforeValidator(_whole)
as_count = _unless(-1)
"""-1 tokens: as many as there is room for."""
as_off = _unless(-1)
"""-1: all."""


def _stop(value: object) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
        fail("expected a string or a list of strings")
    if len(found) > _MAX_STOPS:
        fail(f"expected up to {_MAX_STOPS} strings, found {len(found)}")
    if any(len(word) > _MAX_STOP_CHARACTERS for word in found) or sum(map(len, found)) > _MAX_STOPS_CHARACTERS:
        fail(f"expected strings of up to {_MAX_STOP_CHARACTERS} characters, {_MAX_STOPS_CHARACTERS} in all")
    return tuple(dict.fromkeys(word for word in found if word))


as_stop = BeforeValidator(_stop)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Texts, token ids, or lists of either."""
    if not (isinstance(value, list) and any(isinstance(item, str | list) for item in value)):
        return (_prompt(value),)
    if len(value) > MAX_PROMPTS:
        fail(f"expected up to {MAX_PROMPTS} prompts, found {len(value)}; send several requests instead")
    return tuple(map(_prompt, value))


def _prompt(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not all(type(item) is int for item in value):
        value = [_whole(item) for item in value]
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        fail("expected a string, or a list of token ids, or a list of these")
    return tuple(value)


as_prompts = BeforeValidator(_prompts)


def _content(value: object) -> str:
    """A message's text; parts of text are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        fail("expected a string, null or a list of parts")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            fail(f'part {number}: expected an object such as {{"type": "text", "text": ...}}')
        if kind != "text":
            fail(f"part {number} is of type {kind[:40]!r}; this model takes parts of type 'text' alone", "unsupported_value")
        if not isinstance(part.get("text"), str):
            fail(f"part {number}: expected a string as text")
        texts.append(part["text"])
    return "".join(texts)


as_content = BeforeValidator(_content)


def _bias(value: object) -> Mapping[int, float]:
    """By token id."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        fail('expected an object such as {"50256": -100}')
    if len(value) > _MAX_BIASES:
        fail(f"expected up to {_MAX_BIASES} tokens, found {len(value)}")
    return {_token(name): _number(name, bias) for name, bias in value.items()}


def _token(name: Any) -> int:
    if not (isinstance(name, str) and name.isascii() and name.isdecimal() and len(name) < 10):
        fail(f"expected token ids, found {str(name)[:40]!r}")
    return int(name)


def _number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not -100 <= value <= 100:
        fail(f"token {name}: expected a number from -100 to 100")
    return float(value)


as_bias = BeforeValidator(_bias)
