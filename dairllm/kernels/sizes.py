"""Sizes of the memory that kernels work on, known without the kernels, whose modules bring their compiler along."""

__all__ = ["BARRIER_BYTES", "CHUNK", "MAX_TILE_ROWS", "attention_scratch_bytes", "tile_scratch_bytes"]

BARRIER_BYTES = 128
"""A barrier: arrivals at 0; sleepers at 64, on a cache line of their own."""

CHUNK = 64
"""Positions of a chunk of attention. Caches are padded to whole chunks."""

MAX_TILE_ROWS = 8
"""Weight rows of a tile, in the form of the kernels that has most."""


def tile_scratch_bytes(n_blocks: int) -> int:
    """Scratch of one thread: unpacked bytes and scales of a tile's weight rows, `n_blocks` blocks each."""
    return n_blocks * (32 + 4) * MAX_TILE_ROWS


def attention_scratch_bytes(group: int, head_dim: int, max_chunks: int) -> int:
    """Scratch of one thread: scores, coefficients, then statistics and parts of one KV head's chunks."""
    padded = -(-max_chunks // 16) * 16
    return 4 * (group * CHUNK + padded + 2 * group * max_chunks + group * max_chunks * head_dim) + 64
