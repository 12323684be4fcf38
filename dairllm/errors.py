"""The tree of errors.

    DairllmError
    +-- ConfigError             settings or command line: unknown key, wrong type, out of range        (exit code 2)
    +-- FormatError             a file on disk is not what it should be: file, offset, expected, found
    +-- GraphError              a graph that cannot be run: sizes that contradict each other, an op or a type we do not have
    +-- LimitError              something announced is larger than what we were allowed to hold
    +-- ProtocolError           what crosses the wire
    |   +-- LocalProtocolError  we used the protocol wrongly: a bug of ours
    |   +-- RemoteProtocolError the peer did
    +-- RefusedError            a worker does not do its part: it says why
    +-- NetworkError            a peer cannot be reached, went away, or did not speak in time
    +-- EngineError             the computation itself failed
    +-- ChatTemplateError       a model's chat template fails (dairllm.text.chat_renderer)
    +-- ProgramError            a program that is measured failed (dairllm.bench.processes)

Any other exception that reaches a user is a bug.

Messages quote files and peers, which may say anything. So whatever a message is made of, it is one
line that a terminal can show: characters that move a cursor, clear a screen or turn text around are
escaped here, where all messages pass, and what is very long is cut.
"""

from pathlib import Path
from typing import TypeVar

__all__ = [
    "ConfigError",
    "DairllmError",
    "EngineError",
    "FormatError",
    "GraphError",
    "LimitError",
    "LocalProtocolError",
    "NetworkError",
    "ProtocolError",
    "RefusedError",
    "RemoteProtocolError",
    "escaped",
    "printable",
    "without_trace",
]

E = TypeVar("E", bound=BaseException)

_LONGEST_MESSAGE = 4000
"""Characters; a path alone may have 4095 bytes."""

_LONGEST_PART = 400
"""Of a FormatError: what was expected, what was found."""


def escaped(text: str) -> str:
    """What is not printable, a line break too, as Python would write it: \\x1b, \\n, \\u202e."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(text: object, limit: int = 200) -> str:
    """What a stranger said (a file, a peer), as it can be shown: one line of at most `limit` characters
    and three dots.
    """
    said = str(text)
    shown = escaped(said[:limit])
    return shown if len(said) <= limit and len(shown) <= limit else f"{shown[:limit]}..."


class DairllmError(Exception):
    """Root of all errors that dairllm raises on purpose; ``str()`` is one clear line for people."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, _LONGEST_MESSAGE))


class ConfigError(DairllmError):
    """A setting is unknown, has a wrong type or lies out of range."""

    exit_code = 2


class FormatError(DairllmError):
    """A file is truncated, overlong, of another kind, or contradicts itself.

    Args:
        path: the file.
        offset: byte offset at which it was noticed, or None where there is none.
        expected: what should stand there.
        found: what does.
    """

    def __init__(self, path: str | Path, offset: int | None, expected: str, found: str) -> None:
        self.path, self.offset, self.expected, self.found = Path(path), offset, expected, found
        where = f"{path}" if offset is None else f"{path}, byte {offset}"
        super().__init__(f"{where}: expected {printable(expected, _LONGEST_PART)}, found {printable(found, _LONGEST_PART)}")


class GraphError(DairllmError):
    """A graph that cannot be run."""


class LimitError(DairllmError):
    """A size exceeds what the settings allow; says which setting."""


class ProtocolError(DairllmError):
    """Abstract: the exchange with a peer went wrong."""


class LocalProtocolError(ProtocolError):
    """This side used the protocol wrongly."""


class RemoteProtocolError(ProtocolError):
    """The peer said something that the protocol does not allow."""


class RefusedError(DairllmError):
    """A worker cannot do its part of the work, and has said why."""


class NetworkError(DairllmError):
    """A peer cannot be reached, has gone away or is silent."""


class EngineError(DairllmError):
    """The computation failed."""


def without_trace(error: E) -> E:
    """The same error without the frames that it came through and the errors that it came of: whoever
    keeps it would keep all that those worked on, a model's memory, say."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
