"""RoPE tables of a program: one for each kind of frequencies and head size, shared by all layers."""

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.rope import rope_table
from dairllm.graph.types import NodeConfig, RopeConfig

__all__ = ["RopeTables", "table_bytes"]

_Key = tuple[int, int, int, float, float, float, float, int]


def _key(c: RopeConfig) -> _Key:
    return (int(c.type), c.head_dim, c.seq_len, c.theta, c.scaling_factor, c.low_freq_factor, c.high_freq_factor, c.orig_max_seq_len)


def table_bytes(node: NodeConfig) -> int:
    """Bytes of all tables that a node's ops need: [seq_len][head_dim / 2][2] F32 each."""
    keys = {_key(op.config) for segment in node.segments for op in segment.ops if isinstance(op.config, RopeConfig)}
    return sum(4 * head_dim * seq_len for _, head_dim, seq_len, *_ in keys)


class RopeTables:
    """Tables by configuration, made when first asked for."""

    def __init__(self) -> None:
        self._tables: dict[_Key, NDArray[np.float32]] = {}

    def address(self, c: RopeConfig) -> int:
        """Address of a table [seq_len][head_dim / 2][2] of (cos, sin)."""
        key = _key(c)
        if key not in self._tables:
            self._tables[key] = rope_table(c)
        return self._tables[key].ctypes.data
