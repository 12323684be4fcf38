"""The command line without its commands: how each outcome ends the process.

Exit codes: 0 done; 1 it failed, and one line on stderr says why; 2 wrong usage or configuration; 130 and 143 cut short by Ctrl-C and
SIGTERM; 141 whoever read stdout has gone away (no message: they know).
"""

import contextlib
import faulthandler
import gc
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dairllm import __version__
from dairllm.errors import DairllmError

__all__ = ["app", "main"]

CUT_SHORT_BY_INTERRUPT = 128 + signal.SIGINT
CUT_SHORT_BY_TERMINATION = 128 + signal.SIGTERM
CUT_SHORT_BY_CLOSED_PIPE = 128 + signal.SIGPIPE


class Commands(TyperGroup):
    """The commands; whatever one of them raises on purpose becomes one line on stderr and an exit code. Anything else is a bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()  # here a closed pipe can still be answered
        except KeyboardInterrupt:
            raise SystemExit(CUT_SHORT_BY_INTERRUPT) from None
        except BrokenPipeError:
            # What is left in the buffer would fail once more at the interpreter's end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(CUT_SHORT_BY_CLOSED_PIPE) from None
        except DairllmError as error:
            raise _failure(str(error), error.exit_code) from None
        except OSError as error:
            subject = f"{error.filename}: " if error.filename is not None else ""
            raise _failure(f"{subject}{error.strerror or error}") from None
        except MemoryError:
            raise _failure("out of memory") from None


def _failure(message: str, code: int = 1) -> SystemExit:
    sys.stderr.write(f"dairllm: error: {message}\n")
    return SystemExit(code)


# Plain help and errors: boxes cost 0.2 s of imports, and an error is to be one line.
app = typer.Typer(
    cls=Commands,
    help="Run a language model over ordinary computers: on one, or shared out to several.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"max_content_width": 120},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dairllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Options of `dairllm` itself."""


def main() -> None:
    """Run the command line and end the process with the code that says how it went."""
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
