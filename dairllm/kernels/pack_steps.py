"""Activations into panels, for the matmuls that read them. See steps.py for the calling convention.

Rows that fill tiles go into tile panels, the others into row panels.
"""

from numba import njit

from dairllm.kernels.ir import load_f
from dairllm.kernels.panels import TILE_COLUMNS, in_tiles
from dairllm.kernels.quantize import (
    blocks_to_row_panel,
    blocks_to_tile_panel,
    gelu_mul_to_row_panel,
    gelu_mul_to_tile_panel,
    norm_to_row_panel,
    norm_to_tile_panel,
    silu_mul_to_row_panel,
    silu_mul_to_tile_panel,
    values_to_row_panel,
    values_to_tile_panel,
)
from dairllm.kernels.records import ALWAYS_ROWS, Kind
from dairllm.kernels.steps import columns, fields

__all__ = ["activate_and_pack", "norm_and_pack", "pack"]

PACK, SILU_MUL_PACK = int(Kind.PACK), int(Kind.SILU_MUL_PACK)
_in_tiles = njit(nogil=True)(in_tiles)


@njit(nogil=True)
def _rows_in_tiles(tiles, first_row, end_row):
    """Where the rows end that go into tile panels."""
    return first_row + (_in_tiles(end_row - first_row) if tiles != 0 else 0)


@njit(nogil=True)
def _column(tiles, tile_stride, m):
    return tiles + m // TILE_COLUMNS * tile_stride + 4 * (m % TILE_COLUMNS)


@njit(nogil=True)
def pack(kind, record, first_row, end_row, thread, n_threads):
    n, planes, panels, panels_row, panels_plane, tiles, tile_stride, flags, x, x_row, x_plane = fields(record)[:11]
    a, z = columns(n, thread, n_threads)
    a, z = a // 32, z // 32
    tiled = _rows_in_tiles(tiles, first_row, end_row)
    for plane in range(planes):
        for m in range(first_row, end_row):
            source = x + plane * x_plane + m * x_row
            if m >= tiled or flags & ALWAYS_ROWS:
                panel = panels + plane * panels_plane + m * panels_row
                if kind == PACK:
                    values_to_row_panel(source, a, z, panel)
                else:
                    blocks_to_row_panel(source, a, z, panel)
            if m < tiled:
                column = _column(tiles, tile_stride, m)
                if kind == PACK:
                    values_to_tile_panel(source, a, z, column)
                else:
                    blocks_to_tile_panel(source, a, z, column)


@njit(nogil=True)
def norm_and_pack(record, first_row, end_row, thread, n_threads):
    """RMS norm's second half, kept, and packed: each row into one panel."""
    n, _, panels, panels_row, _, tiles, tile_stride, _, x, x_row, inverse, inverse_row, weights, y, y_row = fields(record)[:15]
    a, z = columns(n, thread, n_threads)
    a, z = a // 32, z // 32
    tiled = _rows_in_tiles(tiles, first_row, end_row)
    for m in range(first_row, end_row):
        source, out, factor = x + m * x_row, y + m * y_row, load_f(inverse + m * inverse_row)
        if m < tiled:
            norm_to_tile_panel(out, a, z, _column(tiles, tile_stride, m), source, weights, factor)
        else:
            norm_to_row_panel(out, a, z, panels + m * panels_row, source, weights, factor)


@njit(nogil=True)
def activate_and_pack(kind, record, first_row, end_row, thread, n_threads):
    """An activation times a multiplier, kept where the values were, and packed: each row into one panel."""
    n, planes, panels, panels_row, panels_plane, tiles, tile_stride, _, x, x_row, x_plane, by, by_row, by_plane = fields(record)[:14]
    a, z = columns(n, thread, n_threads)
    a, z = a // 32, z // 32
    tiled = _rows_in_tiles(tiles, first_row, end_row)
    for plane in range(planes):
        for m in range(first_row, end_row):
            values, multiplier = x + plane * x_plane + m * x_row, by + plane * by_plane + m * by_row
            panel, column = panels + plane * panels_plane + m * panels_row, _column(tiles, tile_stride, m)
            if kind == SILU_MUL_PACK:
                if m < tiled:
                    silu_mul_to_tile_panel(values, a, z, column, values, multiplier)
                else:
                    silu_mul_to_row_panel(values, a, z, panel, values, multiplier)
            elif m < tiled:
                gelu_mul_to_tile_panel(values, a, z, column, values, multiplier)
            else:
                gelu_mul_to_row_panel(values, a, z, panel, values, multiplier)
