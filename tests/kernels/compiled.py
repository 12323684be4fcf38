"""The compiled kernels behind the functions of dairllm.kernels.reference: each call is an instruction or two, run by `threads`
resident threads.

Memory is as unfriendly as an engine may make it: rows with gaps between them, weights at odd addresses, stale numbers where nothing was
written. Gaps are checked to be as they were.
"""

import atexit
import functools
from collections.abc import Callable, Mapping
from typing import Any
from typing import cast as cast_type

import numpy as np
import numpy.typing as npt

from dairllm.engine.allocation import aligned
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.graph.types import FloatType, RopeType, row_bytes
from dairllm.kernels.elementwise import exp_one
from dairllm.kernels.instructions import ALWAYS_ROWS, CLAIMS, FIELDS, INSTRUCTION_WORDS, Kind, State
from dairllm.kernels.ir import load_f, store_f
from dairllm.kernels.kernel import kernel
from dairllm.kernels.panels import TILE_COLUMNS, row_panel_bytes, tile_panel_bytes
from dairllm.kernels.reference import Floats, Row
from dairllm.kernels.sizes import BARRIER_BYTES, CHUNK, attention_scratch_bytes, experts_scratch_bytes, tile_scratch_bytes

__all__ = [
    "Call",
    "activate_and_pack",
    "attention",
    "cast",
    "embedding",
    "exp",
    "expert_matmul",
    "gelu",
    "inv_rms",
    "matmul",
    "merge_add",
    "merge_sum",
    "moe_gate",
    "mul",
    "norm_and_pack",
    "pack",
    "quantize_q80",
    "repeat_z",
    "rms_norm",
    "rope",
    "run_all",
    "scale",
    "shift",
    "silu",
    "softmax",
]

_STALE = 0xA5
_NAN_BYTE = 0xFF
"""Makes a NaN of float32 and of half precision."""


