"""What ops read and write of the pipes and buffers: planes of rows of values, each a row of the batch."""

from typing import NamedTuple

from dairllm.engine.area import Area
from dairllm.graph.types import FloatType, row_bytes

__all__ = ["Rows"]


class Rows(NamedTuple):
    """F32 values, or plain Q80 blocks, in an area.

    Attributes:
        area: what they lie in.
        offset: of the first row there, in bytes.
        n_rows: of each plane.
        row, plane: bytes from one to the next.
        slice_stride: bytes between the slices of a row, whose rows then lie together; 0 where a row's slices do.
        width: values of a row.
        planes: how many.
        float_type: F32 or Q80.
    """

    area: Area
    offset: int
    n_rows: int
    row: int
    plane: int
    slice_stride: int
    width: int
    planes: int
    float_type: FloatType

    def at(self, first: int, values: int, planes: int = 1) -> int:
        """The address of value `first` of the first row, from which on `values` are touched in every row of the first `planes`.

        Raises:
            AreaError: they are not all there.
        """
        offset, nbytes = row_bytes(self.float_type, first), row_bytes(self.float_type, values)
        return self.area.at(self.offset + offset, nbytes, (self.n_rows, self.row), (planes, self.plane))

    def fields(self, name: str, values: int) -> dict[str, int]:
        """An operand of one plane, of whose rows `values` are touched."""
        return {name: self.at(0, values), f"{name}_row": self.row}

    def plane_fields(self, name: str, values: int, planes: int) -> dict[str, int]:
        """An operand of several planes. Of one there is only one, however often it is gone through."""
        plane = self.plane if self.planes > 1 else 0
        return {name: self.at(0, values, planes if plane else 1), f"{name}_row": self.row, f"{name}_plane": plane}
