"""Blocks of activations into their places in a row panel or a tile panel (panels.py), one or eight at a time."""

from collections.abc import Sequence

from dairllm.kernels.ir import I16, I32, Builder, Value, at, const, halves, k64, lane_sum, splat, store, vec
from dairllm.kernels.panels import GROUP_BLOCKS, GROUP_BYTES, TILE_BLOCK_BYTES, TILE_COLUMNS
from dairllm.kernels.transpose import transposed

__all__ = ["emit_eight_to_row_panel", "emit_eight_to_tile_panel", "emit_to_row_panel", "emit_to_tile_panel"]


def _emit_to_lane(b: Builder, lane: Value, lanes: int, q: Value, scale: Value) -> None:
    """q <32 x i8>, its scale and its seed, `lane` being the address of its first word."""
    words = b.bitcast(q, vec(I32, 8))
    for k in range(8):
        store(b, b.extract_element(words, const(I32, k)), at(b, lane, 4 * lanes * k))
    total = lane_sum(b, b.sext(q, vec(I16, 32)), b.add)  # |sum| <= 32 * 128
    store(b, b.mul(b.sext(total, I32), const(I32, -8)), at(b, lane, 32 * lanes))
    store(b, scale, at(b, lane, 36 * lanes))


def _emit_to_lanes(b: Builder, lane: Value, lanes: int, q: Sequence[Value], scales: Value) -> None:
    """The same of eight blocks side by side: q <32 x i8> of each, scales <8 x f32>."""
    words = [word for half in zip(*(halves(b, v) for v in q), strict=True) for word in transposed(b, half)]
    total = splat(I16, 16, 0)
    eight = splat(I16, 16, 8)
    for k, word in enumerate(words):
        store(b, word, at(b, lane, 4 * lanes * k))
        pairs = b.bitcast(word, vec(I16, 16))
        total = b.add(total, b.add(b.ashr(b.shl(pairs, eight), eight), b.ashr(pairs, eight)))
    wide, sixteen = b.bitcast(total, vec(I32, 8)), splat(I32, 8, 16)
    sums = b.add(b.ashr(b.shl(wide, sixteen), sixteen), b.ashr(wide, sixteen))
    store(b, b.mul(sums, splat(I32, 8, -8)), at(b, lane, 32 * lanes))
    store(b, scales, at(b, lane, 36 * lanes))


def _group(b: Builder, panel: Value, block: Value) -> Value:
    return b.add(panel, b.mul(b.lshr(block, k64(3)), k64(GROUP_BYTES)))


def emit_to_row_panel(b: Builder, panel: Value, block: Value, q: Value, scale: Value) -> None:
    """Store block number `block` of a row."""
    _emit_to_lane(b, b.add(_group(b, panel, block), b.mul(b.and_(block, k64(7)), k64(4))), GROUP_BLOCKS, q, scale)


def emit_eight_to_row_panel(b: Builder, panel: Value, block: Value, q: Sequence[Value], scales: Value) -> None:
    """Store blocks block..block + 7 of a row, block being a multiple of 8."""
    _emit_to_lanes(b, _group(b, panel, block), GROUP_BLOCKS, q, scales)


def emit_to_tile_panel(b: Builder, column: Value, block: Value, q: Value, scale: Value) -> None:
    """The same into a tile; `column` is the tile's address + 4 * the column's number."""
    _emit_to_lane(b, b.add(column, b.mul(block, k64(TILE_BLOCK_BYTES))), TILE_COLUMNS, q, scale)


def emit_eight_to_tile_panel(b: Builder, column: Value, block: Value, q: Sequence[Value], scales: Value) -> None:
    """Store block number `block` of eight rows into a column of each, `column` being that of the first."""
    _emit_to_lanes(b, b.add(column, b.mul(block, k64(TILE_BLOCK_BYTES))), TILE_COLUMNS, q, scales)
