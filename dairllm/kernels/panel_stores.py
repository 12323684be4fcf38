"""One block of activations into its place in a row panel or a tile panel (panels.py)."""

from dairllm.kernels.ir import I32, Builder, Value, at, const, k64, store, vec
from dairllm.kernels.panels import GROUP_BLOCKS, GROUP_BYTES, TILE_BLOCK_BYTES, TILE_COLUMNS

__all__ = ["emit_to_row_panel", "emit_to_tile_panel"]


def _emit_to_lane(b: Builder, lane: Value, lanes: int, q: Value, scale: Value, seed: Value) -> None:
    """q <32 x i8>, its scale and its seed, `lane` being the address of its first word."""
    words = b.bitcast(q, vec(I32, 8))
    for k in range(8):
        store(b, b.extract_element(words, const(I32, k)), at(b, lane, 4 * lanes * k))
    store(b, seed, at(b, lane, 32 * lanes))
    store(b, scale, at(b, lane, 36 * lanes))


def emit_to_row_panel(b: Builder, panel: Value, block: Value, q: Value, scale: Value, seed: Value) -> None:
    """Store block number `block` of a row."""
    group = b.mul(b.lshr(block, k64(3)), k64(GROUP_BYTES))
    _emit_to_lane(b, b.add(b.add(panel, group), b.mul(b.and_(block, k64(7)), k64(4))), GROUP_BLOCKS, q, scale, seed)


def emit_to_tile_panel(b: Builder, column: Value, block: Value, q: Value, scale: Value, seed: Value) -> None:
    """The same into a tile; `column` is the tile's address + 4 * the column's number."""
    _emit_to_lane(b, b.add(column, b.mul(block, k64(TILE_BLOCK_BYTES))), TILE_COLUMNS, q, scale, seed)
