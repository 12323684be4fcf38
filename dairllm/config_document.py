"""A YAML file as a tree of nodes that is no larger than settings may be.

YAML can say a great deal in few bytes: a list of aliases of lists of aliases, or ten thousand
brackets. What is refused here would take memory, time or the interpreter's stack before anybody
looked at it.
"""

import codecs
from pathlib import Path
from typing import NoReturn

import yaml

from dairllm.errors import ConfigError, printable

__all__ = ["MOST_BYTES", "MOST_DEPTH", "MOST_VALUES", "read_document"]

MOST_BYTES = 1 << 20
MOST_VALUES = 10_000
"""Keys and values, those that aliases stand for counted each time; a text counts once more for each
100 characters."""

MOST_DEPTH = 100


def read_document(file: Path) -> yaml.Node | None:
    """The root of a YAML file, or None where it says nothing.

    Raises:
        ConfigError: it cannot be read, is no YAML, or is larger than settings may be; with the line
            where there is one.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ConfigError(f"{file}: expected settings of at most {MOST_BYTES >> 20} MiB, found more")
        text = data.decode("utf-8")
        _check_events(file, text)
        root: yaml.Node | None = yaml.SafeLoader(text).get_single_node()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        found = (
            "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else f"0x{data[error.start]:02x} in byte {error.start}"
        )
        raise ConfigError(f"{file}: expected text in UTF-8, found {found}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}, line {mark.line + 1}" if mark else f"{file}"
        raise ConfigError(f"{where}: not YAML: {printable(getattr(error, 'problem', None) or error)}") from None
    if root is not None:
        _Size(file).of(root)
    return root


def _check_events(file: Path, text: str) -> None:
    """Raise ConfigError where a text has too many values or nests too deep. Its parser keeps a list of
    where it is, and no stack."""
    depth = values = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        values += isinstance(event, yaml.NodeEvent)
        if depth > MOST_DEPTH or values > MOST_VALUES:
            _fail(file, event)


class _Size:
    """How many values nodes stand for. One that is aliased is counted once, its number taken often."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[yaml.Node, int | None] = {}  # None: being counted

    def of(self, node: yaml.Node) -> int:
        if node in self._known:
            known = self._known[node]
            if known is None:
                raise ConfigError(f"{self._file}, line {node.start_mark.line + 1}: a value that contains itself")
            return known
        self._known[node] = None
        size = 1
        if isinstance(node, yaml.ScalarNode):
            size += len(node.value) // 100
        elif isinstance(node, yaml.CollectionNode):
            for entry in node.value:
                size += sum(map(self.of, entry)) if isinstance(entry, tuple) else self.of(entry)
        if size > MOST_VALUES:
            _fail(self._file, node)
        self._known[node] = size
        return size


def _fail(file: Path, place: yaml.Event | yaml.Node) -> NoReturn:
    line = place.start_mark.line + 1 if place.start_mark else 0
    raise ConfigError(f"{file}, line {line}: expected at most {MOST_VALUES} values, nested at most {MOST_DEPTH} deep, found more")
