"""`dairllm verify`: whether a model file is what it was when its digests were first made, and which model it is."""

import json as json_format
import sys
from pathlib import Path
from typing import Any

from dairllm.commands.progress import byte_bar
from dairllm.errors import FormatError
from dairllm.formats.digest import Digests, compute_digests, digests_path, keep_digests, kept_digests
from dairllm.formats.model_file import ModelFile
from dairllm.units import format_size

__all__ = ["run"]

_NAMED = 5
"""Tensors that a message names; --json names all."""


def run(model: Path, *, json: bool = False) -> None:
    """Read a `.m` file, print its identity and keep its digests; compare them with those that lie beside it.

    Args:
        json: one JSON object in place of a line.

    Raises:
        FormatError: it is no whole `.m` file, or not what the digests beside it were made of; names the tensors.
    """
    with ModelFile.open(model) as file:
        with byte_bar(f"reading {model.name}") as progress:
            found = compute_digests(file, progress)
        kept = kept_digests(file)
        torn = [] if kept is None else kept.differences(found, file)
        is_kept = not torn and (kept == found or keep_digests(file, found))
        if json:
            json_format.dump(_object(file, found, torn, is_kept), sys.stdout)
            sys.stdout.write("\n")
        elif not torn:
            digests = f"{len(file.tensors)} tensors, {format_size(file.nbytes)}"
            compared = (
                "the same as before" if kept is not None else "kept for the next time" if is_kept else "its folder cannot be written to"
            )
            sys.stdout.write(f"{model}: {found.identity.hex()} ({digests}; {compared})\n")
        if torn:
            raise _contradiction(file, torn)


def _contradiction(file: ModelFile, torn: list[str]) -> FormatError:
    offsets = {"the header": 0, **{tensor.label: tensor.offset for tensor in file.tensors}}
    named = ", ".join(torn[:_NAMED]) + (f" and {len(torn) - _NAMED} more" if len(torn) > _NAMED else "")
    beside = digests_path(file.path).name
    found = f"other bytes in {named}; copy the file again, or delete {beside} where it was changed on purpose"
    return FormatError(file.path, offsets[torn[0]], f"what {beside} was made of", found)


def _object(file: ModelFile, digests: Digests, torn: list[str], is_kept: bool) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "bytes": file.nbytes,
        "identity": digests.identity.hex(),
        "header": digests.header.hex(),
        "tensors": {tensor.label: digest.hex() for tensor, digest in zip(file.tensors, digests.tensors, strict=True)},
        "torn": torn,
        "kept": is_kept,
    }
