"""Options that several commands take, and the settings that they are."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "ConfigFile",
    "Kernels",
    "KvCache",
    "LogFormat",
    "LogLevel",
    "MaxSeqLen",
    "MemoryLimit",
    "Mode",
    "ModelPath",
    "PagingMode",
    "Readers",
    "Shares",
    "Sync",
    "Threads",
    "TokenizerPath",
    "Workers",
    "number_or_word",
    "root_flags",
    "text_of",
]

# Choices are words here and are checked with the settings, whose message is the same wherever they come from.
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", envvar="DAIRLLM_CONFIG", help="YAML file of settings; flags come first.")
]
Threads = Annotated[str | None, typer.Option(metavar="auto|N", help="Compute threads.  [default: auto, one a processor]")]
Kernels = Annotated[
    str | None, typer.Option(metavar="auto|portable|avx2|avxvnni|avx512vnni", help="Form of the kernels.  [default: auto, the fastest]")
]
ModelPath = Annotated[Path | None, typer.Option("--model", "-m", metavar="F.m", help="Model file.")]
TokenizerPath = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="F.t", help="Tokenizer file.  [default: the model's name with .t]")
]
Workers = Annotated[list[str] | None, typer.Option(metavar="HOST:PORT ...", help="Workers to share the model with.  [default: none]")]
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
PagingMode = Annotated[
    str | None,
    typer.Option(
        "--paging",
        metavar="auto|mmap|buffered|direct",
        help="How weights that do not fit are read.  [default: auto, by measuring]",
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
    "paging": "paging.io_mode",
    "readers": "paging.readers",
    "steps": "sampling.steps",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "seed": "sampling.seed",
    "log_format": "log.format",
    "log_level": "log.level",
}
"""The setting that each parameter of a root's commands is."""


def root_flags(parameters: Mapping[str, Any], *, others: Container[str] = ()) -> dict[str, tuple[str, object]]:
    """Those of a command's parameters that are settings, as `load_settings` takes them.

    Args:
        others: parameters that are no settings.

    Raises:
        ValueError: a parameter is neither.
    """
    unknown = [name for name in parameters if name not in _ROOT_KEYS and name not in others]
    if unknown:
        raise ValueError(f"parameters that are no settings and not named as others: {', '.join(unknown)}")
    return {key: (f"--{name.replace('_', '-')}", _plain(name, parameters[name])) for name, key in _ROOT_KEYS.items() if name in parameters}


def _plain(name: str, value: Any) -> object:
    if isinstance(value, Path):
        return str(value)
    if name in ("threads", "readers"):
        return number_or_word(value)
    return None if value == [] else value


def text_of(path: Path | None) -> str | None:
    return None if path is None else str(path)


def number_or_word(text: str | None) -> int | str | None:
    """A number where it is one; whatever else it is, the settings' check names what they would take."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() else text
