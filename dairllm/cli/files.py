"""Commands on files of models and tokenizers."""

from pathlib import Path
from typing import Annotated

import typer

from dairllm.cli.app import app
from dairllm.cli.options import (
    ConfigFile,
    KvCache,
    MaxSeqLen,
    MemoryLimit,
    PagingMode,
    Readers,
    Shares,
    Sync,
    Threads,
    root_flags,
)

__all__ = ["convert", "inspect", "plan", "prepare", "tokenize", "verify"]


@app.command()
def tokenize(
    tokenizer: Annotated[Path, typer.Argument(metavar="F.t", help="Tokenizer file; its tokenizer.json is used where one lies beside it.")],
    text: Annotated[str, typer.Argument(metavar="[TEXT | -]", help="Text; - or nothing: stdin as it is, final newline included.")] = "-",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object: ids, pieces.")] = False,
) -> None:
    """Show the token ids of a text. Nothing is added; special tokens that are written out are parsed."""
    from dairllm.commands import tokenize as command
    from dairllm.telemetry import configure_logging

    configure_logging(level="warning")
    command.run(tokenizer, text, json=json)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="GGUF file; tensors of any type but Q1_0: F32, F16, BF16, Q4_0 to Q8_0, K, IQ, TQ, FP4."),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT.m", help="Model file to write, or a folder; OUT.t and tokenizer.json go beside it.")
    ],
    weights: Annotated[
        str,
        typer.Option(
            metavar="auto|q40|q80|f32",
            help="How weights are stored; auto: q40 where the source is Q4_0, else q80, which keeps what it has.",
        ),
    ] = "auto",
) -> None:
    """Make a model file, its tokenizer file and its tokenizer.json of a model in another format."""
    from dairllm.commands import convert as command
    from dairllm.telemetry import configure_logging

    configure_logging(level="warning")
    command.run(source, target, weights)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file, or a GGUF file.")],
    layer: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only the tensors of this layer.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a model file holds: header, tensors, offsets, sizes."""
    from dairllm.commands import inspect as command

    command.run(model, layer=layer, json=json)


@app.command()
def plan(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file.")],
    kv_cache: KvCache = None,
    memory_limit: MemoryLimit = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Nodes that share the model, the root included.  [default: 1]")] = None,
    shares: Shares = None,
    sync: Sync = None,
    max_seq_len: MaxSeqLen = None,
    threads: Threads = None,
    paging: PagingMode = None,
    readers: Readers = None,
    config: ConfigFile = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Read some of the file, and say how long a token will wait for the disk; takes 2 s.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what each node would hold within a memory limit, and how much of the weights it would read for each token."""
    flags = root_flags({name: value for name, value in locals().items() if name != "model"}, others=("nodes", "config", "measure", "json"))
    from dairllm.commands import plan as command
    from dairllm.telemetry import configure_logging

    configure_logging(level="warning")
    command.run(model, config, nodes, flags, measure=measure, json=json)


@app.command()
def prepare(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file; the shares are put beside it, as F.m.share-0-of-2, ...")],
    nodes: Annotated[int | None, typer.Option(metavar="N", help="Nodes that share the model, the root included.")] = None,
    shares: Shares = None,
    node: Annotated[int | None, typer.Option(metavar="K", help="Only this node's share; the root is 0.  [default: all]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write each node's share of a model into a file of its own: a node that pages then reads its share and nothing else.

    Cut short, it goes on where it was when it is called again.
    """
    from dairllm.commands import prepare as command

    command.run(model, nodes=nodes, shares=shares, only=node, json=json)


@app.command()
def verify(
    model: Annotated[
        Path, typer.Argument(metavar="F.m", help="Model file, whose digests lie beside it, as F.m.digests; or a share of one (`prepare`).")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the digest of each tensor.")] = False,
) -> None:
    """Read a model file, say which model it is, and whether a tensor has changed since it was first read."""
    from dairllm.commands import verify as command

    command.run(model, json=json)
