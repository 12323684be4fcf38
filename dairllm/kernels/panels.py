"""How Q80 activations lie in memory while matmuls read them. (On the wire they are plain Q80 blocks.)

Row panel, for one row of the batch: GROUP_BYTES for eight blocks.
    0    8 x 16 bytes: values 0..15 of the blocks, in the order 0 4 1 5 2 6 3 7, so that a register of 32 (64) bytes
    holds blocks whose sums end in the right lanes 128  values 16..31, likewise 256  i32[8]: -8 * the sum of the block's
    values. A Q40 nibble stands for nibble - 8; kernels multiply the nibble as it is and start from this 288  f32[8]:
    the block's scale
Blocks beyond the row are zero.

Tile panel, for TILE_COLUMNS rows of the batch, which are its columns: TILE_BLOCK_BYTES a block.
    0    [8][16 columns][4] int8: values 4k..4k+3 of each column
    512  i32[16]: the seeds
    576  f32[16]: the scales
"""

__all__ = [
    "GROUP_BLOCKS",
    "GROUP_BYTES",
    "TILE_BLOCK_BYTES",
    "TILE_COLUMNS",
    "row_panel_bytes",
    "tile_panel_bytes",
]

GROUP_BLOCKS = 8
GROUP_BYTES = 320
TILE_COLUMNS = 16
TILE_BLOCK_BYTES = 640


def row_panel_bytes(n_blocks: int) -> int:
    """Bytes of a row panel, a whole number of cache lines."""
    return -(-n_blocks // GROUP_BLOCKS) * GROUP_BYTES


def tile_panel_bytes(n_blocks: int) -> int:
    return n_blocks * TILE_BLOCK_BYTES
