"""What a file is, where it is not the one that was expected.

People name one of a model's files for another, or one of another program. A message that says which
it is, and what to do with it, saves them the search.
"""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from dairllm.errors import FormatError

__all__ = ["HEAD_BYTES", "check_is_model", "is_gguf", "kind_of", "kind_of_folder", "unreadable"]

HEAD_BYTES = 64
"""Of a file, that tell its kind."""

_GGUF = b"GGUF"
_MODEL = b"\xcd\xab\x00\x0a"


def _gguf(path: Path) -> str:
    return f"a GGUF file: dairllm convert {path} {path.with_suffix('.m')}"


def _model(path: Path) -> str:
    return f"a .m model file, which needs no conversion: dairllm generate --model {path}"


def _tokenizer(path: Path) -> str:
    return f"a .t tokenizer file; the model that it belongs to is probably {path.with_suffix('.m')}"


def _share(path: Path) -> str:
    return f"one node's share of a model; name the model, {path.name.partition('.share-')[0]}, beside which it is found"


def _json(path: Path) -> str:
    if path.name in ("tokenizer.json", "tokenizer_config.json"):
        return f"a model's {path.name}, which is used where it lies beside the model's .t file: name that"
    return "a JSON file"


_SAFETENSORS = "a safetensors file, which cannot be read: a GGUF file of the same model can be converted (dairllm convert)"
_PICKLE = "a PyTorch file, which cannot be read: a GGUF file of the same model can be converted (dairllm convert)"

_KINDS: tuple[tuple[bytes, Callable[[Path], str]], ...] = (
    (_GGUF, _gguf),
    (_MODEL, _model),
    (b"\x24\x71\x56\x00", _tokenizer),
    (b"dairllm share ", _share),
    (b"version https://git-lfs", lambda _: "a pointer of Git LFS in place of the file itself: fetch that with git lfs pull"),
    (b"<!doctype html", lambda _: "an HTML page in place of the file: fetch it anew, by the address of the file itself"),
    (b"<html", lambda _: "an HTML page in place of the file: fetch it anew, by the address of the file itself"),
    (b"PK\x03\x04", lambda _: _PICKLE),
    (b"\x80\x02", lambda _: _PICKLE),
    (b"{", _json),
)


def kind_of(path: Path, head: bytes, *, for_tokenizer: bool = False) -> str | None:
    """What `path` is and what can be done with it, for a message "expected ..., found ..."; None where
    that cannot be told.

    Args:
        head: its first bytes, `HEAD_BYTES` of them or more where there are so many.
        for_tokenizer: whether a tokenizer was expected: then that of a model helps.
    """
    if for_tokenizer and head.startswith(_MODEL):
        return f"a .m model file; its tokenizer is probably {path.with_suffix('.t')}"
    start = head.lstrip().lower() if head.lstrip()[:1] in (b"<", b"{") else head
    for magic, tell in _KINDS:
        if start.startswith(magic):
            return tell(path)
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return _SAFETENSORS
    return None


def kind_of_folder(path: Path) -> str:
    """What a folder is, where a file was expected."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return "a folder"
    for name in names:
        if name.endswith((".m", ".gguf")):
            return f"a folder; it has {path / name}"
    if any(name.endswith((".safetensors", ".bin", ".pth")) for name in names):
        return "a Hugging Face folder, which cannot be read: a GGUF file of the same model can be converted (dairllm convert)"
    return "a folder"


def check_is_model(path: Path) -> None:
    """Raise FormatError where what is at `path` is known to be something else than a `.m` file. Only
    its first bytes are read; where they cannot be, whoever opens it says so."""
    if path.is_dir():
        raise FormatError(path, None, "a .m model file", kind_of_folder(path))
    head = _head(path)
    if head is None or head.startswith(_MODEL):
        return
    found = kind_of(path, head) if head else "an empty file"
    if found is not None:
        raise FormatError(path, None, "a .m model file", found)


def unreadable(path: Path, kind: str, error: OSError) -> FormatError:
    """The error of a file that cannot be opened or read. Where there is none of its name, it says the
    nearest name that there is.

    Args:
        kind: what was expected, such as "a readable .m model file".
    """
    if not isinstance(error, FileNotFoundError):
        return FormatError(path, None, kind, error.strerror or str(error))
    try:
        names = [name for name in os.listdir(path.parent) if name.endswith(path.suffix)]
    except OSError:
        return FormatError(path, None, kind, f"no folder {path.parent}")
    near = difflib.get_close_matches(path.name, names, 1, 0.6)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return FormatError(path, None, kind, f"no file of this name{hint}")


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file; False where it cannot be read."""
    return (_head(path) or b"").startswith(_GGUF)


def _head(path: Path) -> bytes | None:
    try:
        if not path.is_file():  # a pipe would wait for ever
            return None
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return None
