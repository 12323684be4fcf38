"""One block of activations into its place in a row panel or a tile panel (panels.py)."""

from dairllm.kernels.ir import I32, Builder, Value, at, const, k64, shuffle, store, vec
from dairllm.kernels.panels import GROUP_BYTES, TILE_BLOCK_BYTES

__all__ = ["emit_to_row_panel", "emit_to_tile_panel"]


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
