"""Activations into panels, for the matmuls that read them, and what makes them just before. See steps.py for the calling convention.

Rows that fill tiles go into tile panels, the others into row panels. A thread takes a strip of GROUP_BLOCKS blocks of a row, or of as
many rows of a tile, while it is in the first-level cache: it is computed where the values go in any case, then packed, all at once.
"""

from dairllm.kernels import elementwise
from dairllm.kernels.fields import fields_of
from dairllm.kernels.instructions import ALWAYS_ROWS, Kind
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
from dairllm.kernels.steps import columns

__all__ = ["pack"]

PACK_BLOCKS, RMS_NORM_PACK, SILU_MUL_PACK, GELU_MUL_PACK = (
    int(kind) for kind in (Kind.PACK_BLOCKS, Kind.RMS_NORM_PACK, Kind.SILU_MUL_PACK, Kind.GELU_MUL_PACK)
)
_in_tiles = kernel(in_tiles)
_pack_fields = fields_of(Kind.PACK, Kind.PACK_BLOCKS, Kind.RMS_NORM_PACK, Kind.SILU_MUL_PACK, Kind.GELU_MUL_PACK)
_norm_fields = fields_of(Kind.RMS_NORM_PACK)
_factor_fields = fields_of(Kind.SILU_MUL_PACK, Kind.GELU_MUL_PACK)


@kernel
def _compute(kind, instruction, plane, m, first, last):
    """Blocks first..last - 1 of a row of x, by the ops that are done with it before it is packed."""
    f = _pack_fields(instruction)
    o, n = 128 * first, 32 * (last - first)
    out = f.x + plane * f.x_plane + m * f.x_row + o
    if kind == RMS_NORM_PACK:
        norm = _norm_fields(instruction)
        inverse = load_f(norm.inverse + m * norm.inverse_row)
        elementwise.norm(out, n, norm.source + m * norm.source_row + o, norm.weights + o, inverse)
        return
    other = _factor_fields(instruction)
    multiplier = other.factor + plane * other.factor_plane + m * other.factor_row + o
    if kind == SILU_MUL_PACK:
        elementwise.silu_multiply(out, n, out, multiplier)
    else:
        elementwise.gelu_multiply(out, n, out, multiplier)


@kernel
def pack(kind, instruction, first_row, end_row, thread, n_threads):
    f = _pack_fields(instruction)
    a, z = columns(f.n, thread, n_threads)
    a, z = a // 32, z // 32
    tiled = first_row + (_in_tiles(end_row - first_row) if f.tiles != 0 else 0)
    for plane in range(f.planes):
        m = first_row
        while m < end_row:
            together = GROUP_BLOCKS if m + GROUP_BLOCKS <= tiled else 1
            source, panel = f.x + plane * f.x_plane + m * f.x_row, f.panels + plane * f.panels_plane + m * f.panels_row
            column = f.tiles + m // TILE_COLUMNS * f.tile_stride + 4 * (m % TILE_COLUMNS)
            first = a
            while first < z:
                last = min(first // GROUP_BLOCKS * GROUP_BLOCKS + GROUP_BLOCKS, z)
                if kind in (RMS_NORM_PACK, SILU_MUL_PACK, GELU_MUL_PACK):
                    for i in range(m, m + together):
                        _compute(kind, instruction, plane, i, first, last)
                if m < tiled:
                    if kind == PACK_BLOCKS:
                        for i in range(together):
                            blocks_to_tile_panel(source + i * f.x_row, first, last, column + 4 * i)
                    elif together == 1:
                        values_to_tile_panel(source, first, last, column)
                    else:
                        for block in range(first, last):
                            eight_to_tile_panel(source, f.x_row, block, column)
                if m >= tiled or f.flags & ALWAYS_ROWS:
                    for i in range(together):
                        if kind == PACK_BLOCKS:
                            blocks_to_row_panel(source + i * f.x_row, first, last, panel + i * f.panels_row)
                        elif last - first == GROUP_BLOCKS:
                            eight_to_row_panel(source + i * f.x_row, first, panel + i * f.panels_row)
                        else:
                            values_to_row_panel(source + i * f.x_row, first, last, panel + i * f.panels_row)
                first = last
            m += together
