"""Activations as matmuls read them: in row panels, in tile panels, or in both (dairllm.kernels.panels)."""

from typing import NamedTuple

from dairllm.engine.area import Area
from dairllm.graph.types import BLOCK_VALUES
from dairllm.kernels.panels import TILE_COLUMNS, row_panel_bytes, tile_panel_bytes

__all__ = ["Packed"]


class Packed(NamedTuple):
    """Of a Q80 buffer that only matmuls read.

    Attributes:
        panels, tiles: what they lie in; experts take row panels alone.
        n_rows: of each plane, a multiple of TILE_COLUMNS.
        panels_row, panels_plane, tile_stride: bytes from one to the next.
        always_rows: whether row panels are read whatever the batch.
        width: values of a row.
        planes: how many.
    """

    panels: Area
    tiles: Area | None
    n_rows: int
    panels_row: int
    panels_plane: int
    tile_stride: int
    always_rows: bool
    width: int
    planes: int

    def panel_fields(self, name: str, width: int) -> dict[str, int]:
        """An operand of row panels of so many values."""
        return {name: self._panels_at(width, 1), f"{name}_row": self.panels_row}

    def panel_plane_fields(self, name: str, width: int, planes: int, *, repeated: bool = False) -> dict[str, int]:
        """The same for several planes; `repeated`: the first one is all of them."""
        plane = 0 if repeated else self.panels_plane
        return {name: self._panels_at(width, 1 if repeated else planes), f"{name}_row": self.panels_row, f"{name}_plane": plane}

    def tile_fields(self, width: int) -> dict[str, int]:
        """Tile panels, where there are any."""
        if self.tiles is None:
            return {"tiles": 0, "tile_stride": self.tile_stride}
        tile = tile_panel_bytes(width // BLOCK_VALUES)
        return {"tiles": self.tiles.at(0, tile, (self.n_rows // TILE_COLUMNS, self.tile_stride)), "tile_stride": self.tile_stride}

    def _panels_at(self, width: int, planes: int) -> int:
        nbytes = row_panel_bytes(width // BLOCK_VALUES)
        return self.panels.at(0, nbytes, (self.n_rows, self.panels_row), (planes, self.panels_plane))
