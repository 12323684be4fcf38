"""`dairllm verify`: whether a model file is what it was when its digests were first made, and which model it is. Shares of one, too."""

import json as json_format
import sys
from pathlib import Path
from typing import Any

from dairllm.commands.progress import byte_bar
from dairllm.errors import FormatError
from dairllm.formats.digest import Digests, compute_digests, digests_path, keep_digests, kept_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.share_file import ShareFile, is_share_file
from dairllm.units import format_size

__all__ = ["run"]

_NAMED = 5
"""Tensors that a message names; --json names all."""


def run(model: Path, *, json: bool = False) -> None:
    """Read a `.m` file, print its identity and keep its digests; compare them with those that lie beside it.

    Args:
        model: the file, or one of a node's share of it: that is compared with the digests that it holds.
        json: one JSON object in place of a line.

    Raises:
        FormatError: it is no whole file, or not what the digests were made of; names the tensors.
    """
    if is_share_file(model):
        _verify_share(model, json=json)
        return
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
                "the same as before"
                if kept is not None
                else f"its digests are kept in {digests_path(model).name}"
                if is_kept
                else "its folder cannot be written to"
            )
            sys.stdout.write(f"{model}: {found.identity.hex()} ({digests}; {compared})\n")
        if torn:
            raise _contradiction(file, torn)


def _verify_share(path: Path, *, json: bool) -> None:
    file = ShareFile.open(path)
    held = file.contents
    with byte_bar(f"reading {path.name}") as progress:
        torn = list(file.torn(progress))
    if json:
        found = {
            "path": str(path),
            "bytes": file.stamp.nbytes,
            "identity": held.identity.hex(),
            "node": held.node,
            "nodes": held.n_nodes,
            "digest": file.digest.hex(),
            "torn": [label for label, _ in torn],
        }
        json_format.dump(found, sys.stdout)
        sys.stdout.write("\n")
    elif not torn:
        slices = f"{len(held.slices)} slices, {format_size(file.stamp.nbytes)}"
        sys.stdout.write(f"{path}: node {held.node} of {held.n_nodes} nodes' share of {held.identity.hex()} ({slices}; whole)\n")
    if torn:
        raise FormatError(
            path, torn[0][1], "what `dairllm prepare` wrote", f"other bytes in {_named(*(label for label, _ in torn))}; run it again"
        )


def _named(*labels: str) -> str:
    return ", ".join(labels[:_NAMED]) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")


def _contradiction(file: ModelFile, torn: list[str]) -> FormatError:
    offsets = {"the header": 0, **{tensor.label: tensor.offset for tensor in file.tensors}}
    beside = digests_path(file.path).name
    found = f"other bytes in {_named(*torn)}; copy the file again, or delete {beside} where it was changed on purpose"
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
