"""Blocks of a weight row as word vectors, a block a lane (byte_dot.py), and the half-precision bits of their scales.

Row kernels read weights as they lie in the file and rearrange them in registers.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from dairllm.kernels.byte_dot import biased, nibbles
from dairllm.kernels.ir import I8, I16, I32, I64, Builder, Value, at, broadcast, const, k64, load, splat, vec
from dairllm.kernels.transpose import transposed

__all__ = ["Q40", "Q80", "WeightWords", "Words"]

Words = tuple[list[Value], Value]
"""The eight word vectors, and <8 x i16>: the scales."""
Address = Callable[[int], Value]
"""Of block i."""


def _bytes(b: Builder, words: Value) -> Value:
    return b.bitcast(words, vec(I8, 4 * words.type.count))


def _scales(b: Builder, address: Address) -> Value:
    """Of eight blocks. Put together where integers are added, which has nothing else to do."""
    quads = splat(I64, 2, 0)
    for first in (0, 4):
        quad = b.zext(load(b, address(first), I16), I64)
        for i in range(1, 4):
            quad = b.or_(quad, b.shl(b.zext(load(b, address(first + i), I16), I64), const(I64, 16 * i)))
        quads = b.insert_element(quads, quad, const(I32, first // 4))
    return b.bitcast(quads, vec(I16, 8))


def _words_q40(b: Builder, address: Address) -> list[Value]:
    packed = [_bytes(b, v) for v in transposed(b, [load(b, at(b, address(i), 2), vec(I8, 16)) for i in range(8)])]
    low, high = zip(*(nibbles(b, v) for v in packed), strict=True)
    return [*low, *high]


def _words_q80(b: Builder, address: Address) -> list[Value]:
    halves = [transposed(b, [load(b, at(b, address(i), offset), vec(I8, 16)) for i in range(8)]) for offset in (2, 18)]
    return [biased(b, _bytes(b, v)) for half in halves for v in half]


class WeightWords:
    """How the weights of one type become words: `Q40` and `Q80` below.

    Attributes:
        block_bytes: of the file.
        signed: see byte_dot.py.
    """

    def __init__(self, block_bytes: int, words: Callable[[Builder, Address], list[Value]], signed: bool) -> None:
        self.block_bytes, self._words, self.signed = block_bytes, words, signed

    def group(self, b: Builder, p: Value) -> Words:
        """Eight blocks that lie at p."""

        def address(i: int) -> Value:
            return at(b, p, self.block_bytes * i)

        return self._words(b, address), _scales(b, address)

    def ends(self, b: Builder, ends: Sequence[Value], rest: Value) -> Words:
        """The last `rest` blocks of 4, 2 or 1 rows, which begin at `ends`: at most 8 / rows of each, which are neighbours.

        Nothing else is read: the lanes of a row that has fewer have its last block, and a scale of zero.
        """
        each, last = 8 // len(ends), b.sub(rest, k64(1))

        def address(i: int) -> Value:
            block = b.select(b.icmp_unsigned("<", k64(i % each), last), k64(i % each), last)
            return b.add(ends[i // each], b.mul(block, k64(self.block_bytes)))

        number = ir.Constant(vec(I16, 8), [i % each for i in range(8)])
        inside = b.icmp_unsigned("<", number, broadcast(b, b.trunc(rest, I16)))
        return self._words(b, address), b.select(inside, _scales(b, address), splat(I16, 8, 0))


Q40 = WeightWords(18, _words_q40, signed=False)
Q80 = WeightWords(34, _words_q80, signed=True)
