"""A line of each logged event, whatever it is made of: values that cannot be shown, exceptions,
control characters.

What people asked a model is no business of a log. So tracebacks say where, never with which values;
and the text of an exception that nobody raised on purpose is left out unless somebody wants to know
(`private`), since it may quote what a request said.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import structlog

from dairllm.errors import DairllmError, escaped

__all__ = ["LogLines"]

NOT_SHOWN = "(not shown, it may quote a request: log.level debug shows it)"

_DEEPEST = 4
"""Lists and tables within each other; what lies deeper is shown as Python shows it."""
_LONGEST_CHAIN = 8
"""Exceptions that led to each other."""


class LogLines:
    """The only structlog processor: makes an event's line, and never raises.

    Args:
        console: for people at a terminal; else JSON.
        colors: of the former.
        private: unexpected exceptions are told with their text.
    """

    def __init__(self, *, console: bool, colors: bool = False, private: bool = False) -> None:
        self._console, self._private = console, private
        self._chain: tuple[structlog.typing.Processor, ...] = (
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            self._showable,
            structlog.dev.ConsoleRenderer(colors=colors and not os.environ.get("NO_COLOR"))
            if console
            else structlog.processors.JSONRenderer(),
        )

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> str:
        try:
            line: Any = event
            for processor in self._chain:
                line = processor(logger, method, line)
            return str(line)
        except Exception as error:  # a log line is no reason for anything to fail
            found = {"level": method, "event": "an event cannot be shown", "of": _shown(event.get("event")), "kind": type(error).__name__}
            return " ".join(f"{key}={value}" for key, value in found.items()) if self._console else json.dumps(found)

    def _showable(self, _logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        """Plain values, those first that say when, how bad and what: people read JSON lines too."""
        error = _exception_of(event.pop("exc_info", None))
        first = {key: event[key] for key in ("timestamp", "level", "event") if key in event}
        found = {key: self._plain(value) for key, value in {**first, **event}.items()}
        if error is not None:
            found["exception"] = self._as_text(error) if self._console else [self._as_table(one) for one in _led_to(error)]
        return found

    def _plain(self, value: object, depth: int = 0) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping) and depth < _DEEPEST:
            return {_shown(key): self._plain(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple | set | frozenset) and depth < _DEEPEST:
            return [self._plain(each, depth + 1) for each in value]
        text = _shown(value)
        return escaped(text) if self._console else text

    def _text_of(self, error: BaseException) -> str:
        """What an exception says, as far as that is anybody's business."""
        if self._private or isinstance(error, DairllmError | OSError):
            return _shown(error, str)
        return NOT_SHOWN if error.args else ""

    def _as_table(self, error: BaseException) -> dict[str, Any]:
        frames = traceback.extract_tb(error.__traceback__)
        places = [{"filename": frame.filename, "lineno": frame.lineno, "name": frame.name} for frame in frames]
        return {"exc_type": type(error).__name__, "exc_value": self._text_of(error), "frames": places}

    def _as_text(self, error: BaseException) -> str:
        """As Python shows them, what came first first."""
        parts = []
        for one in reversed(list(_led_to(error))):
            places = "".join(traceback.format_tb(one.__traceback__))
            parts.append(f"Traceback (most recent call last):\n{places}{type(one).__name__}: {escaped(self._text_of(one))}")
        return "\n\nwhich led to\n\n".join(parts)


def _shown(value: object, show: Any = repr) -> str:
    """Text as it is, anything else as it shows itself; where it fails to, its kind."""
    try:
        return str(value if isinstance(value, str) else show(value))
    except Exception:
        return f"<{type(value).__name__} that cannot be shown>"


def _exception_of(info: object) -> BaseException | None:
    """Of what structlog and logging take for one: itself, a triple, or True for the one that is being handled."""
    if isinstance(info, BaseException):
        return info
    if isinstance(info, tuple) and len(info) == 3 and isinstance(info[1], BaseException):
        return info[1]
    return sys.exc_info()[1] if info else None


def _led_to(error: BaseException) -> Iterator[BaseException]:
    """An exception, those in its group, and what it came of."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _LONGEST_CHAIN:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        before = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
        waiting += [*(one.exceptions if isinstance(one, BaseExceptionGroup) else ()), *(() if before is None else (before,))]
