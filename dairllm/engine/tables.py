"""RoPE tables of a program: one for each kind of frequencies and head size, shared by all layers."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.area import Area
from dairllm.engine.rope import rope_table
from dairllm.graph.types import AttentionConfig, NodeConfig, RopeConfig

__all__ = ["RopeTables", "cache_positions", "table_bytes"]

_Key = tuple[int, int, int, float, float, float, float, int]


def _key(c: RopeConfig) -> _Key:
    return (int(c.type), c.head_dim, c.seq_len, c.theta, c.scaling_factor, c.low_freq_factor, c.high_freq_factor, c.orig_max_seq_len)


def cache_positions(node: NodeConfig) -> int | None:
    """Positions that the caches have room for: no table need be longer, whatever its op says. None where there is no cache."""
    ops = (op.config for segment in node.segments for op in segment.ops)
    caches = [c.key_cache_buffer for c in ops if isinstance(c, AttentionConfig)]
    return min((node.buffers[i].size.y for i in caches if 0 <= i < len(node.buffers)), default=None)


def _bounded(c: RopeConfig, positions: int | None) -> RopeConfig:
    return c if positions is None or c.seq_len <= positions else replace(c, seq_len=positions)


def table_bytes(node: NodeConfig) -> int:
    """Bytes of all tables that a node's ops need: [positions][head_dim / 2][2] F32 each."""
    positions = cache_positions(node)
    ops = (op.config for segment in node.segments for op in segment.ops)
    keys = {_key(_bounded(c, positions)) for c in ops if isinstance(c, RopeConfig)}
    return sum(4 * head_dim * seq_len for _, head_dim, seq_len, *_ in keys)


class RopeTables:
    """Tables of one node's ops, made when first asked for."""

    def __init__(self, node: NodeConfig) -> None:
        self._positions = cache_positions(node)
        self._tables: dict[_Key, NDArray[np.float32]] = {}

    def area(self, c: RopeConfig) -> Area:
        """A table [positions][head_dim / 2][2] of (cos, sin).

        Raises:
            GraphError: numbers that no rotation can have.
        """
        c = _bounded(c, self._positions)
        key = _key(c)
        if key not in self._tables:
            self._tables[key] = rope_table(c)
        return Area.of(f"a table of {c.seq_len} positions", self._tables[key])
