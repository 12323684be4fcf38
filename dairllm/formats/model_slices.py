"""Weights of a model file as a node holds them, row by row: what a root sends, and what a node finds in a file of its own.

Nothing is copied until it is asked for, and then a few rows at a time, into memory of the caller's.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_layout import Slice, Tensor, share_slices
from dairllm.graph.slicing import Axis, Share, weight_part

__all__ = ["OutgoingWeight", "file_offset", "outgoing_weights", "sliced_weight"]


class OutgoingWeight:
    """One weight, or one expert of it, as a node holds it.

    Attributes:
        name: of the op.
        layer: of the op.
        offset: of its first byte within the op's weight; not 0 for experts but the first.
        n_rows: rows (outputs) of the node, padding included.
        row_bytes: of each.
    """

    def __init__(self, name: str, layer: int, offset: int, pieces: Sequence[npt.NDArray[np.uint8]], axis: Axis, n_rows: int) -> None:
        """`pieces` are [rows, bytes] in the file's order of rows, one below the other or, with columns, side by side."""
        self.name, self.layer, self.offset, self.n_rows = name, layer, offset, n_rows
        self._pieces, self._axis = tuple(pieces), axis
        widths: list[int] = [piece.shape[1] for piece in pieces]
        self.row_bytes = sum(widths) if axis is Axis.COLUMNS else widths[0]

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    def __repr__(self) -> str:
        return f"<OutgoingWeight {self.name} of layer {self.layer}: {self.n_rows} rows of {self.row_bytes} bytes at {self.offset}>"

    def read(self, first: int, rows: int, out: memoryview) -> None:
        """Copy rows first .. first + rows - 1 into `out`, one after the other; rows that the file has not are zeros.

        For a thread: the interpreter is not held while bytes are copied, and waited for.

        Args:
            out: writable, of rows * row_bytes bytes.

        Raises:
            ValueError: there are no such rows, or `out` has another size.
        """
        if not 0 <= first <= first + rows <= self.n_rows:
            raise ValueError(f"rows {first} to {first + rows} of {self!r}")
        target = np.frombuffer(out, np.uint8).reshape(rows, self.row_bytes)
        if self._axis is Axis.COLUMNS:
            at = 0
            for piece in self._pieces:
                target[:, at : at + piece.shape[1]] = piece[first : first + rows]
                at += piece.shape[1]
            return
        done, skipped = 0, first
        for piece in self._pieces:
            part = piece[skipped : skipped + rows - done]
            target[done : done + len(part)] = part
            done += len(part)
            skipped = max(skipped - len(piece), 0)
        target[done:] = 0


def outgoing_weights(model: ModelFile, share: Share, logits_rows: int) -> Iterator[OutgoingWeight]:
    """All weights of a node with `share`, in the order in which a C++ root sends them: the file's, without the embedding.

    Args:
        logits_rows: of the classifier that the node is to hold: its slice of LG is so wide.

    Raises:
        GraphError: the share cuts a block, or goes beyond the model.
        ValueError: the file has been closed.
    """
    for tensor in model.tensors:
        if tensor.name == "embedding":
            continue
        slices = share_slices(tensor, model.spec, share)
        axis = weight_part(model.spec, share, tensor.name).axis
        n_rows = logits_rows if tensor.name == "final_matmul_logits" else _rows(slices, axis)
        yield sliced_weight(model, tensor, slices, axis, n_rows)


def sliced_weight(model: ModelFile, tensor: Tensor, slices: Sequence[Slice], axis: Axis, n_rows: int) -> OutgoingWeight:
    """A part of a tensor as a node holds it, in place.

    Args:
        slices: of the tensor, in the node's order; none where all rows are padding.
        n_rows: of the node; those beyond the slices' are zeros.

    Raises:
        ValueError: the file has been closed.
    """
    pieces = [_view(model.raw, piece) for piece in slices] or [np.zeros((0, tensor.row_bytes), np.uint8)]
    weight = OutgoingWeight(tensor.name, tensor.layer, 0, pieces, axis, n_rows)
    weight.offset = tensor.expert * weight.nbytes
    return weight


def file_offset(slices: Sequence[Slice], axis: Axis, row: int, column: int) -> int | None:
    """Where byte `column` of a node's row lies in the file; None in rows that are padding."""
    for piece in slices:
        if axis is Axis.COLUMNS:
            if column < piece.slice_row_bytes:
                return piece.offset + row * piece.stride + column
            column -= piece.slice_row_bytes
        else:
            if row < piece.n_rows:
                return piece.offset + row * piece.stride + column
            row -= piece.n_rows
    return None


def _rows(slices: Sequence[Slice], axis: Axis) -> int:
    return slices[0].n_rows if axis is Axis.COLUMNS else sum(piece.n_rows for piece in slices)


def _view(raw: npt.NDArray[np.uint8], piece: Slice) -> npt.NDArray[np.uint8]:
    """[rows, bytes] of a slice, in place."""
    first = raw[piece.offset :]
    view: npt.NDArray[np.uint8] = np.lib.stride_tricks.as_strided(
        first, (piece.n_rows, piece.slice_row_bytes), (piece.stride, 1), writeable=False
    )
    return view
