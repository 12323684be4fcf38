"""Where the kernels' object code is kept between two starts, and the check that it is what this process would compile.

A folder is named by a digest of all that makes the machine code: the kernels' sources, versions, the target (targets.py). The file in it
begins with a digest of its own bytes, so that a torn or damaged one is compiled anew, not run. What was shipped with the program, which
`dairllm kernels --compile --to` has made, is looked for first; then what earlier starts have left.

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
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from dairllm.kernels import forms, processor
from dairllm.kernels.objects.loader import MAX_BYTES, ObjectCodeError
from dairllm.kernels.objects.targets import Target

__all__ = ["ObjectCodeCache", "Objects", "decode", "encode", "numba_folder", "shipped_folder"]

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
    """The places of a target's object code. Making one reads the kernels' sources.

    Args:
        target: what the object code is for.
        to: the only place, for all to read, as installed software has; by default what was shipped is read, and this user's caches
            are read and written.
    """

    def __init__(self, target: Target, to: Path | None = None) -> None:
        key = _key(target.form, target.level, target.features)
        self._to = to
        self._folders = [root / key for root in ([*_caches()] if to is None else [to])]
        self._shipped = [shipped_folder() / key] if to is None else []

    def find(self) -> tuple[Path, Objects] | None:
        """The file and its objects; None where there is none, or it is damaged, or others could have written it."""
        for folder in self._shipped + self._folders:
            with contextlib.suppress(OSError, ObjectCodeError):
                file = folder / _FILE
                if _is_trusted(folder) and _is_ours(file) and file.stat().st_size <= MAX_BYTES:
                    return file, decode(file.read_bytes(), str(file))
        return None

    def read(self) -> Objects | None:
        """The objects that `find` finds."""
        found = self.find()
        return None if found is None else found[1]

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
                    os.fchmod(handle, 0o600 if self._to is None else 0o644)
                os.replace(name, folder / _FILE)  # whoever reads meanwhile sees the old file or the new one, whole
            except OSError:
                os.unlink(name)
                raise

    def folder(self) -> Path | None:
        """The folder to write to, made if need be; None where there is none."""
        return _writable(self._folders, 0o700 if self._to is None else 0o755)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process compiles kernels into this cache. Where no lock can be had there is no waiting; nor for a folder that
        is to be shipped, which is to hold nothing else."""
        with contextlib.ExitStack() as stack:
            folder = self.folder()
            if folder is not None and self._to is None:
                with contextlib.suppress(OSError):
                    lock = stack.enter_context(open(folder.parent / "compiling.lock", "wb"))
                    fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the file is closed, or the process ends
            yield


def shipped_folder() -> Path:
    """Where an installation, such as an image, may have object code for whoever runs it. A start only reads it."""
    return Path(sys.prefix) / "share" / "dairllm" / "kernels"


def numba_folder() -> Path | None:
    """A folder for numba's own cache, where it compiles in this process and for this processor; None where nothing can be written to, or
    nobody knows what processor this is."""
    kind = processor.identity()
    if kind is None:
        return None
    key = _key(forms.current(), kind)
    return _writable([root / key for root in _caches()], 0o700)


def _writable(folders: Iterable[Path], mode: int) -> Path | None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True, mode=mode)
            if _is_trusted(folder) and os.access(folder, os.W_OK):
                return folder
    return None


def _is_ours(path: Path) -> bool:
    """Of this user or the administrator, and nobody else may write it."""
    status = path.stat()
    return status.st_uid in (0, os.getuid()) and not status.st_mode & 0o022


def _is_trusted(folder: Path) -> bool:
    """Machine code is loaded from here: whoever owns a folder above it could put another in its place."""
    return _is_ours(folder) and all(parent.stat().st_uid in (0, os.getuid()) for parent in (folder.parent, folder.parent.parent))


def _key(*target: str) -> str:
    """A folder's name."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for source in sorted([*here.glob("*.py"), *here.parent.glob("*.py")]):
        digest.update(source.read_bytes())
    for part in (_version("numba"), _version("llvmlite"), sys.implementation.cache_tag, *target):
        digest.update(f"\0{part}".encode())
    return digest.hexdigest()[:24]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # installed in a way that leaves no note of it
        return "unknown"


def _caches() -> Iterator[Path]:
    """Where caches may lie, best first. A container may have no home, and nothing that can be written to at all."""
    with contextlib.suppress(RuntimeError):  # no home
        yield Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dairllm" / "kernels"
    with contextlib.suppress(FileNotFoundError):  # no folder for temporary files
        yield Path(tempfile.gettempdir()) / f"dairllm-{os.getuid()}" / "kernels"
