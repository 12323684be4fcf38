"""The unit of computing under paging: a *schedule unit*, some instructions of a segment and the blocks of the model file that they read.

A unit reads few blocks, so that little room is needed at once, and a segment's instructions that read nothing go with the unit before them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dairllm.engine.pieces import PIECE_BYTES, Piece, Span
from dairllm.engine.program import Program

__all__ = ["UNIT_BYTES", "Block", "ScheduleUnit", "blocks_of", "group_pieces", "program_schedule"]

Block = int
"""Number of a block: it begins at that many times its size in the file."""

UNIT_BYTES = PIECE_BYTES
"""Pieces are computed together up to so many bytes: fewer calls of the compute threads."""


@dataclass(frozen=True, slots=True)
class ScheduleUnit:
    """Instructions first .. stop - 1 of a program.

    Attributes:
        blocks: what they read, in order of first use.
        experts: for each expert, the blocks that all its matrices take, in order of the file; empty where there are no experts.
        expert_instruction: an instruction that knows who is routed to which.
    """

    first: int
    stop: int
    blocks: tuple[Block, ...]
    experts: tuple[tuple[Block, ...], ...] = ()
    expert_instruction: int = -1


def blocks_of(spans: Iterable[Span], block_bytes: int) -> tuple[Block, ...]:
    """Blocks that hold any byte of the spans, in their order."""
    return tuple(
        dict.fromkeys(
            block for offset, nbytes in spans for block in range(offset // block_bytes, (offset + nbytes - 1) // block_bytes + 1) if nbytes
        )
    )


def group_pieces(pieces: Sequence[Piece], block_bytes: int) -> list[list[int]]:
    """Which pieces of a segment, by their places, make one unit: neighbours, while they read few blocks; experts, all their matrices.

    An expert's matrices lie together in the file: they are one read.
    """
    limit = UNIT_BYTES // block_bytes + 1
    groups: list[list[int]] = []
    held: set[Block] = set()
    for place, piece in enumerate(pieces):
        blocks = set() if piece.experts else set(blocks_of(piece.spans, block_bytes))
        if groups and piece.experts == pieces[place - 1].experts and len(held | blocks) <= limit:
            groups[-1].append(place)
            held |= blocks
        else:
            groups.append([place])
            held = blocks
    return groups


def program_schedule(program: Program, block_bytes: int) -> tuple[tuple[ScheduleUnit, ...], tuple[int, ...]]:
    """A program as units, and for each segment the number of its first unit; one number more, that of all units.

    Instructions that read nothing belong to the unit before them, or, at the begin of a segment, to the first.
    """
    units: list[ScheduleUnit] = []
    starts = [0]
    for first, stop in program.segments:
        own = [(instruction, piece) for instruction, piece in program.pieces if first <= instruction < stop]
        pieces = [piece for _, piece in own]
        groups = group_pieces(pieces, block_bytes)
        cuts = [first, *(own[group[0]][0] for group in groups[1:]), stop]
        for group, begin, end in zip(groups or [[]], cuts, cuts[1:], strict=False):
            members = [pieces[place] for place in group]
            if members and members[0].experts:
                spans = zip(*(piece.spans for piece in members), strict=True)
                experts = tuple(tuple(sorted(blocks_of(matrices, block_bytes))) for matrices in spans)
                units.append(ScheduleUnit(begin, end, (), experts, own[group[0]][0]))
            else:
                units.append(ScheduleUnit(begin, end, blocks_of((span for piece in members for span in piece.spans), block_bytes)))
        starts.append(len(units))
    return tuple(units), tuple(starts)
