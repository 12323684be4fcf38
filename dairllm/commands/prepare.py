"""`dairllm prepare`: each node's share of a model in a file of its own, for nodes that page."""

import json as json_format
import sys
from pathlib import Path
from typing import Any

from dairllm.commands.progress import byte_bar
from dairllm.errors import ConfigError, FormatError
from dairllm.formats.digest import Progress, digests_path, kept_digests, model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.share_writer import PreparedShare, ShareWriter, check_room
from dairllm.graph.slicing import deal_shares, nearly_equal_sizes, parse_shares
from dairllm.units import format_size

__all__ = ["run"]

_SAID = {"written": "written", "continued": "continued where it had been cut short", "whole": "whole already"}


def run(model: Path, *, nodes: int | None = None, shares: str | None = None, only: int | None = None, json: bool = False) -> None:
    """Write the shares of a cluster's nodes beside the model, or find them there whole. Cut short, it goes on at the next call.

    Args:
        nodes: how many, with nearly equal shares.
        shares: how large ones, as the cluster's setting has it.
        only: the number of the one node whose share is wanted.
        json: one JSON object in place of lines.

    Raises:
        ConfigError: there are fewer than two nodes, or no such node.
        FormatError: the model is no whole `.m` file, is torn, or changes meanwhile.
        GraphError: the model cannot be shared so.
        LimitError: the disk has no room for them.
        OSError: a file cannot be written.
    """
    sizes = None if shares is None else parse_shares(shares)
    n_nodes = nodes if sizes is None else len(sizes)
    if n_nodes is None:
        raise ConfigError("--nodes or --shares: say how many nodes share the model")
    if nodes is not None and nodes != n_nodes:
        raise ConfigError(f"--nodes {nodes}, but --shares has {n_nodes}")
    if n_nodes < 2:
        raise ConfigError(
            f"{n_nodes} node{'' if n_nodes == 1 else 's'}: one that has all of a model reads it as it lies; expected 2 or more"
        )
    if only is not None and not 0 <= only < n_nodes:
        raise ConfigError(f"--node {only}: there are nodes 0 (the root) to {n_nodes - 1}")
    with ModelFile.open(model) as file:
        dealt = deal_shares(file.spec, nearly_equal_sizes(file.spec, n_nodes) if sizes is None else sizes)
        with byte_bar(f"reading {model.name}") as progress:
            identity = _identity(file, progress)
        wanted = range(n_nodes) if only is None else [only]
        writers = [ShareWriter(file, identity, node, n_nodes, dealt[node]) for node in wanted]
        check_room(model.parent, sum(writer.missing_bytes for writer in writers), f"shares of {model}")
        done = []
        for writer in writers:
            with byte_bar(writer.path.name) as progress:
                done.append(writer.prepare(progress))
            if not json:
                found = done[-1]
                sys.stdout.write(f"{found.path}  {format_size(found.nbytes)}  {_SAID[found.state]}\n")
                sys.stdout.flush()
    if json:
        json_format.dump({"model": str(model), "identity": identity.hex(), "nodes": n_nodes, "files": list(map(_object, done))}, sys.stdout)
        sys.stdout.write("\n")


def _identity(file: ModelFile, progress: Progress | None) -> bytes:
    """Raises FormatError where the file is not what the digests beside it were made of: a torn model is not to be spread."""
    digests, kept = model_digests(file, progress), kept_digests(file)
    torn = [] if kept is None else kept.differences(digests, file)
    if torn:
        beside = digests_path(file.path).name
        raise FormatError(file.path, None, f"what {beside} was made of", f"other bytes in {torn[0]}; `dairllm verify` says more")
    return digests.identity


def _object(share: PreparedShare) -> dict[str, Any]:
    return {
        "node": share.node,
        "path": str(share.path),
        "bytes": share.nbytes,
        "digest": share.digest.hex(),
        "state": share.state,
    }
