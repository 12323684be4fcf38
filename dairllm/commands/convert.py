"""`dairllm convert`: a model in another format becomes a `.m`, a `.t` and a `tokenizer.json`."""

import sys
from pathlib import Path

import structlog

from dairllm.commands.progress import byte_bar
from dairllm.errors import ConfigError
from dairllm.formats.convert import convert_gguf
from dairllm.graph.types import FloatType
from dairllm.units import format_size

__all__ = ["run"]

_WEIGHTS = {"auto": None, "q40": FloatType.Q40, "q80": FloatType.Q80, "f32": FloatType.F32}

_log = structlog.get_logger(__name__)


def run(source: Path, target: Path, weights: str = "auto") -> None:
    """Convert `source` (a GGUF file) into `target` and what lies beside it; print the files that were written.

    A progress bar goes to stderr where that is a terminal and NO_COLOR is not set.

    Raises:
        ConfigError: `weights`, `target` or the kind of `source` is none of those known.
        FormatError: `source` cannot be read, or is a model that a `.m` file cannot say.
        LimitError: there is no room on the disk.
        OSError: a file cannot be written.
    """
    if weights.lower() not in _WEIGHTS:
        raise ConfigError(f"--weights is one of {', '.join(_WEIGHTS)}, not {weights!r}")
    if source.is_dir():
        raise ConfigError(f"{source} is a folder; a GGUF file can be converted")
    with byte_bar(target.name) as progress:
        conversion = convert_gguf(source, target, _WEIGHTS[weights.lower()], progress)
    for warning in conversion.warnings:
        _log.warning(warning, file=str(target))
    for path, nbytes in conversion.files.items():
        sys.stdout.write(f"{path}  {format_size(nbytes)}\n")
