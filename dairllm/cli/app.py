"""The command line without its commands: how each outcome ends the process.

Exit codes: 0 done; 1 it failed, and one line on stderr says why; 2 wrong usage or configuration; 129, 130 and 143 cut short by SIGHUP,
Ctrl-C and SIGTERM; 141 whoever read stdout has gone away (no message: they know).
"""

import contextlib
import errno
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from dairllm import __version__
from dairllm.cli.standard_streams import open_standard_streams
from dairllm.errors import ConfigError, DairllmError

__all__ = ["RootCommand", "app", "main"]

CUT_SHORT_BY_INTERRUPT = 128 + signal.SIGINT
CUT_SHORT_BY_TERMINATION = 128 + signal.SIGTERM
CUT_SHORT_BY_CLOSED_PIPE = 128 + signal.SIGPIPE


_OF_OTHER_PROGRAMS = {
    "chat": "dairllm generate --chat --prompt TEXT answers once, dairllm serve again and again",
    "run": "dairllm generate answers once, dairllm serve again and again",
    "pull": "dairllm convert makes a model file of a GGUF file that is here",
    "download": "dairllm convert makes a model file of a GGUF file that is here",
    "list": "a model is a file: dairllm inspect F.m shows what it holds",
    "show": "dairllm inspect F.m shows what a model file holds",
    "inference": "dairllm generate --prompt TEXT continues a text",
    "root": "dairllm generate and dairllm serve are roots: name their --workers",
    "help": "dairllm --help lists the commands, dairllm COMMAND --help the options of one",
    "version": "dairllm --version tells it",
}
"""What somebody may try who comes from another program, and what does it here."""


class RootCommand(TyperCommand):
    """A command that has no arguments of its own: words after `--workers HOST:PORT` are more of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        in_workers = False
        for number, word in enumerate(args):
            is_value = number > 0 and args[number - 1] == "--workers"
            if in_workers and not is_value and not word.startswith("-"):
                joined[-1] += f",{word}"
                continue
            in_workers = is_value
            joined.append(word)
        return super().parse_args(ctx, joined)


class Commands(TyperGroup):
    """The commands; whatever one of them raises on purpose is told. Anything else is a bug."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in _OF_OTHER_PROGRAMS:
            raise ConfigError(f"there is no command {args[0]}: {_OF_OTHER_PROGRAMS[args[0]]}")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _told():  # --version and --help print here
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Whatever the block raises on purpose becomes one line on stderr and an exit code."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here a closed pipe can still be answered
    except KeyboardInterrupt:
        raise SystemExit(CUT_SHORT_BY_INTERRUPT) from None
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(CUT_SHORT_BY_CLOSED_PIPE) from None
    except DairllmError as error:
        raise _failure(str(error), error.exit_code) from None
    except OSError as error:
        _drop_output()
        if error.errno == errno.EBADF and error.filename is None:
            raise _failure("stdout is closed: there is nowhere to write to") from None
        subject = f"{error.filename}: " if error.filename is not None else ""
        raise _failure(f"{subject}{error.strerror or error}") from None
    except MemoryError:
        raise _failure("out of memory") from None


def _drop_output() -> None:
    """What is left in stdout's buffer would fail once more at the interpreter's end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failure(message: str, code: int = 1) -> SystemExit:
    with contextlib.suppress(AttributeError, OSError):  # there is none, or it is full: the exit code says it
        sys.stderr.write(f"dairllm: error: {message}\n")
    return SystemExit(code)


# Plain help and errors: boxes cost 0.2 s of imports, and an error is to be one line.
app = typer.Typer(
    cls=Commands,
    help="Run a language model over ordinary computers: on one, or shared out to several.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dairllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of `dairllm` itself."""


def main() -> None:
    """Run the command line and end the process with the code that says how it went."""
    open_standard_streams()
    signal.signal(signal.SIGTERM, _terminated)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr, or none of the system's
        faulthandler.enable()  # a mapped file that cannot be read any more ends the process (SIGBUS): not without a word
    try:
        app(prog_name="dairllm")
    finally:
        gc.freeze()  # the interpreter's last search for garbage would take a tenth of a second, of a process that is ending


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that files are closed and child processes ended. A service sets a handler of its own."""
    raise SystemExit(CUT_SHORT_BY_TERMINATION)
