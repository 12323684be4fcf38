"""Sizes of the memory that kernels work on, known without the kernels, whose modules bring their compiler along."""

__all__ = [
    "BARRIER_BROKEN",
    "BARRIER_BYTES",
    "BARRIER_SLEEPERS",
    "CHUNK",
    "EXPERT_COLUMNS",
    "EXPERT_STRIP",
    "MAX_TILE_ROWS",
    "attention_rows_together",
    "attention_scratch_bytes",
    "experts_scratch_bytes",
    "tile_scratch_bytes",
]

BARRIER_BYTES, BARRIER_SLEEPERS = 192, 128
"""A barrier: arrivals at 0; sleepers, where a mailbox has them too, so that both are rung alike."""

BARRIER_BROKEN = 1 << 62
"""So many arrivals at least: whoever comes goes on, since one that is waited for will not come."""

CHUNK = 64
"""Positions of a chunk of attention. Caches are padded to whole chunks."""

MAX_TILE_ROWS = 8
"""Weight rows of a tile, in the form of the kernels that has most."""


def tile_scratch_bytes(n_blocks: int) -> int:
    """Scratch of one thread: unpacked bytes and scales of a tile's weight rows, `n_blocks` blocks each."""
    return n_blocks * (32 + 4) * MAX_TILE_ROWS


EXPERT_COLUMNS = 8
"""Rows of a batch that go through an expert together: what the row kernels take at once."""

EXPERT_STRIP = 64
"""Weight rows of an expert whose outputs are put together before they go to their rows."""


def experts_scratch_bytes(row_bytes: int) -> int:
    """Scratch of one thread: rows (or their panels) of so many bytes that go through one expert together, outputs, and whose they are."""
    return EXPERT_COLUMNS * (row_bytes + 4 * EXPERT_STRIP + 8)


def attention_rows_together(group: int, head_dim: int, max_chunks: int) -> int:
    """Rows of a batch that one thread takes through a chunk together: 4, fewer where their parts would take more than 4 MiB."""
    return min(4, max(1, (4 << 20) // (4 * group * max_chunks * head_dim)))


def attention_scratch_bytes(group: int, head_dim: int, max_chunks: int) -> int:
    """Scratch of one thread: coefficients, a chunk as values, scores, then parts and statistics of some rows' chunks of one KV head."""
    rows = attention_rows_together(group, head_dim, max_chunks)
    padded = -(-max_chunks // 16) * 16
    return 4 * (padded + CHUNK * head_dim + rows * group * (CHUNK + max_chunks * (head_dim + 2))) + 64
