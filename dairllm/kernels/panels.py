"""How Q80 activations lie in memory while matmuls read them. (On the wire they are plain Q80 blocks.)

Blocks lie together, LANES of them, word by word: values 4k..4k+3 of a block are a *word*, and the words k of all blocks make a vector.

    0              8 x [lane][4] int8
    32 * lanes     i32[lane]: -8 * the sum of the block's values. A Q40 nibble stands for nibble - 8; kernels multiply the nibble
                   as it is and start from this
    36 * lanes     f32[lane]: the block's scale

Row panel, for one row of the batch: its blocks, GROUP_BLOCKS together; lanes beyond the row are zero.
Tile panel, for TILE_COLUMNS rows of the batch, which are its columns: block after block, a lane for each column.
"""

__all__ = [
    "GROUP_BLOCKS",
    "GROUP_BYTES",
    "TILE_BLOCK_BYTES",
    "TILE_COLUMNS",
    "in_tiles",
    "row_panel_bytes",
    "tile_panel_bytes",
]

_LANE_BYTES = 40
GROUP_BLOCKS = 8
GROUP_BYTES = _LANE_BYTES * GROUP_BLOCKS
TILE_COLUMNS = 16
TILE_BLOCK_BYTES = _LANE_BYTES * TILE_COLUMNS

_MOST_IN_ROWS = 12
"""So many rows, left over by whole tiles, are done faster from row panels than as a tile, which costs as much as a full one."""


def in_tiles(n_rows: int) -> int:
    """How many rows of a batch, the first ones, go into tile panels; the others go into row panels."""
    left = n_rows % TILE_COLUMNS
    return n_rows if left > _MOST_IN_ROWS else n_rows - left


def row_panel_bytes(n_blocks: int) -> int:
    """Bytes of a row panel, a whole number of cache lines."""
    return -(-n_blocks // GROUP_BLOCKS) * GROUP_BYTES


def tile_panel_bytes(n_blocks: int) -> int:
    return n_blocks * TILE_BLOCK_BYTES
