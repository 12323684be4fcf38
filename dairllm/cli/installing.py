"""The command for whoever installs."""

from pathlib import Path
from typing import Annotated

import typer

from dairllm.cli.app import app

__all__ = ["kernels"]


@app.command()
def kernels(
    compile_: Annotated[bool, typer.Option("--compile", help="Compile those that are not there yet: half a minute each.")] = False,
    form: Annotated[
        str | None, typer.Option(metavar="auto|all|portable|avx2|...", help="Which to compile.  [default: auto, what this machine takes]")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write them to this folder, for all to read.  [default: this user's cache]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which kernels this machine takes, and which are compiled; compile them ahead, for this processor or another."""
    from dairllm.commands import kernels as command

    command.run(compile_=compile_, form=form, to=to, json=json)
