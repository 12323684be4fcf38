"""Matmuls. See steps.py for the calling convention.

Of a matmul `part` of `n_parts` is computed: what is dealt to a thread, or one of more that threads claim (`parts_claimed`).
"""

from dairllm.kernels.elementwise import copy
from dairllm.kernels.ir import load_i, store_i
from dairllm.kernels.kernel import kernel
from dairllm.kernels.matmul_f32 import matmul_f32
from dairllm.kernels.matmul_row import matmul_rows_q40, matmul_rows_q80
from dairllm.kernels.matmul_tile import TILE_ROWS, tile_strip_q40, tile_strip_q80
from dairllm.kernels.panels import TILE_COLUMNS, in_tiles, row_panel_bytes
from dairllm.kernels.records import UNIT, Kind
from dairllm.kernels.sizes import EXPERT_COLUMNS, EXPERT_STRIP
from dairllm.kernels.steps import columns, fields

__all__ = ["experts", "matmul", "matmul_float", "parts_claimed"]

MATMUL_Q40 = int(Kind.MATMUL_Q40)
EXPERTS_F32, EXPERTS_Q40, EXPERTS_Q80 = int(Kind.EXPERTS_F32), int(Kind.EXPERTS_Q40), int(Kind.EXPERTS_Q80)
_CLAIMS, _CLAIMS_OF_EXPERTS = 8, 2
"""Parts that a thread claims, if all are equally fast. Of experts in a batch fewer: for each part their rows are put together anew."""
PASS_BYTES = 360_000
"""Bytes of tile panels that one pass over the weight rows uses: part of a second-level cache."""
_in_tiles = kernel(in_tiles)
_row_panel_bytes = kernel(row_panel_bytes)


@kernel
def parts_claimed(kind, record, n_rows, n_threads):
    """Into how many parts a matmul is cut for threads to claim; 0: one is dealt to each."""
    claimed, d = fields(record)[:2]
    if claimed == 0:
        return 0
    few = n_rows > 1 and kind in (EXPERTS_F32, EXPERTS_Q40, EXPERTS_Q80)
    return min(n_threads * (_CLAIMS_OF_EXPERTS if few else _CLAIMS), (d + UNIT - 1) // UNIT)


@kernel
def matmul(kind, record, first_row, end_row, part, n_parts, scratch):
    """Weight rows in strips: each is taken times the tiles of a pass, then, in the last pass, times the rows that are in no tile."""
    _, d, panels, panels_row, tiles, tile_stride, weights, weights_row, n_blocks, y, y_row = fields(record)[:11]
    a, z = columns(d, part, n_parts)
    n_rows = end_row - first_row
    tiled = _in_tiles(n_rows)
    n_tiles = (tiled + TILE_COLUMNS - 1) // TILE_COLUMNS
    # many rows start with a whole tile (dairllm.engine.program)
    tiles += first_row // TILE_COLUMNS * tile_stride
    panels += first_row * panels_row
    y += first_row * y_row
    strip = TILE_ROWS if n_tiles else max(z - a, 1)
    t = 0
    while True:
        end = min(t + max(1, PASS_BYTES // tile_stride), n_tiles)
        for r in range(a, z, strip):
            w, out = weights + r * weights_row, y + 4 * r
            count, done = min(strip, z - r), 0
            if t < end and count == TILE_ROWS:
                done = tiled
                tile_out, first_tile = out + t * TILE_COLUMNS * y_row, tiles + t * tile_stride
                if kind == MATMUL_Q40:
                    tile_strip_q40(tile_out, y_row, first_tile, tile_stride, end - t, w, weights_row, n_blocks, scratch)
                else:
                    tile_strip_q80(tile_out, y_row, first_tile, tile_stride, end - t, w, weights_row, n_blocks, scratch)
            if end == n_tiles and done < n_rows:
                out += done * y_row
                x = panels + done * panels_row
                if kind == MATMUL_Q40:
                    matmul_rows_q40(out, y_row, x, panels_row, n_rows - done, w, weights_row, n_blocks, count)
                else:
                    matmul_rows_q80(out, y_row, x, panels_row, n_rows - done, w, weights_row, n_blocks, count)
        t = end
        if t == n_tiles:
            return


@kernel
def matmul_float(record, first_row, end_row, part, n_parts):
    _, d, x, x_row, weights, weights_row, n, y, y_row = fields(record)[:9]
    a, z = columns(d, part, n_parts)
    matmul_f32(y + first_row * y_row, y_row, x + first_row * x_row, x_row, end_row - first_row, weights, weights_row, n, a, z)


@kernel
def _expert_rows(kind, out, out_row, x, x_row, n_rows, weights, weights_row, n, count):
    if kind == EXPERTS_Q40:
        matmul_rows_q40(out, out_row, x, x_row, n_rows, weights, weights_row, n, count)
    elif kind == EXPERTS_Q80:
        matmul_rows_q80(out, out_row, x, x_row, n_rows, weights, weights_row, n, count)
    else:
        matmul_f32(out, out_row, x, x_row, n_rows, weights, weights_row, n, 0, count)


@kernel
def experts(kind, record, first_row, end_row, part, n_parts, scratch):
    """Plane e of row m goes through expert indexes[m][e]; what goes through the same one together, so that its weights are read once.

    n counts values where they are F32, else blocks; then x is row panels.
    """
    _, d, x, x_row, x_plane, weights, weights_row, weights_expert, n, y, y_row, y_plane, indexes, k, n_experts = fields(record)[:15]
    a, z = columns(d, part, n_parts)
    n_rows = end_row - first_row
    if n_rows == 1:  # no two planes of a row have the same
        for e in range(k):
            expert = min(max(load_i(indexes + 8 * (first_row * k + e)), 0), n_experts - 1)
            w, out = weights + expert * weights_expert + a * weights_row, y + first_row * y_row + e * y_plane + 4 * a
            _expert_rows(kind, out, y_row, x + first_row * x_row + e * x_plane, x_row, n_rows, w, weights_row, n, z - a)
        return
    row_bytes = 4 * n if kind == EXPERTS_F32 else _row_panel_bytes(n)
    together, outputs = scratch, scratch + EXPERT_COLUMNS * row_bytes
    chosen = outputs + 4 * EXPERT_STRIP * EXPERT_COLUMNS  # pairs (row, plane), as row * k + plane
    for expert in range(n_experts):
        w, end, pair = weights + expert * weights_expert, end_row * k, first_row * k
        while pair < end:
            count = 0
            while pair < end and count < EXPERT_COLUMNS:
                if min(max(load_i(indexes + 8 * pair), 0), n_experts - 1) == expert:
                    store_i(chosen + 8 * count, pair)
                    copy(together + count * row_bytes, row_bytes // 4, x + pair // k * x_row + pair % k * x_plane)
                    count += 1
                pair += 1
            for r in range(a, z if count else a, EXPERT_STRIP):
                strip = min(EXPERT_STRIP, z - r)
                _expert_rows(kind, outputs, 4 * EXPERT_STRIP, together, row_bytes, count, w + r * weights_row, weights_row, n, strip)
                for i in range(count):
                    at = load_i(chosen + 8 * i)
                    copy(y + at // k * y_row + at % k * y_plane + 4 * r, strip, outputs + 4 * EXPERT_STRIP * i)
