"""One thread's part of the matmuls, and of packing what they read. See steps.py for the calling convention."""

from numba import njit

from dairllm.kernels.ir import load_i, store_f
from dairllm.kernels.matmul_f32 import matmul_f32
from dairllm.kernels.matmul_row import row_dot_q40, row_dot_q80
from dairllm.kernels.matmul_tile import TILE_ROWS, tile_rows_q40, tile_rows_q80
from dairllm.kernels.panels import TILE_COLUMNS
from dairllm.kernels.quantize import blocks_to_row_panel, blocks_to_tile_panel, values_to_row_panel, values_to_tile_panel
from dairllm.kernels.records import ALWAYS_ROWS, SMALL_BATCH, Kind
from dairllm.kernels.steps import columns, fields

__all__ = ["experts", "experts_f32", "matmul", "matmul_float", "pack"]

PACK, MATMUL_Q40, EXPERTS_Q40 = int(Kind.PACK), int(Kind.MATMUL_Q40), int(Kind.EXPERTS_Q40)


@njit(nogil=True)
def pack(kind, record, first_row, end_row, thread, n_threads):
    """Rows into row panels where they are few, else into tile panels."""
    x, x_row, x_plane, n, panels, panels_row, panels_plane, tiles, tile_stride, flags, planes = fields(record)[:11]
    a, z = columns(n, thread, n_threads)
    a, z = a // 32, z // 32
    small = end_row - first_row <= SMALL_BATCH
    for plane in range(planes):
        for m in range(first_row, end_row):
            source = x + plane * x_plane + m * x_row
            if small or flags & ALWAYS_ROWS:
                panel = panels + plane * panels_plane + m * panels_row
                if kind == PACK:
                    values_to_row_panel(source, a, z, panel)
                else:
                    blocks_to_row_panel(source, a, z, panel)
            if not small and tiles != 0:
                column = tiles + m // TILE_COLUMNS * tile_stride + 4 * (m % TILE_COLUMNS)
                if kind == PACK:
                    values_to_tile_panel(source, a, z, column)
                else:
                    blocks_to_tile_panel(source, a, z, column)


@njit(nogil=True)
def matmul(kind, record, first_row, end_row, thread, n_threads, scratch):
    panels, panels_row, tiles, tile_stride, weights, weights_row, n_blocks, d, y, y_row = fields(record)[:10]
    a, z = columns(d, thread, n_threads)
    if end_row - first_row > SMALL_BATCH:
        # many rows start with a whole tile (dairllm.engine.program)
        tile = first_row // TILE_COLUMNS
        n_tiles = (end_row + TILE_COLUMNS - 1) // TILE_COLUMNS - tile
        first_tile, out = tiles + tile * tile_stride, y + first_row * y_row
        last = a + (z - a) // TILE_ROWS * TILE_ROWS
        if kind == MATMUL_Q40:
            tile_rows_q40(out, y_row, first_tile, tile_stride, n_tiles, weights, weights_row, n_blocks, a, last, scratch)
        else:
            tile_rows_q80(out, y_row, first_tile, tile_stride, n_tiles, weights, weights_row, n_blocks, a, last, scratch)
        a = last
    if kind == MATMUL_Q40:
        for r in range(a, z):
            for m in range(first_row, end_row):
                store_f(y + m * y_row + 4 * r, row_dot_q40(weights + r * weights_row, panels + m * panels_row, n_blocks))
    else:
        for r in range(a, z):
            for m in range(first_row, end_row):
                store_f(y + m * y_row + 4 * r, row_dot_q80(weights + r * weights_row, panels + m * panels_row, n_blocks))


@njit(nogil=True)
def matmul_float(record, first_row, end_row, thread, n_threads):
    x, x_row, weights, weights_row, n, d, y, y_row = fields(record)[:8]
    a, z = columns(d, thread, n_threads)
    matmul_f32(y + first_row * y_row, y_row, x + first_row * x_row, x_row, end_row - first_row, weights, weights_row, n, a, z)


@njit(nogil=True)
def experts(kind, record, first_row, end_row, thread, n_threads):
    """Plane e of row m goes through expert indexes[m][e]."""
    panels, panels_row, panels_plane, weights, weights_row, weights_expert, n_blocks, d, y, y_row, y_plane, indexes, k, n_experts = fields(
        record
    )[:14]
    a, z = columns(d, thread, n_threads)
    for m in range(first_row, end_row):
        for e in range(k):
            expert = min(max(load_i(indexes + 8 * (m * k + e)), 0), n_experts - 1)
            w = weights + expert * weights_expert
            panel, out = panels + m * panels_row + e * panels_plane, y + m * y_row + e * y_plane
            if kind == EXPERTS_Q40:
                for r in range(a, z):
                    store_f(out + 4 * r, row_dot_q40(w + r * weights_row, panel, n_blocks))
            else:
                for r in range(a, z):
                    store_f(out + 4 * r, row_dot_q80(w + r * weights_row, panel, n_blocks))


@njit(nogil=True)
def experts_f32(record, first_row, end_row, thread, n_threads):
    x, x_row, x_plane, weights, weights_row, weights_expert, n, d, y, y_row, y_plane, indexes, k, n_experts = fields(record)[:14]
    a, z = columns(d, thread, n_threads)
    for m in range(first_row, end_row):
        for e in range(k):
            expert = min(max(load_i(indexes + 8 * (m * k + e)), 0), n_experts - 1)
            matmul_f32(
                y + m * y_row + e * y_plane,
                y_row,
                x + m * x_row + e * x_plane,
                x_row,
                1,
                weights + expert * weights_expert,
                weights_row,
                n,
                a,
                z,
            )
