"""Commands that compute: nodes, alone and together."""

from pathlib import Path
from typing import Annotated

import typer

from dairllm.cli.app import RootCommand, app
from dairllm.cli.options import (
    ConfigFile,
    Kernels,
    KvCache,
    LogFormat,
    LogLevel,
    MaxSeqLen,
    MemoryLimit,
    Mode,
    ModelPath,
    PagingMode,
    Readers,
    Shares,
    Sync,
    Threads,
    TokenizerPath,
    Workers,
    number_or_word,
    root_flags,
    text_of,
)

__all__ = ["demo", "generate", "health", "serve", "worker"]


@app.command()
def demo(
    threads: Annotated[
        str | None, typer.Option(metavar="auto|N", help="Compute threads of each node.  [default: auto, the processors divided by three]")
    ] = None,
    kernels: Kernels = None,
) -> None:
    """Ask a small real model a question, shared out to a root and two workers: fetches it once (90 MB), converts it, answers."""
    from dairllm.config import RootSettings, load_settings
    from dairllm.telemetry import configure_logging

    flags = {"engine.threads": ("--threads", number_or_word(threads)), "engine.kernels": ("--kernels", kernels)}
    engine = load_settings(RootSettings, flags=flags).engine
    configure_logging(level="warning")

    from dairllm.commands import demo as command

    command.run(threads=None if engine.threads == "auto" else engine.threads, kernels=engine.kernels)


@app.command()
def worker(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 0.0.0.0]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.  [default: 9990]")] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", metavar="F.m", help="The root's model on a disk of this machine: no weights cross the network."),
    ] = None,
    kv_cache: KvCache = None,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    kernels: Kernels = None,
    paging: PagingMode = None,
    readers: Readers = None,
    metrics_port: Annotated[
        str | None, typer.Option(metavar="auto|PORT", help="Port of /healthz, /readyz and /metrics.  [default: auto, 1000 above --port]")
    ] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Serve roots: compute this node's share of a model, whose weights the root sends unless they are here already."""
    from dairllm.commands import worker as command

    command.run(
        config,
        {
            "worker.host": ("--host", host),
            "worker.port": ("--port", port),
            "worker.model": ("--model", text_of(model)),
            "worker.threads": ("--threads", number_or_word(threads)),
            "worker.kernels": ("--kernels", kernels),
            "worker.kv_cache": ("--kv-cache", kv_cache),
            "limits.memory": ("--memory-limit", memory_limit),
            "paging.io_mode": ("--paging", paging),
            "paging.readers": ("--readers", number_or_word(readers)),
            "metrics.port": ("--metrics-port", number_or_word(metrics_port)),
            "log.format": ("--log-format", log_format),
            "log.level": ("--log-level", log_level),
        },
    )


@app.command()
def health(config: ConfigFile = None) -> None:
    """Ask the worker or the server on this machine whether it can take work; exit code 0 when it can."""
    from dairllm.commands import health as command

    command.run(config)


@app.command(cls=RootCommand)
def generate(
    model: ModelPath = None,
    tokenizer: TokenizerPath = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT|-", help="What to continue; - for stdin.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="FILE", help="What to continue, from a file.")] = None,
    config: ConfigFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids in place of a prompt, nothing added; implies --ignore-eos.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Most tokens to generate.  [default: as many as there is room for]")
    ] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0: always the likeliest token.  [default: 0]")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Sample among the likeliest of this share.  [default: 0.9]")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Sample among so many likeliest.  [default: 0, all]")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Sample among those at least this share as likely as the likeliest.  [default: 0, all]"),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="R", help="Logits of tokens that prompt or answer have are divided by it.  [default: 1]")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(metavar="F", help="Taken off a logit for each time that the answer has the token.  [default: 0]")
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(metavar="P", help="Taken off the logits of all tokens that the answer has.  [default: 0]")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the sampling.  [default: another each time]")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on when the model says that it has finished.")] = False,
    workers: Workers = None,
    shares: Shares = None,
    mode: Mode = None,
    sync: Sync = None,
    threads: Threads = None,
    kernels: Kernels = None,
    kv_cache: KvCache = None,
    memory_limit: MemoryLimit = None,
    paging: PagingMode = None,
    readers: Readers = None,
    max_seq_len: MaxSeqLen = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object in place of the text.")] = False,
    logits: Annotated[
        Path | None, typer.Option(metavar="F.npy", help="Write what led to each generated id, float32 [steps, vocabulary].")
    ] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Generate text with a model, on this machine or together with workers."""
    flags = root_flags(locals(), others=("config", "prompt", "prompt_file", "prompt_ids", "chat", "ignore_eos", "json", "logits"))
    from dairllm.commands.generate_options import GenerateOptions, read_prompt
    from dairllm.config import RootSettings, load_settings
    from dairllm.telemetry import configure_logging

    settings = load_settings(RootSettings, config, flags=flags)
    text = read_prompt(prompt, prompt_file)
    options = GenerateOptions.of(settings, prompt=text, prompt_ids=prompt_ids, chat=chat, ignore_eos=ignore_eos, json=json, logits=logits)
    configure_logging(settings.log.format, settings.log.level_of(service=False))

    from dairllm.commands import generate as command  # heavy, so that a mistake above is told at once

    command.run(options)


@app.command(cls=RootCommand)
def serve(
    config: ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0: any free one.  [default: 8000]")] = None,
    model: ModelPath = None,
    tokenizer: TokenizerPath = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What /v1/models calls the model.  [default: its file's name without .m]")
    ] = None,
    workers: Workers = None,
    shares: Shares = None,
    mode: Mode = None,
    sync: Sync = None,
    threads: Threads = None,
    kernels: Kernels = None,
    kv_cache: KvCache = None,
    memory_limit: MemoryLimit = None,
    paging: PagingMode = None,
    readers: Readers = None,
    max_seq_len: MaxSeqLen = None,
    queue: Annotated[int | None, typer.Option(metavar="N", help="Requests that may wait for their turn.  [default: 64]")] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Answer requests in the form of OpenAI's API, on this machine or together with workers."""
    flags = root_flags(locals(), others=("config",))
    from dairllm.config import RootSettings, load_settings
    from dairllm.telemetry import configure_logging

    settings = load_settings(RootSettings, config, flags=flags)
    configure_logging(settings.log.format, settings.log.level_of(service=True))

    from dairllm.commands import serve as command  # heavy, so that a mistake above is told at once

    command.run(settings)
