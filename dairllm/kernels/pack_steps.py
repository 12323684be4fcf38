"""Activations into panels, for the matmuls that read them, and what makes them just before. See steps.py for the calling convention.

Rows that fill tiles go into tile panels, the others into row panels. A thread takes a strip of GROUP_BLOCKS blocks of a row, or of as
many rows of a tile, while it is in the first-level cache: it is computed where the values go in any case, then packed, all at once.
"""

from dairllm.kernels import elementwise
from dairllm.kernels.ir import load_f
from dairllm.kernels.kernel import kernel
from dairllm.kernels.panels import GROUP_BLOCKS, TILE_COLUMNS, in_tiles
from dairllm.kernels.quantize import (
    blocks_to_row_panel,
    blocks_to_tile_panel,
    eight_to_row_panel,
    eight_to_tile_panel,
    values_to_row_panel,
    values_to_tile_panel,
)
from dairllm.kernels.records import ALWAYS_ROWS, Kind
from dairllm.kernels.steps import columns, fields

__all__ = ["pack"]

PACK_BLOCKS, RMS_NORM_PACK, SILU_MUL_PACK, GELU_MUL_PACK = (
    int(kind) for kind in (Kind.PACK_BLOCKS, Kind.RMS_NORM_PACK, Kind.SILU_MUL_PACK, Kind.GELU_MUL_PACK)
)
_in_tiles = kernel(in_tiles)


@kernel
def _compute(kind, record, plane, m, first, last):
    """Blocks first..last - 1 of a row of x, by the ops that are done with it before it is packed."""
    x, x_row, x_plane = fields(record)[8:11]
    o, n = 128 * first, 32 * (last - first)
    out = x + plane * x_plane + m * x_row + o
    if kind == RMS_NORM_PACK:
        source, source_row, inverse, inverse_row, weights = fields(record)[11:16]
        elementwise.norm(out, n, source + m * source_row + o, weights + o, load_f(inverse + m * inverse_row))
        return
    other, other_row, other_plane = fields(record)[11:14]
    multiplier = other + plane * other_plane + m * other_row + o
    if kind == SILU_MUL_PACK:
        elementwise.silu_multiply(out, n, out, multiplier)
    else:
        elementwise.gelu_multiply(out, n, out, multiplier)


@kernel
def pack(kind, record, first_row, end_row, thread, n_threads):
    n, planes, panels, panels_row, panels_plane, tiles, tile_stride, flags, x, x_row, x_plane = fields(record)[:11]
    a, z = columns(n, thread, n_threads)
    a, z = a // 32, z // 32
    tiled = first_row + (_in_tiles(end_row - first_row) if tiles != 0 else 0)
    for plane in range(planes):
        m = first_row
        while m < end_row:
            together = GROUP_BLOCKS if m + GROUP_BLOCKS <= tiled else 1
            source, panel = x + plane * x_plane + m * x_row, panels + plane * panels_plane + m * panels_row
            column = tiles + m // TILE_COLUMNS * tile_stride + 4 * (m % TILE_COLUMNS)
            first = a
            while first < z:
                last = min(first // GROUP_BLOCKS * GROUP_BLOCKS + GROUP_BLOCKS, z)
                if kind in (RMS_NORM_PACK, SILU_MUL_PACK, GELU_MUL_PACK):
                    for i in range(m, m + together):
                        _compute(kind, record, plane, i, first, last)
                if m < tiled:
                    if kind == PACK_BLOCKS:
                        for i in range(together):
                            blocks_to_tile_panel(source + i * x_row, first, last, column + 4 * i)
                    elif together == 1:
                        values_to_tile_panel(source, first, last, column)
                    else:
                        for block in range(first, last):
                            eight_to_tile_panel(source, x_row, block, column)
                if m >= tiled or flags & ALWAYS_ROWS:
                    for i in range(together):
                        if kind == PACK_BLOCKS:
                            blocks_to_row_panel(source + i * x_row, first, last, panel + i * panels_row)
                        elif last - first == GROUP_BLOCKS:
                            eight_to_row_panel(source + i * x_row, first, panel + i * panels_row)
                        else:
                            values_to_row_panel(source + i * x_row, first, last, panel + i * panels_row)
                first = last
            m += together
