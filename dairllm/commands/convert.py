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
    """Convert `source` (a GGUF file) into `target` and what lies beside it; print the files that were written. In a folder the model
    bears its source's name.

    A progress bar goes to stderr where that is a terminal and NO_COLOR is not set.

    Raises:
        ConfigError: `weights` is none of those known, or `target` no name of a model file.
        FormatError: `source` cannot be read, or is a model that a `.m` file cannot say.
        LimitError: there is no room on the disk.
        OSError: a file cannot be written.
    """
    if weights.lower() not in _WEIGHTS:
        raise ConfigError(f"--weights is one of {', '.join(_WEIGHTS)}, not {weights!r}")
    if target.is_dir():
        target /= f"{source.stem}.m"
    with byte_bar(target.name) as progress:
        conversion = convert_gguf(source, target, _WEIGHTS[weights.lower()], progress)
    for warning in conversion.warnings:
        _log.warning(warning, file=str(target))
    for path, nbytes in conversion.files.items():
        sys.stdout.write(f"{path}  {format_size(nbytes)}\n")
