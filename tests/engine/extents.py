"""All memory that a program's instructions can touch, worked out from their fields apart from the engine that wrote them."""

from collections.abc import Iterator

from dairllm.engine.program import Program
from dairllm.graph.types import FloatType
from dairllm.kernels.instructions import FIELDS, Kind
from dairllm.kernels.sizes import attention_rows_together

__all__ = ["extents"]

CHUNK = 64
F32 = 4


def extents(program: Program) -> Iterator[tuple[str, int, int]]:
    """(kind and field, first address, end address) of every operand of every instruction, for the largest batch and the last position."""
    rows = -(-program.n_batches // 16) * 16
    for instruction in program.instructions.tolist():
        kind = Kind(instruction[0])
        f = dict(zip(FIELDS[kind], instruction[1:], strict=False))
        for name, start, nbytes in _operands(kind, f, rows, program.seq_len):
            yield f"{kind.name} {name}", start, start + nbytes
        scratch = program.scratch.ctypes.data
        yield f"{kind.name} scratch", scratch, scratch + _scratch(kind, f)


def _operands(kind: Kind, f: dict[str, int], rows: int, seq_len: int) -> Iterator[tuple[str, int, int]]:
    def matrix(name: str, row_bytes: int, planes: int = 1) -> tuple[str, int, int]:
        """Rows of an operand, all planes."""
        return name, f[name], (planes - 1) * f.get(f"{name}_plane", 0) + (rows - 1) * f[f"{name}_row"] + row_bytes

    def positions() -> tuple[str, int, int]:
        return "positions", f["positions"], rows * F32

    blocks = {Kind.TO_BLOCKS: "y", Kind.FROM_BLOCKS: "x"}.get(kind)
    match kind:
        case Kind.BARRIER:
            pass
        case Kind.EMBED:
            yield "tokens", f["tokens"], rows * F32
            yield "table", f["table"], f["vocab"] * f["n"] * F32
            yield matrix("y", f["n"] * F32)
        case Kind.COPY | Kind.TO_BLOCKS | Kind.FROM_BLOCKS | Kind.SILU | Kind.GELU | Kind.MUL | Kind.SCALE:
            for name in ("x", "y"):
                yield matrix(name, f["n"] // 32 * 34 if name == blocks else f["n"] * F32, f["planes"])
            if kind == Kind.MUL:
                yield matrix("factor", f["n"] * F32, f["planes"])
            if kind == Kind.SCALE:
                yield matrix("factor", F32, f["planes"])
        case Kind.MERGE_ADD_F32 | Kind.MERGE_ADD_BLOCKS:
            row = f["n"] * F32 if kind == Kind.MERGE_ADD_F32 else f["n"] // 32 * 34
            yield "x", f["x"], (f["n_slices"] - 1) * f["x_slice"] + (rows - 1) * f["x_row"] + row
            yield matrix("y", f["n"] * F32)
        case Kind.MERGE_SUM:
            yield matrix("x", f["n"] * F32, f["planes"])
            yield matrix("y", f["n"] * F32)
        case Kind.PACK | Kind.PACK_BLOCKS | Kind.RMS_NORM_PACK | Kind.SILU_MUL_PACK | Kind.GELU_MUL_PACK:
            yield matrix("x", f["n"] // 32 * 34 if kind == Kind.PACK_BLOCKS else f["n"] * F32, f["planes"])
            if kind == Kind.RMS_NORM_PACK:
                yield matrix("source", f["n"] * F32)
                yield matrix("inverse", F32)
                yield "weights", f["weights"], f["n"] * F32
            elif "factor" in f:
                yield matrix("factor", f["n"] * F32, f["planes"])
            yield "panels", f["panels"], (f["planes"] - 1) * f["panels_plane"] + (rows - 1) * f["panels_row"] + _panel(f["n"] // 32)
            if f["tiles"]:
                yield "tiles", f["tiles"], (rows // 16 - 1) * f["tile_stride"] + f["n"] // 32 * 640
        case Kind.INV_RMS:
            yield matrix("x", f["n_columns"] * f["width"] * F32)
            yield matrix("y", f["n_columns"] * F32)
        case Kind.RMS_NORM:
            yield matrix("x", f["n_columns"] * f["width"] * F32)
            yield matrix("y", f["n_columns"] * f["width"] * F32)
            yield matrix("inverse", f["n_columns"] * F32)
            yield "weights", f["weights"], f["width"] * F32
        case Kind.MATMUL_F32 | Kind.EXPERTS_F32:
            yield matrix("x", f["n"] * F32, f.get("k", 1))
            yield matrix("y", f["d"] * F32, f.get("k", 1))
            yield _weights(f, f["n"] * F32)
        case Kind.MATMUL_Q40 | Kind.MATMUL_Q80:
            yield "panels", f["panels"], (rows - 1) * f["panels_row"] + _panel(f["n_blocks"])
            if f["tiles"]:
                yield "tiles", f["tiles"], (rows // 16 - 1) * f["tile_stride"] + f["n_blocks"] * 640
            yield matrix("y", f["d"] * F32)
            yield _weights(f, f["n_blocks"] * (18 if kind == Kind.MATMUL_Q40 else 34))
        case Kind.EXPERTS_Q40 | Kind.EXPERTS_Q80:
            yield matrix("x", _panel(f["n"]), f["k"])
            yield matrix("y", f["d"] * F32, f["k"])
            yield _weights(f, f["n"] * (18 if kind == Kind.EXPERTS_Q40 else 34))
        case Kind.ROPE_NEIGHBOURS | Kind.ROPE_HALVES:
            yield matrix("x", f["n"] * F32)
            yield "table", f["table"], seq_len * f["head_dim"] * F32
            yield positions()
        case Kind.SHIFT:
            yield matrix("x", f["n"] * F32)
            yield "cache", f["cache"], (f["n"] // f["head_dim"] - 1) * f["head_stride"] + seq_len * _cache_row(f)
            yield positions()
        case Kind.ATTEND | Kind.FOLD:
            n_kv, chunks = -(-f["n_heads"] // f["group"]), -(-seq_len // CHUNK)
            assert chunks <= f["max_chunks"]
            yield matrix("q", f["n_heads"] * f["head_dim"] * F32)
            yield matrix("y", f["n_heads"] * f["head_dim"] * F32)
            for name in ("keys", "values"):
                yield name, f[name], (n_kv - 1) * f["head_stride"] + chunks * CHUNK * _cache_row(f)
            heads = n_kv * f["max_chunks"] * f["group"]
            yield "parts", f["parts"], heads * f["head_dim"] * F32
            yield "stats", f["stats"], heads * 2 * F32
            yield positions()
        case Kind.SOFTMAX:
            yield matrix("x", f["n"] * F32)
        case Kind.GATE:
            yield matrix("x", f["n"] * F32)
            yield matrix("weights", F32, f["k"])
            yield "indexes", f["indexes"], rows * f["k"] * 8
    if "n_experts" in f:
        yield "indexes", f["indexes"], rows * f["k"] * 8


def _scratch(kind: Kind, f: dict[str, int]) -> int:
    """What one thread works with."""
    match kind:
        case Kind.MATMUL_Q40 | Kind.MATMUL_Q80:
            return f["n_blocks"] * (32 + 4) * 8
        case Kind.EXPERTS_F32 | Kind.EXPERTS_Q40 | Kind.EXPERTS_Q80:
            return 8 * ((f["n"] * F32 if kind == Kind.EXPERTS_F32 else _panel(f["n"])) + 64 * F32 + 8)
        case Kind.ATTEND | Kind.FOLD:
            group, chunks, head = f["group"], f["max_chunks"], f["head_dim"] * F32
            rows = attention_rows_together(group, f["head_dim"], chunks)
            return -(-chunks // 16) * 64 + CHUNK * head + rows * group * (CHUNK * F32 + chunks * (head + 8))
    return 0


def _cache_row(f: dict[str, int]) -> int:
    """One head's row at one position."""
    return f["head_dim"] // 32 * 34 if f["cache_type"] == FloatType.Q80 else f["head_dim"] * (4, 2)[f["cache_type"]]


def _panel(blocks: int) -> int:
    return -(-blocks // 8) * 320


def _weights(f: dict[str, int], row: int) -> tuple[str, int, int]:
    return "weights", f["weights"], (f.get("n_experts", 1) - 1) * f.get("weights_expert", 0) + (f["d"] - 1) * f["weights_row"] + row
