"""The command line: what can be asked for, and how each outcome ends the process. What a command does stands in `dairllm.commands`.

Exit codes: 0 done; 1 it failed, and one line on stderr says why; 2 wrong usage or configuration; 130 and 143 cut short by Ctrl-C and
SIGTERM; 141 whoever read stdout has gone away (no message: they know).

Only this module's imports are paid for by `dairllm --help`, so a command imports its body when it is called.
"""

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
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

# Choices are words here and are checked with the settings, whose message is the same wherever they come from.
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", envvar="DAIRLLM_CONFIG", help="YAML file of settings; flags come first.")
]
Threads = Annotated[str | None, typer.Option(metavar="auto|N", help="Compute threads.  [default: auto, one a processor]")]
Kernels = Annotated[
    str | None, typer.Option(metavar="auto|portable|avx2|avxvnni|avx512vnni", help="Form of the kernels.  [default: auto, the fastest]")
]
ModelPath = Annotated[Path | None, typer.Option("--model", metavar="F.m", help="Model file.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="F.t", help="Tokenizer file.  [default: the model's name with .t]")
]
Workers = Annotated[
    list[str] | None, typer.Option(metavar="HOST:PORT,...", help="Workers to share the model with; may be repeated.  [default: none]")
]
Shares = Annotated[
    str | None,
    typer.Option(
        metavar="2/64,1/32,...", help="Query heads / feed-forward columns of each node, this one first.  [default: nearly equal ones]"
    ),
]
Mode = Annotated[str | None, typer.Option(metavar="tensor", help="How nodes share a model.  [default: tensor, every layer by all]")]
Sync = Annotated[
    str | None,
    typer.Option(metavar="auto|q80|f32", help="What crosses the wire between nodes.  [default: auto, f32 for F32 weights, else q80]"),
]
MaxSeqLen = Annotated[int | None, typer.Option(metavar="N", help="Context length.  [default: the model's]")]
MemoryLimit = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Most that this process may hold, such as 2GiB or 80%.  [default: 80%]")
]
PagingWay = Annotated[
    str | None,
    typer.Option(
        "--paging", metavar="auto|map|buffered|direct", help="How weights that do not fit are read.  [default: auto, by measuring the file]"
    ),
]
Readers = Annotated[str | None, typer.Option(metavar="auto|N", help="Threads that read weights ahead.  [default: auto]")]
KvCache = Annotated[
    str | None,
    typer.Option(metavar="f32|f16|q80", help="How keys and values are kept; f16 takes half, q80 a quarter of the memory.  [default: f32]"),
]
LogFormat = Annotated[
    str | None, typer.Option(metavar="auto|console|json", help="How logs are written.  [default: auto, console at a terminal, else json]")
]
LogLevel = Annotated[str | None, typer.Option(metavar="debug|info|warning|error", help="Least severe of the log lines to write.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dairllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Options of `dairllm` itself."""


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

    flags = {"engine.threads": ("--threads", _number_or_word(threads)), "engine.kernels": ("--kernels", kernels)}
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
        Path | None, typer.Option(metavar="F.m", help="The root's model on a disk of this machine: no weights cross the network.")
    ] = None,
    kv_cache: KvCache = None,
    memory_limit: MemoryLimit = None,
    threads: Threads = None,
    kernels: Kernels = None,
    paging: PagingWay = None,
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
            "worker.model": ("--model", _text(model)),
            "worker.threads": ("--threads", _number_or_word(threads)),
            "worker.kernels": ("--kernels", kernels),
            "worker.kv_cache": ("--kv-cache", kv_cache),
            "limits.memory": ("--memory-limit", memory_limit),
            "paging.way": ("--paging", paging),
            "paging.readers": ("--readers", _number_or_word(readers)),
            "metrics.port": ("--metrics-port", _number_or_word(metrics_port)),
            "log.format": ("--log-format", log_format),
            "log.level": ("--log-level", log_level),
        },
    )


@app.command()
def health(config: ConfigFile = None) -> None:
    """Ask the worker or the server on this machine whether it can take work; exit code 0 when it can."""
    from dairllm.commands import health as command

    command.run(config)


