"""Matmuls. See steps.py for the calling convention.

Of a matmul `part` of `n_parts` is computed: what is dealt to a thread, or one of more that threads claim (`parts_claimed`).
"""

from dairllm.kernels.elementwise import copy
from dairllm.kernels.fields import fields_of
from dairllm.kernels.instructions import UNIT, Kind
from dairllm.kernels.ir import load_i, store_i
from dairllm.kernels.kernel import kernel
from dairllm.kernels.matmul_f32 import matmul_f32
from dairllm.kernels.matmul_row import matmul_rows_q40, matmul_rows_q80
from dairllm.kernels.matmul_tile import TILE_ROWS, tile_strip_q40, tile_strip_q80
from dairllm.kernels.panels import TILE_COLUMNS, in_tiles, row_panel_bytes
from dairllm.kernels.sizes import EXPERT_COLUMNS, EXPERT_STRIP
from dairllm.kernels.steps import columns

__all__ = ["experts", "matmul", "matmul_float", "parts_claimed"]

MATMUL_Q40 = int(Kind.MATMUL_Q40)
EXPERTS_F32, EXPERTS_Q40, EXPERTS_Q80 = int(Kind.EXPERTS_F32), int(Kind.EXPERTS_Q40), int(Kind.EXPERTS_Q80)
_CLAIMS, _CLAIMS_OF_EXPERTS = 8, 2
"""Parts that a thread claims, if all are equally fast. Of experts in a batch fewer: for each part their rows are put together anew."""
PASS_BYTES = 360_000
"""Bytes of tile panels that one pass over the weight rows uses: part of a second-level cache."""
_claimed_fields = fields_of(Kind.MATMUL_F32, Kind.MATMUL_Q40, Kind.MATMUL_Q80, Kind.EXPERTS_F32, Kind.EXPERTS_Q40, Kind.EXPERTS_Q80)
_float_fields = fields_of(Kind.MATMUL_F32)
_matmul_fields = fields_of(Kind.MATMUL_Q40, Kind.MATMUL_Q80)
_experts_fields = fields_of(Kind.EXPERTS_F32, Kind.EXPERTS_Q40, Kind.EXPERTS_Q80)
_in_tiles = kernel(in_tiles)
_row_panel_bytes = kernel(row_panel_bytes)


