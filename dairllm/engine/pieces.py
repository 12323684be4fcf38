"""A matmul's weight in pieces: which rows of it are computed together, and which bytes of the model file that takes.

A large matrix is computed a few MiB of rows at a time, so that paging needs room for a piece and not for the matrix. An output depends on
its own row alone, so pieces change no bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dairllm.engine.weights import Weights, WeightView
from dairllm.graph.types import MatmulConfig, NodeConfig, Op, OpCode, row_bytes
from dairllm.kernels.instructions import UNIT

__all__ = ["PIECE_BYTES", "Piece", "Span", "matmul_pieces", "segment_pieces"]

PIECE_BYTES = 4 << 20
"""Of the file, at most, for one piece of a matmul under paging."""

Span = tuple[int, int]
"""Offset and length in the model file."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first .. first + count - 1 of a matmul's weight, and the file's bytes that they take.

    `experts`: one span an expert, of which only those that the rows are routed to are read.
    """

    first: int
    count: int
    spans: tuple[Span, ...]
    experts: bool = False


def matmul_pieces(op: Op, view: WeightView, piece_bytes: int | None) -> list[Piece]:
    """All rows of a matmul's weight. Those of experts stay together, and all do where `piece_bytes` is None or the weight is in memory."""
    size = op.weight_size
    length = row_bytes(size.float_type, size.y)
    if isinstance(op.config, MatmulConfig) and op.config.n_experts:
        spans = (
            () if view.offset is None else tuple((view.offset + e * view.expert, _extent(size.x, view.row, length)) for e in range(size.z))
        )
        return [Piece(0, size.x, spans, experts=True)]
    if view.offset is None:
        return [Piece(0, size.x, ())]
    rows = size.x
    if piece_bytes is not None and size.x * view.row > piece_bytes:
        rows = max(piece_bytes // (view.row * UNIT), 1) * UNIT
        rows = -(-size.x // (-(-size.x // rows) * UNIT)) * UNIT  # about equal pieces
    return [
        Piece(first, count, ((view.offset + first * view.row, _extent(count, view.row, length)),))
        for first in range(0, size.x, rows)
        if (count := min(rows, size.x - first))
    ]


def _extent(rows: int, stride: int, length: int) -> int:
    """Bytes from the first row to the end of the last: a slice of columns lies in all rows of its tensor, so they are one span."""
    return (rows - 1) * stride + length


def segment_pieces(node: NodeConfig, weights: Weights, piece_bytes: int | None) -> Iterator[list[Piece]]:
    """Of each segment, its matmuls' pieces in the order of their instructions."""
    for segment in node.segments:
        matmuls = (op for op in segment.ops if op.code == OpCode.MATMUL and op.weight_size.length)
        yield [piece for op in matmuls for piece in matmul_pieces(op, weights.view(op), piece_bytes)]
