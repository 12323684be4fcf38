"""A conversation, written as the model was taught to read it: the model's Jinja template, rendered.

A template is a program that came with a file from somewhere, and is treated like one: it runs in Jinja's sandbox, sees the
conversation and a few functions that such templates count on, reads no file, and cannot grow without bound. The environment is the
one that Hugging Face's `apply_chat_template` sets up, since that is what templates are written for.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dairllm.errors import DairllmError

__all__ = ["MAX_PROMPT_CHARACTERS", "ChatTemplateError", "render_chat"]

MAX_PROMPT_CHARACTERS = 16 << 20
"""Longer prompts are refused. A context of a million tokens is about four million characters."""

_MAX_INTEGER_BITS = 4096
_MAX_JSON_INDENT = 16
_MAX_MESSAGE = 300


class ChatTemplateError(DairllmError):
    """The template does not suit the conversation, is broken, or wants more than it may have."""


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos: str = "",
    eos: str = "",
) -> str:
    """The prompt for a conversation.

    Args:
        template: the model's Jinja template; None where it has none.
        messages: {"role": ..., "content": ...} in order.
        add_generation_prompt: end with the words after which the assistant speaks.
        bos: what the template writes for `bos_token`.
        eos: what it writes for `eos_token`.

    Raises:
        ChatTemplateError: there is no template, or it fails; one line says why.
    """
    if not template:
        raise ChatTemplateError("the model has no chat template; give it a plain prompt instead")
    size = 0
    parts: list[str] = []
    try:
        # A generator, so that what loops without end is stopped as soon as it has said too much.
        for part in _compiled(template).generate(
            messages=list(messages), add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        ):
            size += len(part)
            if size > MAX_PROMPT_CHARACTERS:
                raise ChatTemplateError(f"the chat template writes more than {MAX_PROMPT_CHARACTERS} characters")
            parts.append(part)
    except ChatTemplateError:
        raise
    except _RefusedError as error:
        raise ChatTemplateError(f"the chat template refuses this conversation: {error}") from error
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        raise ChatTemplateError(f"the chat template fails{where}: {_one_line(error)}") from error
    except Exception as error:  # a template is a program: it may divide by zero, index past an end, nest too deep
        raise ChatTemplateError(f"the chat template fails: {type(error).__name__}: {_one_line(error)}") from error
    return "".join(parts)


class _RefusedError(Exception):
    """`raise_exception` was called."""


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without what makes a great deal out of little in one step. No loader: nothing is included from a file."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], cache_size=0)
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters |= {"tojson": _to_json, "format": _percent}
        del self.filters["center"], self.globals["lipsum"]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        refused = isinstance(obj, str) and attr in _REFUSED_METHODS
        return not refused and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None and _WIDE_FORMAT.search(value.__self__):
            raise SecurityError("a format with a field that may be very wide")
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MAX_PROMPT_CHARACTERS:
            raise SecurityError(f"{type(left).__name__} {operator} {type(right).__name__} would be larger than a template may make it")
        return super().call_binop(context, operator, left, right)


_REFUSED_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*([0-9]{4}|\*)")
_WIDE_FORMAT = re.compile(r"\{[^}]*([0-9]{4}|\{)")


def _size(operator: str, left: Any, right: Any) -> float:
    """Length of what an operator would make, in items, or in decimal digits and more for a number; 0 where it is of no concern."""
    if operator == "%":
        return math.inf if isinstance(left, str) and _WIDE_PERCENT.search(left) else 0
    if isinstance(left, Sized) or isinstance(right, Sized):
        sizes = [len(value) if isinstance(value, Sized) else abs(value) if isinstance(value, int) else 0 for value in (left, right)]
        return sum(sizes) if operator == "+" else math.prod(sizes)
    if isinstance(left, int) and isinstance(right, int) and operator != "+":
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        return math.inf if bits > _MAX_INTEGER_BITS else 0
    return 0


def _percent(pattern: str, *values: Any) -> str:
    if _WIDE_PERCENT.search(pattern):
        raise SecurityError("a format with a field that may be very wide")
    return pattern % values


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(_one_line(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """As plain text: Jinja's own filter escapes it for HTML."""
    if indent is not None and not 0 <= indent <= _MAX_JSON_INDENT:
        raise SecurityError(f"tojson with an indent of {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    return _Environment().from_string(template)


def _one_line(text: object) -> str:
    """A message, without what would make it more than a line."""
    return " ".join(str(text).split())[:_MAX_MESSAGE]