@kernel
def parts_claimed(kind, instruction, n_rows, n_threads):
    """Into how many parts a matmul is cut for threads to claim; 0: one is dealt to each."""
    f = _claimed_fields(instruction)
    if f.claimed == 0:
        return 0
    few = n_rows > 1 and kind in (EXPERTS_F32, EXPERTS_Q40, EXPERTS_Q80)
    return min(n_threads * (_CLAIMS_OF_EXPERTS if few else _CLAIMS), (f.d + UNIT - 1) // UNIT)


@kernel
def matmul(kind, instruction, first_row, end_row, part, n_parts, scratch):
    """Weight rows in strips: each is taken times the tiles of a pass, then, in the last pass, times the rows that are in no tile."""
    f = _matmul_fields(instruction)
    panels, tiles, y = f.panels, f.tiles, f.y
    a, z = columns(f.d, part, n_parts)
    n_rows = end_row - first_row
    tiled = _in_tiles(n_rows)
    n_tiles = (tiled + TILE_COLUMNS - 1) // TILE_COLUMNS
    # many rows start with a whole tile (dairllm.engine.program)
    tiles += first_row // TILE_COLUMNS * f.tile_stride
    panels += first_row * f.panels_row
    y += first_row * f.y_row
    strip = TILE_ROWS if n_tiles else max(z - a, 1)
    t = 0
    while True:
        end = min(t + max(1, PASS_BYTES // f.tile_stride), n_tiles)
        for r in range(a, z, strip):
            w, out = f.weights + r * f.weights_row, y + 4 * r
            count, done = min(strip, z - r), 0
            if t < end and count == TILE_ROWS:
                done = tiled
                tile_out, first_tile = out + t * TILE_COLUMNS * f.y_row, tiles + t * f.tile_stride
                if kind == MATMUL_Q40:
                    tile_strip_q40(tile_out, f.y_row, first_tile, f.tile_stride, end - t, w, f.weights_row, f.n_blocks, scratch)
                else:
                    tile_strip_q80(tile_out, f.y_row, first_tile, f.tile_stride, end - t, w, f.weights_row, f.n_blocks, scratch)
            if end == n_tiles and done < n_rows:
                out += done * f.y_row
                x = panels + done * f.panels_row
                if kind == MATMUL_Q40:
                    matmul_rows_q40(out, f.y_row, x, f.panels_row, n_rows - done, w, f.weights_row, f.n_blocks, count)
                else:
                    matmul_rows_q80(out, f.y_row, x, f.panels_row, n_rows - done, w, f.weights_row, f.n_blocks, count)
        t = end
        if t == n_tiles:
            return


@kernel
def matmul_float(instruction, first_row, end_row, part, n_parts):
    f = _float_fields(instruction)
    a, z = columns(f.d, part, n_parts)
    matmul_f32(
        f.y + first_row * f.y_row, f.y_row, f.x + first_row * f.x_row, f.x_row, end_row - first_row, f.weights, f.weights_row, f.n, a, z
    )


@kernel
def _expert_rows(kind, out, out_row, x, x_row, n_rows, weights, weights_row, n, count):
    if kind == EXPERTS_Q40:
        matmul_rows_q40(out, out_row, x, x_row, n_rows, weights, weights_row, n, count)
    elif kind == EXPERTS_Q80:
        matmul_rows_q80(out, out_row, x, x_row, n_rows, weights, weights_row, n, count)
    else:
        matmul_f32(out, out_row, x, x_row, n_rows, weights, weights_row, n, 0, count)


@kernel
def experts(kind, instruction, first_row, end_row, part, n_parts, scratch):
    """Plane e of row m goes through expert indexes[m][e]; what goes through the same one together, so that its weights are read once.

    n counts values where they are F32, else blocks; then x is row panels.
    """
    f = _experts_fields(instruction)
    a, z = columns(f.d, part, n_parts)
    n_rows = end_row - first_row
    if n_rows == 1:  # no two planes of a row have the same
        for e in range(f.k):
            expert = min(max(load_i(f.indexes + 8 * (first_row * f.k + e)), 0), f.n_experts - 1)
            w, out = f.weights + expert * f.weights_expert + a * f.weights_row, f.y + first_row * f.y_row + e * f.y_plane + 4 * a
            _expert_rows(kind, out, f.y_row, f.x + first_row * f.x_row + e * f.x_plane, f.x_row, n_rows, w, f.weights_row, f.n, z - a)
        return
    row_bytes = 4 * f.n if kind == EXPERTS_F32 else _row_panel_bytes(f.n)
    together, outputs = scratch, scratch + EXPERT_COLUMNS * row_bytes
    chosen = outputs + 4 * EXPERT_STRIP * EXPERT_COLUMNS  # pairs (row, plane), as row * k + plane
    for expert in range(f.n_experts):
        w, end, pair = f.weights + expert * f.weights_expert, end_row * f.k, first_row * f.k
        while pair < end:
            count = 0
            while pair < end and count < EXPERT_COLUMNS:
                if min(max(load_i(f.indexes + 8 * pair), 0), f.n_experts - 1) == expert:
                    store_i(chosen + 8 * count, pair)
                    copy(together + count * row_bytes, row_bytes // 4, f.x + pair // f.k * f.x_row + pair % f.k * f.x_plane)
                    count += 1
                pair += 1
            for r in range(a, z if count else a, EXPERT_STRIP):
                strip = min(EXPERT_STRIP, z - r)
                _expert_rows(kind, outputs, 4 * EXPERT_STRIP, together, row_bytes, count, w + r * f.weights_row, f.weights_row, f.n, strip)
                for i in range(count):
                    at = load_i(chosen + 8 * i)
                    copy(f.y + at // f.k * f.y_row + at % f.k * f.y_plane + 4 * r, strip, outputs + 4 * EXPERT_STRIP * i)
