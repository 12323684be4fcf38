"""Ops on the wire: a fixed header, a name, two pointers, and a configuration whose layout depends on the op's code."""

import math
import struct
from dataclasses import astuple
from typing import Any

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.types import (
    AttentionConfig,
    InvRmsConfig,
    MatmulConfig,
    MoeGateConfig,
    MulConfig,
    NoConfig,
    Op,
    OpCode,
    OpConfig,
    RmsNormConfig,
    RopeConfig,
    RopeType,
    ScaleConfig,
    ShiftConfig,
)
from dairllm.protocol.dllama.fields import (
    POINTER,
    SIZE,
    bounded,
    enum_of,
    pointer_of,
    size_of,
    string_of,
    write_pointer,
    write_size,
    write_string,
)
from dairllm.protocol.dllama.limits import Limits
from dairllm.protocol.stream import Need, Parser

__all__ = ["config_bytes", "read_op", "write_op"]

_OP_START = struct.Struct("<II")  # code, layer; then the weight's size
_OP_LENGTHS = struct.Struct("<II")  # bytes of the configuration, bytes of the name
_OP_HEADER = _OP_START.size + SIZE.size + _OP_LENGTHS.size

# The fields of each dataclass, in its order, are the wire's.
_PLAIN: dict[OpCode, tuple[type[OpConfig], struct.Struct]] = {
    OpCode.INV_RMS: (InvRmsConfig, struct.Struct("<fI")),
    OpCode.RMS_NORM: (RmsNormConfig, struct.Struct("<II")),
    OpCode.MATMUL: (MatmulConfig, struct.Struct("<III")),
    OpCode.MUL: (MulConfig, struct.Struct("<I")),
    OpCode.SCALE: (ScaleConfig, struct.Struct("<I")),
    OpCode.SHIFT: (ShiftConfig, struct.Struct("<I")),
    OpCode.MOE_GATE: (MoeGateConfig, struct.Struct("<III")),
    OpCode.MULTIHEAD_ATT: (AttentionConfig, struct.Struct("<12I")),
}
_ROPE = struct.Struct("<4I3fI 11If")  # then the size of the cache
_ROPE_BYTES = _ROPE.size + SIZE.size
_ROPE_N_FIELDS = 20
_FALCON_UNINITIALISED = (9, 10, 11, 14, 15)  # q_dim_start, q_dim_end, q_shift, kv_dim_start, slice_dim
_EMPTY = b"\0"  # an empty C++ struct takes one byte


def config_bytes(code: OpCode) -> int:
    """Bytes of the configuration of an op of this code."""
    if code == OpCode.ROPE:
        return _ROPE_BYTES
    return _PLAIN[code][1].size if code in _PLAIN else len(_EMPTY)


def write_op(op: Op) -> bytes:
    """Raises LocalProtocolError where the configuration is another op's."""
    config = _write_config(op.code, op.config)
    name = write_string(op.name)
    return b"".join(
        (
            _OP_START.pack(op.code, op.index),
            write_size(op.weight_size),
            struct.pack("<I", len(config)),
            name,
            write_pointer(op.input),
            write_pointer(op.output),
            config,
        )
    )


def read_op(limits: Limits, what: str) -> Parser[Op]:
    header = yield Need(_OP_HEADER, what)
    code_number, layer = _OP_START.unpack_from(header)
    config_size, name_size = _OP_LENGTHS.unpack_from(header, _OP_START.size + SIZE.size)
    code = enum_of(OpCode, code_number, f"the code of {what}")
    expected = config_bytes(code)
    if config_size != expected and not (config_size == 0 and expected == len(_EMPTY)):
        raise RemoteProtocolError(f"{what}: expected {expected} bytes of {code.name} configuration, found {config_size}")
    bounded(name_size, 2, limits.max_string_bytes, f"the length of the name of {what}")
    rest = yield Need(name_size + 2 * POINTER.size + config_size, f"name, pointers and configuration of {what}")
    name, _ = string_of(rest[:name_size], f"the name of {what}")
    what = f"{name} ({what})"
    config_at = name_size + 2 * POINTER.size
    return Op(
        code,
        name,
        layer,
        pointer_of(rest[name_size : name_size + POINTER.size], f"the input of {what}"),
        pointer_of(rest[name_size + POINTER.size : config_at], f"the output of {what}"),
        size_of(header[_OP_START.size : _OP_START.size + SIZE.size], limits, f"the weight of {what}"),
        _config_of(code, rest[config_at:], limits, what),
    )


def _write_config(code: OpCode, config: OpConfig) -> bytes:
    kind, layout = _PLAIN.get(code, (RopeConfig, _ROPE) if code == OpCode.ROPE else (NoConfig, None))
    if type(config) is not kind:
        raise LocalProtocolError(f"an op {code.name} is configured by {kind.__name__}, not {type(config).__name__}")
    if isinstance(config, RopeConfig):
        numbers = [getattr(config, name) for name in RopeConfig.__slots__][:_ROPE_N_FIELDS]
        return _ROPE.pack(*numbers) + write_size(config.cache_size)
    return layout.pack(*astuple(config)) if layout else _EMPTY


def _config_of(code: OpCode, raw: bytes, limits: Limits, what: str) -> OpConfig:
    if code == OpCode.ROPE:
        return _rope_of(raw, limits, what)
    if code not in _PLAIN:
        return NoConfig()
    kind, layout = _PLAIN[code]
    fields = layout.unpack(raw)
    _all_finite(fields, what)
    return kind(*fields)


def _rope_of(raw: bytes, limits: Limits, what: str) -> RopeConfig:
    fields = list(_ROPE.unpack_from(raw))
    _all_finite(tuple(fields), what)
    rope_type = enum_of(RopeType, fields[0], f"the rope type of {what}")
    if rope_type == RopeType.FALCON:
        for position in _FALCON_UNINITIALISED:
            fields[position] = 0
    bounded(fields[1], 0, 1, f"whether {what} turns q")
    values: list[Any] = [rope_type, *fields[1:], size_of(raw[_ROPE.size :], limits, f"the rope cache of {what}")]
    return RopeConfig(*values)


def _all_finite(fields: tuple[float, ...], what: str) -> None:
    for value in fields:
        if not math.isfinite(value):
            raise RemoteProtocolError(f"expected finite numbers in the configuration of {what}, found {value}")
