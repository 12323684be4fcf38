"""Where the kernels' object code is kept between two starts, and the check that it is what this process would compile.

A folder is named by a digest of all that makes the machine code: the kernels' sources, versions, the kind of processor and what is hidden
of it, the form. The file in it begins with a digest of its own bytes, so that a torn or damaged one is compiled anew, not run.

    dairllm kernels 1 SHA256-OF-ALL-THAT-FOLLOWS \\n
    {"name of a function": ["its symbol", bytes of its object], ...} \\n
    the objects, one after the other
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from dairllm.kernels import forms, processor
from dairllm.kernels.object_code import MAX_BYTES, ObjectCodeError

__all__ = ["ObjectCodeCache", "Objects", "decode", "encode"]

Objects = Mapping[str, tuple[str, bytes]]
"""By a function's name: its symbol, and the object that defines it."""

_MAGIC = b"dairllm kernels 1 "
_FILE = "kernels.o"


def encode(objects: Objects) -> bytes:
    """The bytes of a file of these objects."""
    index = {name: (symbol, len(raw)) for name, (symbol, raw) in objects.items()}
    body = json.dumps(index).encode() + b"\n" + b"".join(raw for _, raw in objects.values())
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def decode(raw: bytes, where: str) -> Objects:
    """The objects of a file.

    Raises:
        ObjectCodeError: it is damaged, or of another kind; `where` names it.
    """
    first, _, body = raw.partition(b"\n")
    if not first.startswith(_MAGIC):
        raise ObjectCodeError(f"{where}: expected {_MAGIC.decode()!r}, found {first[: len(_MAGIC)]!r}")
    if first[len(_MAGIC) :] != hashlib.sha256(body).hexdigest().encode():
        raise ObjectCodeError(f"{where}: its digest is not that of its {len(body)} bytes")
    index, _, rest = body.partition(b"\n")
    objects, at = {}, 0
    for name, (symbol, size) in json.loads(index).items():
        objects[name] = symbol, rest[at : at + size]
        at += size
    return objects


class ObjectCodeCache:
    """The place of this process's object code. Making one reads the kernels' sources, and fixes the form of the process."""

    def __init__(self) -> None:
        key = _key()
        self._folders = [] if key is None else [root / "kernels" / key for root in _roots()]

    def read(self) -> Objects | None:
        """What an earlier start has left; None where there is nothing, or it is damaged, or others could have written it."""
        for folder in self._folders:
            with contextlib.suppress(OSError, ObjectCodeError):
                file = folder / _FILE
                if _is_trusted(folder) and _is_ours(file) and file.stat().st_size <= MAX_BYTES:
                    return decode(file.read_bytes(), str(file))
        return None

    def write(self, objects: Objects) -> None:
        """Leave them for the next start. Where nothing can be written nothing is kept, which costs a compilation at each start."""
        folder = self.folder()
        if folder is None:
            return
        with contextlib.suppress(OSError):
            handle, name = tempfile.mkstemp(prefix=_FILE, dir=folder)
            try:
                with open(handle, "wb") as file:
                    file.write(encode(objects))
                os.replace(name, folder / _FILE)  # whoever reads meanwhile sees the old file or the new one, whole
            except OSError:
                os.unlink(name)
                raise

    def folder(self) -> Path | None:
        """The folder, made if need be; None where none can be written to, or nobody knows what processor this is."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                if _is_trusted(folder) and os.access(folder, os.W_OK):
                    return folder
        return None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process compiles kernels into this cache. Where no lock can be had there is no waiting."""
        with contextlib.ExitStack() as stack:
            folder = self.folder()
            if folder is not None:
                with contextlib.suppress(OSError):
                    lock = stack.enter_context(open(folder.parent / "compiling.lock", "wb"))
                    fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or the process ends
            yield


def _is_ours(path: Path) -> bool:
    """Of this user or the administrator, and nobody else may write it."""
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


def _is_trusted(folder: Path) -> bool:
    """Machine code is loaded from here: whoever owns a folder above it could put another in its place."""
    return _is_ours(folder) and all(parent.stat().st_uid in (0, os.getuid()) for parent in (folder.parent, folder.parent.parent))


def _key() -> str | None:
    """The folder's name; None where the system does not say what processor it has."""
    kind = processor.identity()
    if kind is None:
        return None
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for part in (_version("numba"), _version("llvmlite"), sys.implementation.cache_tag, kind, forms.current()):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # installed in a way that leaves no note of it
        return "unknown"


def _roots() -> Iterator[Path]:
    """Where caches may lie, best first. A container may have no home, and nothing that can be written to at all."""
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dairllm"
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"dairllm-{os.getuid()}"