class _Area:
    """[planes, rows, bytes] somewhere in stale memory, 16-row multiples allocated, rows `gap` bytes apart.

    Args:
        values: what to put there; float32 or uint8, [planes, rows, n].
        offset: bytes from a 64-byte boundary.
    """

    def __init__(self, values: npt.NDArray[Any], *, offset: int = 0, gap: int = 12) -> None:
        self.dtype, (n_planes, self.n_rows, _) = values.dtype, values.shape
        raw = np.ascontiguousarray(values).view(np.uint8)
        self.row = raw.shape[2] + gap
        self.plane = self.row * -(-self.n_rows // TILE_COLUMNS) * TILE_COLUMNS + 20
        self._memory = aligned(64 + offset + self.plane * n_planes + 64)
        self._memory[:] = _STALE
        self._bytes = np.ndarray(raw.shape, np.uint8, self._memory.data, 64 + offset, (self.plane, self.row, 1))
        self._bytes[...] = raw
        self.address = self._memory.ctypes.data + 64 + offset

    @classmethod
    def empty(cls, planes: int, rows: int, n: int, dtype: npt.DTypeLike = np.float32, **how: int) -> "_Area":
        """Stale numbers."""
        values = np.full((planes, rows, n * np.dtype(dtype).itemsize), _STALE, np.uint8)
        return cls(values.view(dtype), **how)

    def read(self, whole_tiles: bool = False) -> npt.NDArray[Any]:
        """What stands there, [planes, rows, n]; with `whole_tiles` the rows up to a multiple of 16 may have been written too."""
        found = np.array(self._bytes)
        if whole_tiles:
            rows = -(-self.n_rows // TILE_COLUMNS) * TILE_COLUMNS
            shape = (len(found), rows, found.shape[2])
            np.ndarray(shape, np.uint8, self._memory.data, self.address - self._memory.ctypes.data, self._bytes.strides)[...] = _STALE
        self._bytes[...] = _STALE
        assert (self._memory == _STALE).all(), "a kernel wrote outside of its rows"
        return found.view(self.dtype)

    def rows(self, whole_tiles: bool = False) -> Floats:
        """The first plane of `read`, of float32."""
        return np.asarray(self.read(whole_tiles)[0], np.float32)

    def fields(self, name: str, planes: bool = False) -> dict[str, int]:
        fields = {name: self.address, f"{name}_row": self.row}
        return fields | {f"{name}_plane": self.plane} if planes else fields


class Call:
    """As much of a program as an executor asks for: one segment of these instructions."""

    def __init__(self, instructions: list[list[int]], threads: int, scratch: int) -> None:
        self.n_threads, self.segments = threads, ((0, len(instructions)),)
        self._program = np.array([instruction + [0] * (INSTRUCTION_WORDS - len(instruction)) for instruction in instructions], np.int64)
        self._state, self._barrier = aligned(64).view(np.int64), aligned(BARRIER_BYTES)
        self.scratch_stride = -(-scratch // 64) * 64
        self._scratch = aligned(self.scratch_stride * threads + 64)
        self._scratch[:] = _STALE
        self.addresses = tuple(a.ctypes.data for a in (self._program, self._state, self._barrier, self._scratch))

    def prepare(self, position: int, rows: int, first_row: int) -> None:
        self._state[State.FIRST_ROW], self._state[State.END_ROW] = first_row, rows

    def check(self) -> None:
        assert (self._scratch[-64:] == _STALE).all(), "a kernel wrote outside of its scratch"
        assert not self._program[:, CLAIMS].any(), "the next run would have claims left over"


@functools.cache
def _executor(threads: int) -> Executor:
    """Started at the first call, and closed when the process ends."""
    executor = Executor(threads).start()
    atexit.register(executor.close)
    return executor


def _record(kind: Kind, fields: Mapping[str, int]) -> list[int]:
    assert set(fields) == set(FIELDS[kind]), set(fields) ^ set(FIELDS[kind])
    return [kind, *(fields[name] for name in FIELDS[kind])]


def run_all(instructions: list[list[int]], rows: int, threads: int, scratch: int = 0) -> None:
    call = Call(instructions, threads, scratch)
    _executor(threads).run(cast_type(Program, call), 0, 1, 0, rows)
    call.check()


def _run(kind: Kind, rows: int, threads: int, scratch: int = 0, **fields: int) -> None:
    run_all([_record(kind, fields)], rows, threads, scratch)


def _run_products(
    kind: Kind, rows: int, threads: int, read: Callable[[], npt.NDArray[Any]], scratch: int = 0, **fields: int
) -> npt.NDArray[Any]:
    """What `read` finds; the same whether outputs are dealt to threads or claimed by them."""
    found = []
    for claimed in (0, 1):
        _run(kind, rows, threads, scratch, **fields, claimed=claimed)
        found.append(read())
    assert found[0].tobytes() == found[1].tobytes()
    return found[0]


def _planes(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[n], [rows, n] or [planes, rows, n] as the last."""
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def _map(kind: Kind, x: npt.NDArray[Any], n: int, threads: int, out: _Area, **extra: int) -> npt.NDArray[Any]:
    values = _planes(x)
    source = _Area(values)
    _run(kind, values.shape[1], threads, **source.fields("x", True), **out.fields("y", True), n=n, planes=len(values), **extra)
    return out.read().reshape(*x.shape[:-1], -1)


def _like(x: Floats) -> _Area:
    return _Area.empty(*_planes(x).shape)


def quantize_q80(x: Floats, threads: int = 1) -> npt.NDArray[np.uint8]:
    planes, rows, n = _planes(x).shape
    return _map(Kind.TO_BLOCKS, x, n, threads, _Area.empty(planes, rows, row_bytes(FloatType.Q80, n), np.uint8, offset=1))


def cast(row: Row, source: FloatType, target: FloatType, threads: int = 1) -> Row:
    if target == FloatType.Q80:
        return quantize_q80(row, threads)
    planes, rows, n = _planes(row).shape
    n = n // 34 * 32 if source == FloatType.Q80 else n
    return _map(Kind.COPY if source == target else Kind.FROM_BLOCKS, row, n, threads, _Area.empty(planes, rows, n))


def repeat_z(row: Row, source: FloatType, target: FloatType, planes: int, threads: int = 1) -> Row:
    rows, n = row.shape
    q80 = target == FloatType.Q80
    x, y = _Area(row[None]), _Area.empty(planes, rows, row_bytes(target, n) // (1 if q80 else 4), np.uint8 if q80 else np.float32)
    _run(Kind.TO_BLOCKS if q80 else Kind.COPY, rows, threads, **x.fields("x"), x_plane=0, **y.fields("y", True), n=n, planes=planes)
    return y.read()


def silu(x: Floats, threads: int = 1) -> Floats:
    return _map(Kind.SILU, x, x.shape[-1], threads, _like(x))


def gelu(x: Floats, threads: int = 1) -> Floats:
    return _map(Kind.GELU, x, x.shape[-1], threads, _like(x))


def mul(x: Floats, y: Floats, threads: int = 1) -> Floats:
    other = _Area(_planes(y))
    return _map(Kind.MUL, x, x.shape[-1], threads, _like(x), **other.fields("factor", True))


def scale(x: Floats, factors: Floats, threads: int = 1) -> Floats:
    other = _Area(factors[..., None])
    return _map(Kind.SCALE, x, x.shape[-1], threads, _like(x), **other.fields("factor", True))


def embedding(table: Floats, tokens: npt.NDArray[np.integer], threads: int = 1) -> Floats:
    weights = _Area(table[None], offset=1, gap=0)
    ids = tokens.astype(np.float32)
    out = _Area.empty(1, len(tokens), table.shape[1])
    vocab, n = table.shape
    _run(Kind.EMBED, len(tokens), threads, tokens=ids.ctypes.data, table=weights.address, vocab=vocab, n=n, **out.fields("y"))
    return out.rows()


def merge_add(y: Floats, x: Row, x_type: FloatType, threads: int = 1) -> Floats:
    rows, n = y.shape
    blocks = x_type == FloatType.Q80
    each = row_bytes(x_type, n)
    source, out = _Area(x[None], offset=1 if blocks else 0), _Area(y[None])
    n_slices = x.shape[1] * x.dtype.itemsize // each
    kind = Kind.MERGE_ADD_BLOCKS if blocks else Kind.MERGE_ADD_F32
    _run(kind, rows, threads, **source.fields("x"), x_slice=each, n_slices=n_slices, **out.fields("y"), n=n)
    return out.rows()


def merge_sum(x: Floats, threads: int = 1) -> Floats:
    planes, rows, n = x.shape
    source, out = _Area(x), _Area.empty(1, rows, n)
    _run(Kind.MERGE_SUM, rows, threads, **source.fields("x", True), planes=planes, **out.fields("y"), n=n)
    return out.rows()


def inv_rms(x: Floats, epsilon: float, n_columns: int = 1, threads: int = 1) -> Floats:
    rows, n = x.shape
    source, out = _Area(x[None]), _Area.empty(1, rows, n_columns)
    bits = int(np.float32(epsilon).view(np.int32))
    fields = source.fields("x") | out.fields("y")
    _run(Kind.INV_RMS, rows, threads, **fields, n_columns=n_columns, width=n // n_columns, epsilon_bits=bits)
    return out.rows()


def rms_norm(x: Floats, inverse: Floats, weight: Floats, threads: int = 1) -> Floats:
    rows, n = x.shape
    weights = _Area(weight[None, None], offset=3)
    source, factors, out = _Area(x[None]), _Area(inverse[None]), _Area.empty(1, rows, n)
    fields = source.fields("x") | factors.fields("inverse") | out.fields("y")
    width = len(weight)
    _run(Kind.RMS_NORM, rows, threads, **fields, weights=weights.address, n_columns=n // width, width=width)
    return out.rows()


_MATMUL = {FloatType.F32: Kind.MATMUL_F32, FloatType.Q40: Kind.MATMUL_Q40, FloatType.Q80: Kind.MATMUL_Q80}
_EXPERTS = {FloatType.F32: Kind.EXPERTS_F32, FloatType.Q40: Kind.EXPERTS_Q40, FloatType.Q80: Kind.EXPERTS_Q80}


class _Panels:
    """Where rows lie packed for quantized matmuls."""

    def __init__(self, planes: int, rows: int, n: int) -> None:
        self.n, self.n_blocks, self.planes = n, n // 32, planes
        self.row, self.tile = row_panel_bytes(self.n_blocks), tile_panel_bytes(self.n_blocks)
        self.plane = self.row * rows
        self.rows, self.tiles = aligned(self.plane * planes), aligned(self.tile * -(-rows // TILE_COLUMNS))

    def fields(self, always_rows: bool = False) -> dict[str, int]:
        fields = {"panels": self.rows.ctypes.data, "panels_row": self.row, "panels_plane": self.plane}
        fields |= {"tiles": self.tiles.ctypes.data if self.planes == 1 else 0, "tile_stride": self.tile}
        return fields | {"n": self.n, "planes": self.planes, "flags": ALWAYS_ROWS if always_rows else 0}

    def read(self) -> npt.NDArray[np.uint8]:
        return np.concatenate([self.rows, self.tiles])


def _packed(x: Row, x_type: FloatType, threads: int, always_rows: bool = False) -> _Panels:
    """x [planes, rows, n] of F32 or Q80."""
    planes, rows, n = x.shape
    panels = _Panels(planes, rows, n if x_type == FloatType.F32 else n // 34 * 32)
    source = _Area(x, offset=0 if x_type == FloatType.F32 else 1)
    kind = Kind.PACK if x_type == FloatType.F32 else Kind.PACK_BLOCKS
    _run(kind, rows, threads, **source.fields("x", True), **panels.fields(always_rows))
    return panels


def pack(x: Floats, threads: int = 1, always_rows: bool = False) -> npt.NDArray[np.uint8]:
    """[planes, rows, n] -> the memory of all panels."""
    return _packed(x, FloatType.F32, threads, always_rows).read()


def norm_and_pack(
    x: Floats, inverse: Floats, weight: Floats, threads: int = 1, always_rows: bool = False
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """x [rows, n], inverse [rows, 1] -> what is kept, and the memory of all panels."""
    rows, n = x.shape
    weights, source, factors = _Area(weight[None, None], offset=3), _Area(x[None]), _Area(inverse[None])
    out, panels = _Area.empty(1, rows, n), _Panels(1, rows, n)
    fields = source.fields("source") | factors.fields("inverse") | out.fields("x", True) | panels.fields(always_rows)
    _run(Kind.RMS_NORM_PACK, rows, threads, **fields, weights=weights.address)
    return out.rows(), panels.read()


def activate_and_pack(
    activation: str, x: Floats, y: Floats, threads: int = 1, always_rows: bool = False
) -> tuple[Floats, npt.NDArray[np.uint8]]:
    """The activation of x times y, both [planes, rows, n] -> what is kept, and the memory of all panels."""
    kind = {"silu": Kind.SILU_MUL_PACK, "gelu": Kind.GELU_MUL_PACK}[activation]
    area, other, panels = _Area(x), _Area(y), _Panels(*x.shape)
    _run(kind, x.shape[1], threads, **area.fields("x", True), **other.fields("factor", True), **panels.fields(always_rows))
    return area.read(), panels.read()


def matmul(weights: Row, weight_type: FloatType, x: Row, x_type: FloatType, threads: int = 1, in_place: bool = False) -> Floats:
    """With `in_place` the weights are read where they lie, not from a copy."""
    rows, d = len(x), len(weights)
    w, out = _Area(weights[None], offset=1, gap=5), _Area.empty(1, rows, d)
    address, row = (weights.ctypes.data, weights.strides[0]) if in_place else (w.address, w.row)
    fields = {"weights": address, "weights_row": row, "d": d} | out.fields("y")
    if weight_type == FloatType.F32:
        source = _Area(x[None])
        return _run_products(_MATMUL[weight_type], rows, threads, out.rows, **source.fields("x"), n=x.shape[1], **fields)
    p = _packed(x[None], x_type, threads, always_rows=d % 8 != 0)
    fields |= {"panels": p.rows.ctypes.data, "panels_row": p.row, "tiles": p.tiles.ctypes.data, "tile_stride": p.tile}
    read, scratch = functools.partial(out.rows, whole_tiles=True), tile_scratch_bytes(p.n_blocks)
    return _run_products(_MATMUL[weight_type], rows, threads, read, scratch, **fields, n_blocks=p.n_blocks)


def expert_matmul(
    weights: Row, weight_type: FloatType, x: Row, x_type: FloatType, active: npt.NDArray[np.integer], threads: int = 1
) -> Floats:
    n_experts, d = weights.shape[:2]
    k, rows = x.shape[:2]
    w, out, indexes = _Area(weights, offset=1, gap=5), _Area.empty(k, rows, d), active.astype(np.int64)
    fields = {"weights": w.address, "weights_row": w.row, "weights_expert": w.plane, "d": d} | out.fields("y", True)
    fields |= {"indexes": indexes.ctypes.data, "k": k, "n_experts": n_experts}
    if weight_type == FloatType.F32:
        source = _Area(x)
        operand, row = source.fields("x", True) | {"n": x.shape[2]}, 4 * x.shape[2]
    else:
        p = _packed(x, x_type, threads, always_rows=True)
        operand, row = {"x": p.rows.ctypes.data, "x_row": p.row, "x_plane": p.plane, "n": p.n_blocks}, p.row
    return _run_products(_EXPERTS[weight_type], rows, threads, out.read, experts_scratch_bytes(row), **operand, **fields)


def rope(x: Floats, table: Floats, rope_type: RopeType, threads: int = 1) -> Floats:
    rows, n = x.shape
    area, positions = _Area(x[None]), np.arange(rows, dtype=np.float32)
    kind = Kind.ROPE_HALVES if rope_type == RopeType.FALCON else Kind.ROPE_NEIGHBOURS
    angles = np.ascontiguousarray(table)
    fields = {"n": n, "head_dim": 2 * table.shape[1], "table": angles.ctypes.data, "positions": positions.ctypes.data}
    _run(kind, rows, threads, **area.fields("x"), **fields)
    return area.rows()


def _cache(cache: Row, head_dim: int, cache_type: FloatType) -> Row:
    """[positions, kv_dim values or their blocks] -> [KV head, whole chunks of positions, a head's], stale where nothing was written."""
    heads = cache.reshape(len(cache), -1, row_bytes(cache_type, head_dim) // cache.itemsize).swapaxes(0, 1)
    out = np.full((len(heads), -(-len(cache) // CHUNK) * CHUNK, heads.shape[2] * cache.itemsize), _NAN_BYTE, np.uint8).view(cache.dtype)
    out[:, : len(cache)] = heads
    return out


def shift(
    cache: Row,
    x: Floats,
    positions: npt.NDArray[np.integer],
    cache_type: FloatType = FloatType.F32,
    threads: int = 1,
    head_dim: int = 8,
) -> None:
    memory, source = _cache(cache, head_dim, cache_type), _Area(x[None])
    places = positions.astype(np.float32)
    fields = {"n": x.shape[1], "head_dim": head_dim, "cache": memory.ctypes.data, "head_stride": memory.strides[0]}
    fields |= {"positions": places.ctypes.data, "cache_type": int(cache_type)}
    _run(Kind.SHIFT, len(x), threads, **source.fields("x"), **fields)
    cache[...] = memory[:, : len(cache)].swapaxes(0, 1).reshape(cache.shape)
    assert (np.ascontiguousarray(memory[:, len(cache) :]).view(np.uint8) == _NAN_BYTE).all()


def attention(
    q: Floats,
    keys: Row,
    values: Row,
    positions: npt.NDArray[np.integer],
    head_dim: int,
    group: int,
    cache_type: FloatType = FloatType.F32,
    threads: int = 1,
    max_chunks: int = 0,
) -> Floats:
    """max_chunks: of a cache with room for more positions than it has here."""
    rows, width = q.shape
    heads = width // head_dim
    k, v = (_cache(cache, head_dim, cache_type) for cache in (keys, values))
    chunks = max_chunks or k.shape[1] // CHUNK
    n_kv = -(-heads // group)
    source, out, places = _Area(q[None]), _Area.empty(1, rows, width), positions.astype(np.float32)
    parts, stats = np.full(n_kv * chunks * group * head_dim, np.nan, np.float32), np.full(2 * n_kv * chunks * group, np.nan, np.float32)
    fields = source.fields("q") | out.fields("y") | {"n_heads": heads, "group": group, "head_dim": head_dim}
    fields |= {"keys": k.ctypes.data, "values": v.ctypes.data, "head_stride": k.strides[0], "positions": places.ctypes.data}
    fields |= {"parts": parts.ctypes.data, "stats": stats.ctypes.data, "max_chunks": chunks, "cache_type": int(cache_type)}
    instructions = [_record(Kind.ATTEND, fields), _record(Kind.BARRIER, {}), _record(Kind.FOLD, fields)]
    run_all(instructions, rows, threads, attention_scratch_bytes(group, head_dim, chunks))
    return out.rows()


def softmax(x: Floats, threads: int = 1) -> Floats:
    area = _Area(x[None])
    _run(Kind.SOFTMAX, len(x), threads, **area.fields("x"), n=x.shape[1])
    return area.rows()


def moe_gate(x: Floats, k: int, normalise: bool, threads: int = 1) -> tuple[npt.NDArray[np.int64], Floats]:
    rows, n = x.shape
    source, weights, indexes = _Area(x[None]), _Area.empty(k, rows, 1), np.zeros((rows, k), np.int64)
    fields = source.fields("x") | weights.fields("weights", True) | {"indexes": indexes.ctypes.data}
    _run(Kind.GATE, rows, threads, **fields, n=n, k=k, normalise=int(normalise))
    return indexes, np.ascontiguousarray(weights.read()[..., 0].T)


@kernel
def _exp_each(x, n, out):  # type: ignore[no-untyped-def]  # addresses: numba reads the types off the call
    for i in range(n):
        store_f(out + 4 * i, exp_one(load_f(x + 4 * i)))


def exp(x: Floats) -> Floats:
    out = np.empty_like(x)
    _exp_each(x.ctypes.data, x.size, out.ctypes.data)
    return out
