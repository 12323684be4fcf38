"""Memory with a name and an end. Every address that an instruction of a program holds is taken from an area.

Compiled code believes its instructions. So what an address is for is said where it is taken, in the numbers that the
instruction will hold, and what does not lie within its area is refused: whatever a graph says, its program touches no other
memory.
"""

from typing import Any, NamedTuple

from numpy.typing import NDArray

from dairllm.errors import GraphError

__all__ = ["Area", "AreaError"]


class AreaError(GraphError):
    """Something would be touched that an area does not have."""


class Area(NamedTuple):
    """`nbytes` bytes from `address` on.

    Attributes:
        what: what it is called in messages.
    """

    what: str
    address: int
    nbytes: int

    @classmethod
    def of(cls, what: str, memory: NDArray[Any]) -> "Area":
        """All of an array that lies together; whoever uses the area keeps it."""
        return cls(what, memory.ctypes.data, memory.nbytes)

    def at(self, offset: int, nbytes: int, *steps: tuple[int, int]) -> int:
        """The address of byte `offset`, from which on `nbytes` are touched.

        Args:
            steps: (count, stride) of each dimension in which that is repeated: `count` times in all, `stride` bytes apart.

        Raises:
            AreaError: some of it lies outside.
        """
        last = offset
        for count, stride in steps:
            if count < 1 or stride < 0:
                raise AreaError(f"{count} parts of {self.what}, {stride} bytes apart; expected one or more, in order")
            last += (count - 1) * stride
        if offset < 0 or nbytes < 0 or last + nbytes > self.nbytes:
            raise AreaError(f"it touches bytes {offset} to {last + nbytes} of {self.what}; expected none beyond its {self.nbytes}")
        return self.address + offset

    def part(self, what: str, offset: int, nbytes: int) -> "Area":
        """A part of it, as an area of its own.

        Raises:
            AreaError: it has no such part.
        """
        return Area(what, self.at(offset, nbytes), nbytes)