@app.command()
def generate(
    model: ModelPath = None,
    tokenizer: TokenizerPath = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to continue.")] = None,
    config: ConfigFile = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the model's chat template.")] = False,
    prompt_ids: Annotated[
        str | None, typer.Option(metavar="1,2,3", help="Token ids in place of a prompt, nothing added; implies --ignore-eos.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Most tokens to generate.  [default: 256]")] = None,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0: always the likeliest token.  [default: 0]")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Sample among the likeliest of this share.  [default: 0.9]")] = None,
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
    paging: PagingWay = None,
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
    flags = _root_flags(locals())
    from dairllm.commands.generate_options import GenerateOptions
    from dairllm.config import RootSettings, load_settings
    from dairllm.telemetry import configure_logging

    settings = load_settings(RootSettings, config, flags=flags)
    options = GenerateOptions.of(settings, prompt=prompt, prompt_ids=prompt_ids, chat=chat, ignore_eos=ignore_eos, json=json, logits=logits)
    configure_logging(settings.log.format, settings.log.level_of(service=False))

    from dairllm.commands import generate as command  # heavy, so that a mistake above is told at once

    command.run(options)


@app.command()
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
    paging: PagingWay = None,
    readers: Readers = None,
    max_seq_len: MaxSeqLen = None,
    queue: Annotated[int | None, typer.Option(metavar="N", help="Requests that may wait for their turn.  [default: 64]")] = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> None:
    """Answer requests in the form of OpenAI's API, on this machine or together with workers."""
    flags = _root_flags(locals())
    from dairllm.commands import serve as command

    command.run(config, flags)


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
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="GGUF file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT.m", help="Model file to write; OUT.t and tokenizer.json go beside it.")],
    weights: Annotated[str, typer.Option(metavar="q40|q80|f32", help="How weights are stored.")] = "q40",
) -> None:
    """Make a model file, its tokenizer file and its tokenizer.json of a model in another format."""
    from dairllm.commands import convert as command
    from dairllm.telemetry import configure_logging

    configure_logging(level="warning")
    command.run(source, target, weights)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file.")],
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
    config: ConfigFile = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what each node would hold within a memory limit, and how much of the weights it would read for each token."""
    flags = _root_flags({name: value for name, value in locals().items() if name != "model"})
    from dairllm.commands import plan as command

    command.run(model, config, nodes, flags, json=json)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(metavar="F.m", help="Model file; its digests lie beside it, as F.m.digests.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with the digest of each tensor.")] = False,
) -> None:
    """Read a model file, say which model it is, and whether a tensor has changed since it was first read."""
    from dairllm.commands import verify as command

    command.run(model, json=json)


def main() -> None:
    """Run the command line and end the process with the code that says how it went."""
    signal.signal(signal.SIGTERM, _terminated)
    app(prog_name="dairllm")


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds like Ctrl-C, so that files are closed and child processes ended. A service sets a handler of its own."""
    raise SystemExit(CUT_SHORT_BY_TERMINATION)


_ROOT_KEYS = {
    "host": "server.host",
    "port": "server.port",
    "queue": "server.queue",
    "model": "model.file",
    "tokenizer": "model.tokenizer",
    "model_name": "model.name",
    "max_seq_len": "model.max_seq_len",
    "workers": "cluster.workers",
    "shares": "cluster.shares",
    "mode": "cluster.mode",
    "threads": "engine.threads",
    "kernels": "engine.kernels",
    "sync": "engine.sync",
    "kv_cache": "engine.kv_cache",
    "memory_limit": "limits.memory",
    "paging": "paging.way",
    "readers": "paging.readers",
    "steps": "sampling.steps",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "seed": "sampling.seed",
    "log_format": "log.format",
    "log_level": "log.level",
}
"""The setting that each parameter of a root's commands is."""


def _root_flags(parameters: Mapping[str, Any]) -> dict[str, tuple[str, object]]:
    """Those of a command's parameters that are settings, as `load_settings` takes them."""
    return {key: (f"--{name.replace('_', '-')}", _plain(name, parameters[name])) for name, key in _ROOT_KEYS.items() if name in parameters}


def _plain(name: str, value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if name in ("threads", "readers"):
        return _number_or_word(value)
    return None if value == [] else value


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _number_or_word(text: str | None) -> int | str | None:
    """A number where it is one; whatever else it is, the settings' check names what they would take."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else text
