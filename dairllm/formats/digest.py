"""Digests of a model file: one a tensor, one of the header, and one of them all, the model's *identity*.

Two files with the same identity are the same model, byte for byte, whatever they are called. Digests are BLAKE3, of 32 bytes. They cost one
reading of the file; so they are kept beside it (``m.m.digests``, JSON) and hold as long as its size and the time of its last writing do.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from dairllm.errors import FormatError
from dairllm.formats.file_kind import unreadable
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.formats.replaced_file import replaced_file
from dairllm.formats.strict_json import read_json, whole_number
from dairllm.graph.references import IDENTITY_BYTES

__all__ = [
    "WORTH_KEEPING",
    "Digests",
    "Progress",
    "compute_digests",
    "digests_path",
    "keep_digests",
    "kept_digests",
    "model_digests",
    "sampled_digest",
]

WORTH_KEEPING = 64 << 20
"""Bytes of a file whose digests take long enough to be kept."""

Progress = Callable[[str, int, int], None]
"""Told what is being read, bytes read, bytes in all."""

_FORMAT = "dairllm digests 1"
_PIECE_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096


@dataclass(frozen=True, slots=True)
class Digests:
    """Of one model file.

    Attributes:
        nbytes: of the file.
        mtime_ns: when it was last written.
        header: digest of the bytes before the first tensor.
        tensors: digest of each tensor, in file order.
    """

    nbytes: int
    mtime_ns: int
    header: bytes
    tensors: tuple[bytes, ...]

    @property
    def identity(self) -> bytes:
        """Of the whole model: the digest of all digests."""
        return blake3(self.header + b"".join(self.tensors)).digest()

    def fits(self, stamp: FileStamp) -> bool:
        """Whether the file is, as far as can be told without reading it, still the one that these were made of."""
        return (self.nbytes, self.mtime_ns) == (stamp.nbytes, stamp.mtime_ns)

    def differences(self, other: "Digests", model: ModelFile) -> list[str]:
        """The tensors of `model` that others' digests contradict, by label; "the header" first."""
        header = ["the header"] if self.header != other.header else []
        pairs = zip(model.tensors, self.tensors, other.tensors, strict=True)
        return header + [tensor.label for tensor, mine, theirs in pairs if mine != theirs]


_unkept: dict[FileStamp, Digests] = {}
"""Computed by this process and not to be kept: a root that tries again is not to read the file again."""


def model_digests(model: ModelFile, progress: Progress | None = None) -> Digests:
    """Those kept beside the model, else computed, which takes as long as to read the file, and kept where that can be done.

    Kept ones that the file contradicts are left as they are: they may be right, and the file torn (`dairllm verify` tells which tensors).

    Raises:
        FormatError: the file cannot be read, or changes meanwhile.
    """
    kept, known = kept_digests(model), _unkept.get(model.stamp)
    if kept is not None and kept.fits(model.stamp):
        return kept
    if known is not None:
        return known
    found = compute_digests(model, progress)
    if model.nbytes >= WORTH_KEEPING:
        contradicted = kept is not None and kept.identity != found.identity
        if contradicted or not keep_digests(model, found):
            _unkept[model.stamp] = found
    return found


def compute_digests(model: ModelFile, progress: Progress | None = None) -> Digests:
    """Read the whole file. For a thread: the interpreter is not held while bytes are read and digested.

    It is read, not mapped: what is mapped counts as this process's memory.

    Raises:
        FormatError: it cannot be read, or is not the file any more that `model` is of.
    """
    piece = memoryview(bytearray(_PIECE_BYTES))
    try:
        with model.path.open("rb", buffering=0) as file:
            _check_unchanged(model, file.fileno())

            def digest(label: str, offset: int, nbytes: int) -> bytes:
                digester, end = blake3(), offset + nbytes
                while offset < end:
                    if progress is not None:
                        progress(label, offset, model.nbytes)
                    room = piece[: min(len(piece), end - offset)]
                    got = os.preadv(file.fileno(), [room], offset)
                    if not got:
                        raise FormatError(model.path, offset, f"{end - offset} more bytes of {label}", "the end of the file")
                    digester.update(room[:got])
                    offset += got
                return digester.digest()

            header = digest("the header", 0, model.header_bytes)
            tensors = tuple(digest(tensor.label, tensor.offset, tensor.nbytes) for tensor in model.tensors)
            _check_unchanged(model, file.fileno())
    except OSError as error:
        raise unreadable(model.path, "a readable .m model file", error) from error
    if progress is not None:
        progress("", model.nbytes, model.nbytes)
    return Digests(model.stamp.nbytes, model.stamp.mtime_ns, header, tensors)


def sampled_digest(model: ModelFile) -> bytes:
    """Of the header and of the first bytes of tensors all over the file: it tells models apart, and is read in a moment.

    Raises:
        FormatError: the file cannot be read, or is not the file any more that `model` is of.
    """
    step = -(-len(model.tensors) // _SAMPLES)
    places = [(0, model.header_bytes), *((tensor.offset, min(tensor.nbytes, _SAMPLE_BYTES)) for tensor in model.tensors[::step])]
    digester = blake3(model.nbytes.to_bytes(8, "little"))
    try:
        with model.path.open("rb", buffering=0) as file:
            _check_unchanged(model, file.fileno())
            for offset, nbytes in places:
                digester.update(os.pread(file.fileno(), nbytes, offset))
    except OSError as error:
        raise unreadable(model.path, "a readable .m model file", error) from error
    return digester.digest()


def digests_path(model: Path) -> Path:
    """Where a model's digests are kept."""
    return model.with_name(f"{model.name}.digests")


def kept_digests(model: ModelFile) -> Digests | None:
    """What is kept beside the model, whether it still fits or not; None where nothing is, or nothing that can be one of this model."""
    try:
        kept = read_json(digests_path(model.path).read_bytes())
        if kept["format"] != _FORMAT:
            return None
        header, *tensors = (bytes.fromhex(kept["digests"][label]) for label in _labels(model))
        found = Digests(whole_number(kept["bytes"]), whole_number(kept["mtime_ns"]), header, tuple(tensors))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    whole = len(kept["digests"]) == len(tensors) + 1 and all(len(digest) == IDENTITY_BYTES for digest in (header, *tensors))
    # the identity guards against a file that was edited, or cut short and mended
    return found if whole and kept.get("identity") == found.identity.hex() else None


def keep_digests(model: ModelFile, digests: Digests) -> bool:
    """Keep digests beside the model; False where its folder cannot be written to, which is no error: they are computed anew then."""
    named = zip(_labels(model), (digests.header, *digests.tensors), strict=True)
    kept = {
        "format": _FORMAT,
        "bytes": digests.nbytes,
        "mtime_ns": digests.mtime_ns,
        "identity": digests.identity.hex(),
        "digests": {label: digest.hex() for label, digest in named},
    }
    try:
        with replaced_file(digests_path(model.path)) as file:
            file.write(json.dumps(kept, indent=0).encode())
    except OSError:
        return False
    return True


def _labels(model: ModelFile) -> list[str]:
    return ["the header", *(tensor.label for tensor in model.tensors)]


def _check_unchanged(model: ModelFile, descriptor: int) -> None:
    if FileStamp.of(descriptor) != model.stamp:
        raise FormatError(model.path, None, "the file that was opened, unchanged", "one that was written to meanwhile")
