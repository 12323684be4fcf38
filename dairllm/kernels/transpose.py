"""Eight blocks side by side: what lies together in a block, and what lies together in memory that eight of them share."""

from collections.abc import Sequence

from dairllm.kernels.ir import I32, Builder, Value, concat, shuffle, vec

__all__ = ["transposed"]


def _interleaved(b: Builder, x: Value, y: Value, lanes: int, high: bool) -> Value:
    """Of each 128 bits of x and y the lower half, or the higher, `lanes` of x and of y in turn: vpunpck."""
    n, half = x.type.count, []
    for first in range(0, n, 4):
        for lane in range(2 if high else 0, 4 if high else 2, lanes):
            for source in (0, n):
                half += [source + first + lane + i for i in range(lanes)]
    return shuffle(b, x, y, half)


def transposed(b: Builder, blocks: Sequence[Value]) -> list[Value]:
    """16 bytes of each of eight blocks -> vector k: bytes 4k..4k+3 of each."""
    words = [b.bitcast(block, vec(I32, 4)) for block in blocks]
    lines = [concat(b, words[i], words[i + 4]) for i in range(4)]
    low, high = ([_interleaved(b, x, y, 1, half) for x, y in (lines[:2], lines[2:])] for half in (False, True))
    return [_interleaved(b, x, y, 2, half) for x, y in (low, high) for half in (False, True)]
