"""A file of one node's share of a model, beside the model: ``m.m.share-1-of-2``, made by `dairllm prepare`.

In the model's file a share lies in many places: of each matrix some rows, or some columns of every row. A node that pages reads whole
blocks around all of them. Here they lie together, in the order of a pass (`dairllm.formats.share_layout`), the same bytes::

    magic, length of the description, seal
    description       JSON: of which model (its identity), which share of it, where each slice lies
    digests           BLAKE3 of each slice, 32 bytes
    zeros             up to a page
    slices

The seal is the digest of description and digests; it is written last, and without it there is no such file. What it was made of can be
made again: a file that does not belong to the model any more is passed over.
"""

import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from dairllm.errors import FormatError, GraphError
from dairllm.formats.digest import Progress
from dairllm.formats.file_kind import unreadable
from dairllm.formats.file_stamp import FileStamp
from dairllm.formats.model_file import ModelFile
from dairllm.formats.share_layout import PlacedSlice, share_layout
from dairllm.formats.strict_json import read_json, whole_number
from dairllm.graph.references import IDENTITY_BYTES
from dairllm.graph.slicing import Share, Span
from dairllm.machine import ask_for_huge_pages

__all__ = [
    "HEAD",
    "MAGIC",
    "Contents",
    "ShareFile",
    "SharePlace",
    "data_offset",
    "is_share_file",
    "read_digest",
    "share_path",
    "share_paths",
]

MAGIC = b"dairllm share 1\n"
HEAD = struct.Struct("<16sQ32s")
"""Magic, bytes of the description, seal."""

