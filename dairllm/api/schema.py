"""Requests, as OpenAI's API has them, and what other servers of its form take: which fields, of which types.

What becomes of fields that are not here is in `dairllm.api.other_fields`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dairllm.api.api_error import ApiError
from dairllm.api.fields import Prompt, as_bias, as_content, as_count, as_off, as_prompts, as_stop, as_whole, fail
from dairllm.api.other_fields import check_others
from dairllm.config import Sampling
from dairllm.serving.logprobs import MOST_TOP

__all__ = ["ChatRequest", "CompletionRequest", "TextRequest", "parse"]

MAX_COUNT = 2**31 - 1
MAX_CHOICES = 256
"""Answers to one request, to all its prompts together."""
_ROLES = {"developer": "system", "function": "tool"}
"""Names that templates do not know, and what they know them as."""
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_TEMPLATES_OWN = ("messages", "add_generation_prompt", "bos_token", "eos_token")


class _Object(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class StreamOptions(_Object):
    include_usage: bool | None = None


class Message(_Object):
    """What somebody said. Fields that only the model's template knows (a name, calls of tools) go to it as they are."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "user", "assistant", "developer", "tool", "function"]
    content: Annotated[str, as_content] = ""

    @property
    def fields(self) -> dict[str, Any]:
        """As a template is to see it."""
        role = _ROLES.get(self.role, self.role)
        return {"role": role, "content": self.content, **{k: v for k, v in (self.model_extra or {}).items() if v is not None}}


class TextRequest(_Object):
    """What requests for text have in common. None where nothing is said."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    top_k: Annotated[int | None, as_off] = Field(None, ge=0, le=MAX_COUNT)
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    repeat_penalty: float | None = Field(None, gt=0, le=10, allow_inf_nan=False)
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[Mapping[int, float], as_bias] = Field(default_factory=dict)
    seed: Annotated[int | None, as_whole] = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[tuple[str, ...], as_stop] = ()
    ignore_eos: bool | None = None
    n: Annotated[int | None, as_whole] = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that an answer may have, or None."""
        raise NotImplementedError

    def sampling(self, otherwise: Sampling) -> dict[str, Any]:
        """How tokens are chosen, as `Order` has it; `otherwise` says what the request does not."""
        said = {name: getattr(self, name) for name in _SAMPLING}
        if said["repetition_penalty"] is None:
            said["repetition_penalty"] = self.repeat_penalty
        return {name: getattr(otherwise, name) if value is None else value for name, value in said.items()}

    @property
    def n_top(self) -> int | None:
        """How many most probable tokens are to be named beside each token's logprob; None where nothing is to be said of them."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ignored(self) -> list[str]:
        """Names of fields that are passed over; ApiError for one that is refused."""
        return check_others(self.model_extra or {})


class ChatRequest(TextRequest):
    """`POST /v1/chat/completions`."""

    messages: tuple[Message, ...] = Field(min_length=1)
    max_tokens: Annotated[int | None, as_count] = Field(None, ge=1, le=MAX_COUNT)
    max_completion_tokens: Annotated[int | None, as_count] = Field(None, ge=1, le=MAX_COUNT)
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, as_whole] = Field(None, ge=0, le=MOST_TOP)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            fail("top_logprobs: expected logprobs true beside it")
        if self.continue_final_message and self.add_generation_prompt:
            fail("continue_final_message: expected add_generation_prompt false beside it, or nothing")
        if self.continue_final_message and not self.messages[-1].content.strip():
            fail("continue_final_message: the last message has no content that could be continued")
        own = [name for name in _TEMPLATES_OWN if name in (self.chat_template_kwargs or {})]
        if own:
            fail(f"chat_template_kwargs: {own[0]} is not to be set there")
        return self

    @property
    def most_tokens(self) -> int | None:
        """`max_completion_tokens` is the newer name, and comes first."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_top(self) -> int | None:
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionRequest(TextRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[tuple[Prompt, ...], as_prompts]
    max_tokens: Annotated[int | None, as_count] = Field(None, ge=0, le=MAX_COUNT)
    max_completion_tokens: Annotated[int | None, as_count] = Field(None, ge=0, le=MAX_COUNT)
    echo: bool | None = None
    logprobs: Annotated[int | None, as_whole] = Field(None, ge=0, le=MOST_TOP)
    best_of: Annotated[int | None, as_whole] = None

    @model_validator(mode="after")
    def _agree(self) -> "CompletionRequest":
        if self.best_of not in (None, self.n or 1):
            fail(f"best_of: not supported (only {self.n or 1}, as n, is); leave it out", "unsupported_value")
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            fail(f"n: {len(self.prompt)} prompts x {self.n} answers; expected up to {MAX_CHOICES} answers in all")
        return self

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def n_top(self) -> int | None:
        return self.logprobs


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
    kind, param, message = first["type"], _param(first["loc"]), first["msg"]
    if kind == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if not param and kind in ("invalid_value", "unsupported_value"):  # of fields that contradict each other; it names the first of them
        raise ApiError(400, message, code=kind, param=message.partition(":")[0])
    if not param:
        raise ApiError(400, "the body is JSON, but no object", code="invalid_type")
    if kind == "missing":
        raise ApiError(400, f"{param}: the field is missing", code="missing_required_parameter", param=param)
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
