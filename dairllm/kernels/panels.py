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

from dairllm.kernels.ir import I32, Builder, Value, at, const, k64, shuffle, store, vec

__all__ = [
    "GROUP_BLOCKS",
    "GROUP_BYTES",
    "TILE_BLOCK_BYTES",
    "TILE_COLUMNS",
    "emit_to_row_panel",
    "emit_to_tile_panel",
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


def emit_to_row_panel(b: Builder, panel: Value, block: Value, q: Value, scale: Value, seed: Value) -> None:
    """Store block number `block`: q <32 x i8>, its scale and its seed."""
    t = b.and_(block, k64(7))
    base = b.add(panel, b.mul(b.lshr(block, k64(3)), k64(GROUP_BYTES)))
    x = b.add(base, b.add(b.mul(b.and_(t, k64(3)), k64(32)), b.mul(b.lshr(t, k64(2)), k64(16))))
    store(b, shuffle(b, q, q, range(16)), x)
    store(b, shuffle(b, q, q, range(16, 32)), at(b, x, 128))
    s = b.add(base, b.mul(t, k64(4)))
    store(b, seed, at(b, s, 256))
    store(b, scale, at(b, s, 288))


def emit_to_tile_panel(b: Builder, column: Value, block: Value, q: Value, scale: Value, seed: Value) -> None:
    """The same into a tile; `column` is the tile's address + 4 * the column's number."""
    base = b.add(column, b.mul(block, k64(TILE_BLOCK_BYTES)))
    words = b.bitcast(q, vec(I32, 8))
    for k in range(8):
        store(b, b.extract_element(words, const(I32, k)), at(b, base, 64 * k))
    store(b, seed, at(b, base, 512))
    store(b, scale, at(b, base, 576))
