"""A model's chat template: a Jinja program that writes a conversation as the model was taught to read it.

The environment is the one that Hugging Face's `apply_chat_template` sets up, since that is what templates are written for: Jinja's sandbox,
with a few functions that templates count on. No file can be included. Nothing here bounds time and memory: that is done by the process
that a template runs in (dairllm.text.chat_child), whatever the template does.

Lines of a compiled template are those of its source, so that any traceback names them, also one that is written while a process ends.
"""

import ast
import json
import traceback
from bisect import bisect_right
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["FILE_NAME", "ChatTemplate", "failure"]

FILE_NAME = "<chat template>"
"""The file that tracebacks name."""
_MAX_MESSAGE = 300


class ChatTemplate:
    """Compiled.

    Args:
        source: of Jinja's language.

    Raises:
        Exception: anything, here and while it is rendered: a template is a program. `failure` says what it means.
    """

    def __init__(self, source: str) -> None:
        environment = _Environment()
        code = compile(_with_lines_of_the_template(environment.compile(source, raw=True)), FILE_NAME, "exec")
        self._template = Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, Any], most: int) -> bytes:
        """What it writes, in UTF-8 (where a surrogate stands alone it stays): at most so many bytes."""
        size = 0
        parts: list[str] = []
        for part in self._template.generate(variables):
            size += len(part)
            if size > most:
                break
            parts.append(part)
        said = b"" if size > most else "".join(parts).encode("utf-8", "surrogatepass")
        if max(size, len(said)) > most:
            raise _RefusedError(f"it would become longer than {most >> 20} MiB")
        return said


def failure(error: BaseException, memory: str) -> str:
    """What an error of a template means: one line, which names the template's.

    Args:
        memory: that it had at most.
    """
    if isinstance(error, _RefusedError):
        return f"the chat template refuses this conversation: {_one_line(error.args[0])}"
    line, text = (error.lineno, error.message) if isinstance(error, TemplateSyntaxError) else (None, str(error))
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == FILE_NAME:
            line = number
    where = "" if line is None else f" (line {line})"
    if isinstance(error, MemoryError):
        return f"the chat template fails{where}: it takes more than {memory} of memory"
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return f"the chat template fails{where}: {kind}{_one_line(text)}"


class _RefusedError(Exception):
    """`raise_exception` was called, or the prompt becomes too long."""


class _GenerationTag(Extension):
    """`{% generation %}`: marks what the assistant said, for training. Here its body is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


@pass_context
def _as_it_is(_: Context, value: Any) -> Any:
    """What depends on a context is not computed by the compiler, where no line of the template could be named."""
    return value


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers has it. No loader: nothing is included from a file."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols], optimized=False, finalize=_as_it_is
        )
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.filters["tojson"] = _to_json

    def handle_exception(self, source: str | None = None) -> NoReturn:
        """Jinja would look for the template's lines, which are there already; there may be no memory to do so."""
        raise


def _with_lines_of_the_template(python: str) -> ast.Module:
    """What Jinja compiled, with the lines of the template in the place of its own."""
    tree = ast.parse(python)
    # At its end: debug_info = '1=12&3=15', line of the template and line of the code from which on it is that one.
    debug_info = python.rpartition("debug_info = ")[2].strip().strip("'")
    pairs = [tuple(map(int, pair.split("="))) for pair in debug_info.split("&") if pair]
    known, begins = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for node in ast.walk(tree):
        if isinstance(node, ast.expr | ast.stmt | ast.excepthandler | ast.arg | ast.keyword | ast.alias):
            place = bisect_right(begins, node.lineno)
            node.lineno = node.end_lineno = known[place - 1] if place else 1
            node.col_offset = node.end_col_offset = 0
    return tree


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As plain text: Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _one_line(message: object) -> str:
    """A message, without what would make it more than a line, and cut."""
    text = " ".join(str(message)[: 4 * _MAX_MESSAGE].split())[:_MAX_MESSAGE]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
