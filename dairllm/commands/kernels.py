"""`dairllm kernels`: which object code there is, and making it ahead of the start that needs it."""

import json as json_format
import platform
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dairllm.commands.progress import count_bar
from dairllm.errors import ConfigError, EngineError
from dairllm.kernels import forms, processor
from dairllm.kernels.objects import targets
from dairllm.kernels.objects.cache import ObjectCodeCache, shipped_folder
from dairllm.kernels.objects.compiler import compile_objects
from dairllm.kernels.objects.targets import Target
from dairllm.units import format_size

__all__ = ["run"]


def run(*, compile_: bool = False, form: str | None = None, to: Path | None = None, json: bool = False) -> None:
    """Print what there is for each target, after compiling what was asked for and is missing.

    Args:
        compile_: whether to compile. Where numba compiles in each process, there is nothing to make ahead: that is said, and no failure.
        form: "auto", "all", or one of dairllm.kernels.forms; it need not run on this processor.
        to: a folder to write to and to look at, in place of those that a start looks at.
        json: one JSON object in place of a table.

    Raises:
        ConfigError: there is no such form, or it is not said what to compile it for.
        EngineError: nothing can be written to the folder, or the compiler fails.
    """
    if not compile_ and (form is not None or to is not None):
        raise ConfigError("--form and --to say what --compile is to do: it is missing")
    if form not in (None, "auto", "all", *forms.FORMS):
        raise ConfigError(f"--form {form}: expected auto, all or one of {', '.join(forms.FORMS)}")
    chosen = _chosen(form or "auto")
    if compile_ and chosen:
        _compile(chosen, to)
    rows = [_row(target, to) for target in targets.of_this_machine()]
    if json:
        told = {"machine": platform.machine(), "form": forms.current(), "shipped": str(shipped_folder()), "kernels": rows}
        json_format.dump(told, sys.stdout)
        sys.stdout.write("\n")
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(rows))


def _chosen(form: str) -> list[Target]:
    if form == "auto":
        taken = targets.current()
        return [] if taken is None else [taken]
    return [target for target in targets.of_this_machine() if form in ("all", target.form)]


def _compile(chosen: Sequence[Target], to: Path | None) -> None:
    with count_bar("compiling the kernels", len(chosen)) as progress:
        for done, target in enumerate(chosen):
            cache = ObjectCodeCache(target, to)
            with cache.alone():
                if cache.find() is None:
                    progress(str(target), done)
                    if cache.folder() is None:
                        raise EngineError(f"{to or 'the cache'}: expected a folder that this user can write to and no other, found none")
                    cache.write(compile_objects(target))
            if cache.find() is None:
                raise EngineError(f"{cache.folder() or to}: what was written there cannot be read back")


def _row(target: Target, to: Path | None) -> dict[str, Any]:
    found = ObjectCodeCache(target, to).find()
    return {
        "form": target.form,
        "level": target.level,
        "needs": sorted(target.needs),
        "runs_here": target.needs <= processor.features(),
        "taken": target == targets.current(),
        "file": None if found is None else str(found[0]),
        "bytes": None if found is None else found[0].stat().st_size,
    }


def _lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    table = [("form", "tuned for", "here", "object code")]
    for row in rows:
        here = "taken" if row["taken"] else "runs" if row["runs_here"] else "lacks instructions"
        table.append((row["form"], row["level"], here, f"{row['file']} ({format_size(row['bytes'])})" if row["file"] else "not compiled"))
    if len(table) == 1:
        yield f"numba compiles the kernels in each process on {platform.machine()}: there is nothing to make ahead"
        return
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    for line in table:
        yield "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[3]])
