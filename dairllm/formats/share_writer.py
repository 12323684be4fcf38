"""Writes the file of a node's share (`dairllm.formats.share_file`), and goes on where an earlier attempt was cut short.

Slices come from the model's file through a piece of memory, under a temporary name. Every 64 MiB what has been written is brought to the
disk, and only then are its digests written: what has a digest is there. What an attempt before has left is compared with its digests, as
far as they agree it is kept. The seal comes last, then the name.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from blake3 import blake3

from dairllm.errors import FormatError, LimitError
from dairllm.formats.digest import Progress
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.formats.share_file import HEAD, MAGIC, Contents, ShareFile, data_offset, read_digest, share_path
from dairllm.formats.share_layout import PlacedSlice, share_layout
from dairllm.graph.slicing import Share
from dairllm.units import format_size

__all__ = ["PreparedShare", "ShareWriter", "check_room"]

_DIGEST_BYTES = 32
_PIECE_BYTES = 1 << 20
_SYNC_BYTES = 64 << 20

State = Literal["written", "continued", "whole"]


@dataclass(frozen=True, slots=True)
class PreparedShare:
    """A file that is there now.

    Attributes:
        state: "written" by this attempt, "continued" from an earlier one, or "whole" already.
        nbytes: of the file.
        digest: of its slices.
    """

    path: Path
    node: int
    state: State
    nbytes: int
    digest: bytes


class ShareWriter:
    """The share of one node, to be written beside the model.

    Args:
        model: open, of `identity`.
        share: of node `node` of `n_nodes`.

    Raises:
        GraphError: the share goes beyond the model.
    """

    def __init__(self, model: ModelFile, identity: bytes, node: int, n_nodes: int, share: Share) -> None:
        self._model, self._share = model, share
        self._layout = share_layout(model.spec, model.tensors, share, n_nodes)
        self._contents = Contents.of(identity, node, n_nodes, share, self._layout)
        self._description = self._contents.encode()
        self._begin = data_offset(len(self._description), len(self._layout))
        self.path = share_path(model.path, node, n_nodes)
        self.part_path = self.path.with_name(f".{self.path.name}.part")
        self.nbytes = self._begin + self._contents.nbytes
        """Of the whole file."""

    @property
    def is_there(self) -> bool:
        """Whether the file is there and says that it is this share; what its slices are `ShareFile.torn` tells."""
        try:
            file = ShareFile.open(self.path)
        except FormatError:
            return False
        same = file.contents == self._contents
        file.close()
        return same

    @property
    def missing_bytes(self) -> int:
        """That the disk must have room for yet."""
        if self.is_there:
            return 0
        try:
            return self.nbytes - min(self.nbytes, os.stat(self.part_path).st_blocks * 512)
        except OSError:
            return self.nbytes

    def prepare(self, progress: Progress | None = None) -> PreparedShare:
        """Have the file there, whole: every byte of it is written or compared with its digest. For a thread.

        Raises:
            FormatError: the model changes meanwhile, or cannot be read.
            LimitError: there is no room for it on the disk, or another process is at it.
            OSError: it cannot be written.
        """
        state: State = "whole"
        if not self.is_there or not self._is_whole(progress):
            state = self._write(progress)
        file = ShareFile.open(self.path)
        digest = file.digest
        file.close()
        return PreparedShare(self.path, self._contents.node, state, self.nbytes, digest)

    def _is_whole(self, progress: Progress | None) -> bool:
        file = ShareFile.open(self.path)
        torn = next(file.torn(progress), None)
        file.close()
        return torn is None

    def _write(self, progress: Progress | None) -> State:
        check_room(self.path.parent, self.missing_bytes, str(self.path))
        with self._part() as part:
            digests = self._agreeing(part, progress)
            state: State = "continued" if digests else "written"
            if not digests:
                os.ftruncate(part, 0)
                os.pwrite(part, HEAD.pack(MAGIC, len(self._description), bytes(_DIGEST_BYTES)) + self._description, 0)
            os.ftruncate(part, self.nbytes)
            self._write_slices(part, digests, progress)
            seal = blake3(self._description + b"".join(digests)).digest()
            os.pwrite(part, HEAD.pack(MAGIC, len(self._description), seal), 0)
            os.fsync(part)
            self.part_path.replace(self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return state

    @contextmanager
    def _part(self) -> Iterator[int]:
        """The file under its temporary name; nobody else's meanwhile."""
        part = os.open(self.part_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LimitError(f"{self.path} is being prepared by another process") from None
            yield part
        finally:
            os.close(part)

    def _agreeing(self, part: int, progress: Progress | None) -> list[bytes]:
        """Digests of the slices that an earlier attempt has written; none where it was of another share or model."""
        head = HEAD.pack(MAGIC, len(self._description), bytes(_DIGEST_BYTES)) + self._description
        table = os.pread(part, len(head) + _DIGEST_BYTES * len(self._layout), 0)
        if table[: len(head)] != head:
            return []
        found: list[bytes] = []
        piece = memoryview(bytearray(_PIECE_BYTES))
        for placed in self._layout:
            start = len(head) + len(found) * _DIGEST_BYTES
            digest, offset = table[start : start + _DIGEST_BYTES], self._begin + placed.offset
            if digest == bytes(_DIGEST_BYTES) or read_digest(part, offset, placed.nbytes, piece) != digest:
                break
            os.posix_fadvise(part, offset, placed.nbytes, os.POSIX_FADV_DONTNEED)
            found.append(digest)
            if progress is not None:
                progress(placed.tensor.label, placed.offset, self._contents.nbytes)
        return found

    def _write_slices(self, part: int, digests: list[bytes], progress: Progress | None) -> None:
        """Those that `digests` has not yet; adds theirs."""
        lasting = len(digests)
        waiting = 0
        with self._model.path.open("rb") as source:
            if FileStamp.of(source.fileno()) != self._model.stamp:
                raise _changed(self._model)
            for placed in self._layout[lasting:]:
                digests.append(self._write_slice(part, placed, progress))
                tensor = placed.tensor
                os.posix_fadvise(source.fileno(), tensor.offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
                waiting += placed.nbytes
                if waiting >= _SYNC_BYTES or len(digests) == len(self._layout):
                    if FileStamp.of(source.fileno()) != self._model.stamp:
                        raise _changed(self._model)
                    os.fdatasync(part)
                    at = HEAD.size + len(self._description) + lasting * _DIGEST_BYTES
                    os.pwrite(part, b"".join(digests[lasting:]), at)
                    os.posix_fadvise(part, 0, 0, os.POSIX_FADV_DONTNEED)
                    lasting, waiting = len(digests), 0

    def _write_slice(self, part: int, placed: PlacedSlice, progress: Progress | None) -> bytes:
        weight, digester = placed.weight(self._model, self._share), blake3()
        step = max(1, _PIECE_BYTES // placed.row_bytes)
        room = memoryview(bytearray(min(step, placed.n_rows) * placed.row_bytes))
        for first in range(0, placed.n_rows, step):
            rows = min(step, placed.n_rows - first)
            piece, offset = room[: rows * placed.row_bytes], placed.offset + first * placed.row_bytes
            weight.read(first, rows, piece)
            self._model.forget()  # what was read is not held by this process
            digester.update(piece)
            done = 0
            while done < len(piece):
                done += os.pwrite(part, piece[done:], self._begin + offset + done)
            if progress is not None:
                progress(placed.tensor.label, offset + len(piece), self._contents.nbytes)
        return digester.digest()


def check_room(folder: Path, nbytes: int, what: str) -> None:
    """Raise LimitError unless a folder's disk has room for so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise LimitError(f"{what}: {format_size(nbytes)} are to be written, and its disk has {format_size(free)} free")


def _changed(model: ModelFile) -> FormatError:
    return FormatError(model.path, None, "the file that was opened, unchanged", "one that was written to meanwhile")
