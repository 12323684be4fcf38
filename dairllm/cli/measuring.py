"""The command that measures."""

from pathlib import Path
from typing import Annotated

import typer

from dairllm.cli.app import app
from dairllm.cli.options import Kernels, Threads, number_or_word

__all__ = ["bench"]


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file, with its tokenizer beside it.")],
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[kernels|tokens|prompt|cluster|paging]...", help="What to measure.  [default: all]")
    ] = None,
    threads: Threads = None,
    kernels: Kernels = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often; figures are medians.")] = 3,
    at: Annotated[list[int] | None, typer.Option(metavar="N", min=1, help="Position of tokens; may be repeated.  [default: 128]")] = None,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompt, about.")] = 256,
    percent: Annotated[
        list[int] | None,
        typer.Option(metavar="P", min=0, max=99, help="Of the weights in memory, for paging; may be repeated.  [default: 25, 50, 70]"),
    ] = None,
    nodes: Annotated[int, typer.Option(metavar="N", min=2, help="Of a cluster, all on this machine.")] = 2,
    policy: Annotated[str | None, typer.Option(metavar="pinned|lru", help="Which weights stay, for paging.  [default: pinned]")] = None,
    cgroup: Annotated[
        bool, typer.Option("--cgroup", help="Page in a control group of the limit, page cache included; takes root.")
    ] = False,
    patience: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for idle processors, each time.")] = 30.0,
    busy: Annotated[int, typer.Option(metavar="N", min=0, max=64, help="Processes that compute without pause beside each run.")] = 0,
    dllama: Annotated[Path | None, typer.Option(metavar="PATH", help="distributed-llama's program, to be measured in turn.")] = None,
    turbo: Annotated[bool, typer.Option(help="Whether its nodes poll the network, as they do by default.")] = True,
    llamacpp_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="An interpreter that has xllamacpp: llama.cpp is measured in turn.")
    ] = None,
    without_flash: Annotated[bool, typer.Option("--without-flash", help="Measure llama.cpp with its flash attention off as well.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the figures as well.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure this machine with a model: against the speed of its memory and disk, and against other programs."""
    from dairllm.commands import bench as command
    from dairllm.config import RootSettings, load_settings
    from dairllm.telemetry import configure_logging

    flags = {"engine.threads": ("--threads", number_or_word(threads)), "engine.kernels": ("--kernels", kernels)}
    settings = load_settings(RootSettings, flags=flags | {"paging.policy": ("--policy", policy)})
    engine = settings.engine
    configure_logging(level="warning")
    command.run(
        what or [],
        model,
        threads=None if engine.threads == "auto" else engine.threads,
        kernels=engine.kernels,
        rounds=rounds,
        positions=at or [128],
        prompt=prompt,
        percents=percent or [25, 50, 70],
        nodes=nodes,
        policy=settings.paging.policy,
        in_group=cgroup,
        patience=patience,
        busy=busy,
        dllama=dllama,
        turbo=turbo,
        llamacpp_python=llamacpp_python,
        without_flash=without_flash,
        picture=svg,
        json=json,
    )