_DIGEST_BYTES = 32
_PAGE = 4096
_MOST_DESCRIPTION = 64 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file of a share holds.

    Attributes:
        identity: of the model.
        node, n_nodes: whose share.
        slices: (label, offset from the first slice on, bytes) of each.
    """

    identity: bytes
    node: int
    n_nodes: int
    share: Share
    slices: tuple[tuple[str, int, int], ...]

    @classmethod
    def of(cls, identity: bytes, node: int, n_nodes: int, share: Share, layout: Iterable[PlacedSlice]) -> "Contents":
        return cls(identity, node, n_nodes, share, tuple((placed.tensor.label, placed.offset, placed.nbytes) for placed in layout))

    @property
    def nbytes(self) -> int:
        """From the first slice to the end of the file."""
        return max((offset + nbytes for _, offset, nbytes in self.slices), default=0)

    def encode(self) -> bytes:
        """As it stands in the file."""
        share = self.share
        described = {
            "identity": self.identity.hex(),
            "node": self.node,
            "nodes": self.n_nodes,
            "heads": [[span.start, span.stop] for span in share.heads],
            "kv_heads": [[span.start, span.stop] for span in share.kv_heads],
            "ffn": [share.ffn.start, share.ffn.stop],
            "logits": [share.logits.start, share.logits.stop],
            "slices": self.slices,
        }
        return json.dumps(described).encode()

    @classmethod
    def decode(cls, text: bytes) -> "Contents":
        """Raises ValueError, TypeError or KeyError where it is something else."""
        found = read_json(text)
        heads, kv_heads = (tuple(_span(pair) for pair in found[name]) for name in ("heads", "kv_heads"))
        share = Share(heads, kv_heads, _span(found["ffn"]), _span(found["logits"]))
        slices = tuple((str(label), whole_number(offset), whole_number(nbytes)) for label, offset, nbytes in found["slices"])
        end = 0
        for _, offset, nbytes in slices:
            if offset < end or nbytes < 1:
                raise ValueError("slices that overlap")
            end = offset + nbytes
        node, n_nodes = whole_number(found["node"]), whole_number(found["nodes"])
        if node >= n_nodes:
            raise ValueError(f"node {node} of {n_nodes}")
        return cls(bytes.fromhex(found["identity"]), node, n_nodes, share, slices)


def _span(pair: Any) -> Span:
    start, stop = map(whole_number, pair)
    if stop < start:
        raise ValueError(f"a span from {start} to {stop}")
    return Span(start, stop)


def data_offset(description_bytes: int, n_slices: int) -> int:
    """Where the first slice begins: at a page."""
    return -(-(HEAD.size + description_bytes + n_slices * _DIGEST_BYTES) // _PAGE) * _PAGE


@dataclass(frozen=True, slots=True)
class SharePlace:
    """One op's weight: rows one after the other, experts `expert_stride` apart (0 where there is one).

    `offset` is from the file's begin on.
    """

    offset: int
    n_rows: int
    row_bytes: int
    expert_stride: int


class ShareFile:
    """An open file of a share, mapped; it stays so until `close`, or until nothing refers to it.

    Attributes:
        path: the file.
        stamp: which file it is, and when it was last written.
        contents: what it holds.
    """

    def __init__(self, path: Path, stamp: FileStamp, contents: Contents, digests: tuple[bytes, ...], begin: int, mapped: mmap.mmap) -> None:
        self.path, self.stamp, self.contents = path, stamp, contents
        self._digests, self._begin = digests, begin
        self._map, self._raw = mapped, np.frombuffer(mapped, np.uint8)
        self._places: dict[tuple[str, int], SharePlace] = {}

    @classmethod
    def open(cls, path: str | Path) -> "ShareFile":
        """Map a file and check its head and its length; its slices are checked by `torn`.

        Raises:
            FormatError: it cannot be opened, is no file of a share, is not complete, or contradicts itself.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                stamp = FileStamp.of(file.fileno())
                head = file.read(HEAD.size)
                if len(head) < HEAD.size or not head.startswith(MAGIC):
                    raise FormatError(path, 0, f"the share of a model, which begins with {MAGIC!r}", repr(head[: len(MAGIC)]))
                _, length, seal = HEAD.unpack(head)
                if length > min(_MOST_DESCRIPTION, stamp.nbytes - HEAD.size):
                    raise FormatError(path, len(MAGIC), "the length of a description", str(length))
                description = file.read(length)
                try:
                    contents = Contents.decode(description)
                except (ValueError, TypeError, KeyError) as error:
                    raise FormatError(path, HEAD.size, "the description of a share", f"another text: {error!r}") from None
                digests = file.read(_DIGEST_BYTES * len(contents.slices))
                if blake3(description + digests).digest() != seal or len(contents.identity) != IDENTITY_BYTES:
                    raise FormatError(path, HEAD.size, "a description that is sealed", "another one than its seal was made of")
                begin = data_offset(length, len(contents.slices))
                if stamp.nbytes != begin + contents.nbytes:
                    raise FormatError(path, None, f"{begin + contents.nbytes} bytes", f"{stamp.nbytes}")
                mapped = mmap.mmap(file.fileno(), stamp.nbytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise unreadable(path, "a readable share of a model", error) from error
        each = tuple(digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES))
        return cls(path, stamp, contents, each, begin, mapped)

    def close(self) -> None:
        """Give up the map. Nothing uses its addresses any more."""
        del self._raw
        with suppress(BufferError):
            self._map.close()

    def ask_for_huge_pages(self) -> None:
        """For those who will use the map in whole (`dairllm.machine.ask_for_huge_pages`)."""
        ask_for_huge_pages(self._map)

    @property
    def address(self) -> int:
        """Of the file's first byte."""
        address: int = self._raw.ctypes.data
        return address

    @property
    def digest(self) -> bytes:
        """Of all that it holds."""
        return blake3(b"".join(self._digests)).digest()

    def locate(self, model: ModelFile) -> None:
        """Find the places of a model's weights.

        Args:
            model: the one that this was made of, as its identity says.

        Raises:
            FormatError: they are not those that the share would have of it.
        """
        held = self.contents
        try:
            layout = share_layout(model.spec, model.tensors, held.share, held.n_nodes)
        except GraphError as error:
            raise FormatError(self.path, HEAD.size, f"a share of {model.path.name}", str(error)) from None
        if Contents.of(held.identity, held.node, held.n_nodes, held.share, layout) != held:
            raise FormatError(self.path, HEAD.size, f"the slices of a share of {model.path.name}", "others")
        for placed in layout:
            key = placed.tensor.name, placed.tensor.layer
            first = self._places.get(key)
            at = self._begin + placed.offset
            if first is None:
                self._places[key] = SharePlace(at, placed.n_rows, placed.row_bytes, 0)
            elif placed.tensor.expert == 1:
                self._places[key] = SharePlace(first.offset, first.n_rows, first.row_bytes, at - first.offset)

    def place(self, name: str, layer: int) -> SharePlace | None:
        """Where an op's weight is, once it has been located; None where it is not in this file."""
        return self._places.get((name, layer))

    def torn(self, progress: Progress | None = None) -> Iterator[tuple[str, int]]:
        """(label, offset in the file) of each slice whose bytes are not those that were written. Reads all of it: for a thread.

        Raises:
            FormatError: it cannot be read.
        """
        piece = memoryview(bytearray(_PIECE_BYTES))
        total = self.contents.nbytes
        try:
            with self.path.open("rb", buffering=0) as file:
                for (label, offset, nbytes), digest in zip(self.contents.slices, self._digests, strict=True):
                    if read_digest(file.fileno(), self._begin + offset, nbytes, piece) != digest:
                        yield label, self._begin + offset
                    os.posix_fadvise(file.fileno(), self._begin + offset, nbytes, os.POSIX_FADV_DONTNEED)
                    if progress is not None:
                        progress(label, offset + nbytes, total)
        except OSError as error:
            raise unreadable(self.path, "a readable share of a model", error) from error


def read_digest(descriptor: int, offset: int, nbytes: int, piece: memoryview) -> bytes:
    """Of bytes of a file, as far as there are so many, read through `piece`."""
    digester, end = blake3(), offset + nbytes
    while offset < end:
        got = os.preadv(descriptor, [piece[: min(len(piece), end - offset)]], offset)
        if not got:
            break
        digester.update(piece[:got])
        offset += got
    return digester.digest()


def share_path(model: Path, node: int, n_nodes: int) -> Path:
    """Where the share of a node is kept."""
    return model.with_name(f"{model.name}.share-{node}-of-{n_nodes}")


def share_paths(model: Path) -> list[Path]:
    """What lies beside a model under the name of a share of it; nothing where its folder cannot be read."""
    try:
        return sorted(path for path in model.parent.iterdir() if path.name.startswith(f"{model.name}.share-") and path.is_file())
    except OSError:
        return []


def is_share_file(path: Path) -> bool:
    """Whether a file begins as one; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
