"""Where settings come from: a YAML file, the environment and flags, read along a schema so that each mistake names its place."""

import difflib
import os
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dairllm.config_document import read_document
from dairllm.errors import ConfigError, printable

__all__ = ["ENVIRONMENT_PREFIX", "read_settings"]

ENVIRONMENT_PREFIX = "DAIRLLM_"
_OF_TESTS = f"{ENVIRONMENT_PREFIX}TEST_"


@dataclass(frozen=True, slots=True)
class _Given:
    """A value and who gave it."""

    value: object
    where: str


Settings = TypeVar("Settings", bound=BaseModel)
_Path = tuple[str, ...]


def read_settings(
    schema: type[Settings],
    file: Path | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, tuple[str, object]] | None = None,
    others: Mapping[str, type[BaseModel]] = MappingProxyType({}),
    short: Mapping[str, str] | None = None,
    no_settings: Container[str] = (),
) -> Settings:
    """Settings from all their sources.

    Args:
        file: a YAML file, or None for no file.
        environment: os.environ by default. An empty variable counts as not given.
        flags: from a key such as ``"worker.port"`` to the flag's name and value; a value of None counts as not given.
        others: programs that may share an environment with this one, for people, and their schemas: variables that only they know
            are passed over. A file with a section that only they know is theirs.
        short: variables of one word, without the prefix, and the key that each is, such as ``"worker.model"``.
        no_settings: variables with the prefix that are something else, and are passed over. One that begins with
            ``DAIRLLM_TEST_`` always is.

    Raises:
        ConfigError: unknown key, wrong type or out of range, with its file and line, variable or flag; a file that cannot be read.
    """
    given: dict[_Path, _Given] = {}
    if file is not None:
        given.update(_File(schema, file, others).values())
    theirs = {path for other in others.values() for path in _leaves(other)} - set(_leaves(schema))
    variables = os.environ if environment is None else environment
    ours = {name: text for name, text in variables.items() if name.startswith(ENVIRONMENT_PREFIX) and text}
    ours = {name: text for name, text in ours.items() if not name.startswith(_OF_TESTS) and name not in no_settings}
    given.update(_from_environment(schema, ours, theirs, short or {}))
    for key, (name, value) in (flags or {}).items():
        if value is not None:
            given[tuple(key.split("."))] = _Given(value, f"flag {name}")
    tree: dict[str, Any] = {}
    for path, item in given.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = item.value
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("Input should "):
        message = f"expected {message.removeprefix('Input should ').removeprefix('be ')}, found {printable(repr(first['input']))}"
    sources = [given[path[:n]].where for n in range(len(path), 0, -1) if path[:n] in given]
    raise ConfigError(": ".join([*sources[:1], ".".join(path), message]))


def _leaves(schema: type[BaseModel], prefix: _Path = ()) -> Iterator[_Path]:
    for name in schema.model_fields:
        section = _section(schema, name)
        if section is None:
            yield (*prefix, name)
        else:
            yield from _leaves(section, (*prefix, name))


def _section(schema: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = schema.model_fields[name].annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _unknown(root: type[BaseModel], schema: type[BaseModel], name: str) -> str:
    """What to say about a key that is not there: the nearest of its section, else the same key of another."""
    near = difflib.get_close_matches(name, schema.model_fields, 1, 0.6)
    if not near:
        near = [".".join(path) for path in _leaves(root) if path[-1] == name]
    known = f"did you mean {near[0]}?" if near else f"there are {', '.join(schema.model_fields)}"
    return f"unknown key; {known}"


def _from_environment(
    schema: type[BaseModel], environment: Mapping[str, str], theirs: Container[_Path], short: Mapping[str, str]
) -> dict[_Path, _Given]:
    given: dict[_Path, _Given] = {}
    loader = yaml.SafeLoader("")
    # A short name gives way to the long one of the same key.
    for variable in sorted(environment, key=lambda name: "__" in name):
        text, name = environment[variable], variable.removeprefix(ENVIRONMENT_PREFIX)
        where = f"environment variable {variable}"
        path = tuple((short.get(name) or name.lower().replace("__", ".")).split("."))
        if path in theirs:
            continue
        if len(path) < 2:
            known = [*short, *("__".join(leaf).upper() for leaf in _leaves(schema))]
            near = difflib.get_close_matches(name, known, 1, 0.6)
            form = "settings are DAIRLLM_<SECTION>__<KEY>, with two underscores between them"
            hint = f"did you mean {ENVIRONMENT_PREFIX}{near[0]}?" if near else form
            raise ConfigError(f"{where}: unknown; {hint}")
        section: type[BaseModel] | None = schema
        for depth, name in enumerate(path):
            if section is None or name not in section.model_fields:
                raise ConfigError(f"{where}: {'.'.join(path[: depth + 1])}: {_unknown(schema, section or schema, name)}")
            section = _section(section, name)
        if section is not None:
            raise ConfigError(f"{where}: {'.'.join(path)}: a section, not a key; there are {', '.join(section.model_fields)}")
        # the types of a plain YAML scalar, without YAML's syntax: 9990 is a number, :: is text
        tag = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call] # types-PyYAML leaves it untyped
        node = yaml.ScalarNode(tag, text)
        try:
            given[path] = _Given(loader.construct_object(node), where)
        except ValueError as error:
            raise ConfigError(f"{where}: {'.'.join(path)}: {error}") from None
    return given


class _File:
    """A YAML file, walked along the schema, so that each key's line is known."""

    def __init__(self, schema: type[BaseModel], file: Path, others: Mapping[str, type[BaseModel]]) -> None:
        self._schema, self._file, self._others = schema, file, others
        self._given: dict[_Path, _Given] = {}
        self._loader = yaml.SafeLoader("")

    def values(self) -> dict[_Path, _Given]:
        root = read_document(self._file)
        if root is not None:
            self._walk(self._schema, root, ())
        return self._given

    def _walk(self, schema: type[BaseModel], node: yaml.Node, prefix: _Path) -> None:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return  # a section with all its keys commented out
        if not isinstance(node, yaml.MappingNode):
            self._fail(node, prefix or ("the file",), f"expected keys ({', '.join(schema.model_fields)}), found {_what(node)}")
        seen: dict[str, int] = {}
        for key, value in node.value:
            name = printable(key.value) if isinstance(key, yaml.ScalarNode) else _what(key)
            path = (*prefix, name)
            if name not in schema.model_fields:
                self._fail(key, path, self._unknown(schema, name, prefix))
            if name in seen:
                self._fail(key, path, f"given twice, first in line {seen[name]}")
            seen[name] = key.start_mark.line + 1
            section = _section(schema, name)
            if section is not None:
                self._walk(section, value, path)
                continue
            try:
                self._given[path] = _Given(self._loader.construct_object(value, deep=True), f"{self._file}, line {seen[name]}")
            except Exception as error:  # of a value that is not what its tag says, the library raises KeyError, AttributeError and others
                self._fail(key, path, getattr(error, "problem", None) or f"{_what(value)} cannot be read: {error}")

    def _unknown(self, schema: type[BaseModel], name: str, prefix: _Path) -> str:
        for program, other in self._others.items():
            if not prefix and name in other.model_fields:
                return f"unknown key; this seems to be a file for {program}"
        return _unknown(self._schema, schema, name)

    def _fail(self, node: yaml.Node, path: _Path, message: str) -> NoReturn:
        raise ConfigError(f"{self._file}, line {node.start_mark.line + 1}: {'.'.join(path)}: {printable(message, 1000)}")


def _what(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return printable(repr(node.value))
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
