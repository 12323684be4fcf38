"""Requests, as OpenAI's API has them: which fields, of which types, and what we refuse since it would change the answer.

Fields that we do not know are passed over, as all such servers do; fields that we know and cannot honour are refused, unless they ask
for what happens anyway (`n: 1`, an empty list of tools).
"""

import json
from typing import Annotated, Any, Literal, LiteralString, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from dairllm.api.api_error import ApiError

__all__ = ["ChatRequest", "CompletionRequest", "TextRequest", "parse"]

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1024
MAX_COUNT = 2**31 - 1


def _stop(value: object) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if found is None:
        return ()
    if not isinstance(found, list | tuple) or not all(isinstance(word, str) for word in found):
        _fail(f"expected a string or up to {MAX_STOPS} strings")
    if len(found) > MAX_STOPS:
        _fail(f"expected up to {MAX_STOPS} strings, found {len(found)}")
    if not all(1 <= len(word) <= MAX_STOP_CHARACTERS for word in found):
        _fail(f"expected strings of 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(found)


def _prompt(value: object) -> str | tuple[int, ...]:
    """One prompt: a text, or token ids, or a list with one of these."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and any(isinstance(item, str | list) for item in value):
        _fail(f"expected one prompt, found {len(value)}; send several requests instead")
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        _fail("expected a string, or a list of token ids")
    return tuple(value)


def _content(value: object) -> str:
    """A message's text; parts of text are joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        _fail("expected a string, null or a list of parts")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            _fail(f'part {number}: expected an object such as {{"type": "text", "text": ...}}')
        if kind != "text":
            _fail(f"part {number} is of type {kind[:40]!r}; this model takes parts of type 'text' alone", "unsupported_value")
        if not isinstance(part.get("text"), str):
            _fail(f"part {number}: expected a string as text")
        texts.append(part["text"])
    return "".join(texts)


def _only(*allowed: Any, what: str = "not supported") -> BeforeValidator:
    """For a field that we cannot honour: it may ask for what happens anyway."""

    def validate(value: object) -> None:
        if not any(value == one and type(value) is type(one) for one in (None, *allowed)):
            taken = f" (only {json.dumps(allowed[0])} is)" if allowed else ""
            _fail(f"{what}{taken}; leave it out", "unsupported_value")

    return BeforeValidator(validate)


def _fail(message: str, code: LiteralString = "invalid_value") -> NoReturn:
    raise PydanticCustomError(code, "{message}", {"message": message})


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(_Object):
    include_usage: bool | None = None


class Message(_Object):
    """What somebody said. Fields that only the model's template knows (a name, calls of tools) go to it as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant", "developer", "tool"]
    content: Annotated[str, BeforeValidator(_content)] = ""

    @property
    def fields(self) -> dict[str, Any]:
        """As a template is to see it."""
        return {"role": self.role, "content": self.content, **{k: v for k, v in (self.model_extra or {}).items() if v is not None}}


class TextRequest(_Object):
    """What requests for text have in common. None where nothing is said."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: Annotated[None, _only(1, what="more than one answer a request is not supported")] = None
    frequency_penalty: Annotated[None, _only(0, 0.0)] = None
    presence_penalty: Annotated[None, _only(0, 0.0)] = None
    logit_bias: Annotated[None, _only({})] = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that the answer may have, or None."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(TextRequest):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_COUNT)

    tools: Annotated[None, _only([])] = None
    functions: Annotated[None, _only([])] = None
    tool_choice: Annotated[None, _only("none", "auto")] = None
    function_call: Annotated[None, _only("none", "auto")] = None
    response_format: Annotated[None, _only({"type": "text"})] = None
    logprobs: Annotated[None, _only(False)] = None
    top_logprobs: Annotated[None, _only(0)] = None
    modalities: Annotated[None, _only(["text"])] = None
    audio: Annotated[None, _only()] = None

    @property
    def most_tokens(self) -> int | None:
        """`max_completion_tokens` is the newer name, and comes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(TextRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[str | tuple[int, ...], BeforeValidator(_prompt)]

    best_of: Annotated[None, _only(1)] = None
    echo: Annotated[None, _only(False)] = None
    logprobs: Annotated[None, _only()] = None
    suffix: Annotated[None, _only("")] = None


RequestT = TypeVar("RequestT", bound=TextRequest)


def parse(schema: type[RequestT], body: bytes) -> RequestT:
    """A request's body, checked.

    Raises:
        ApiError: it is no JSON, or not of this schema; names the first field that is wrong.
    """
    try:
        return schema.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    kind, param = first["type"], _param(first["loc"])
    if kind == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not param:
        raise ApiError(400, "the body is JSON, but no object", code="invalid_type")
    if kind == "missing":
        raise ApiError(400, f"{param}: the field is missing", code="missing_required_parameter", param=param)
    message = first["msg"]
    if kind == "too_short":
        message = "expected at least one"
    elif message.startswith("Input should "):
        message = f"expected {message.removeprefix('Input should ').removeprefix('be ')}, found {_shown(first['input'])}"
    code = kind if kind == "unsupported_value" else "invalid_type" if kind.endswith("_type") else "invalid_value"
    raise ApiError(400, f"{param}: {message}", code=code, param=param)


def _param(location: tuple[int | str, ...]) -> str:
    """`messages[0].role`"""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(value: object) -> str:
    """A value, short; of a list or an object only what it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
