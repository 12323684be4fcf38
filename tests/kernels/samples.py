"""Inputs for tests of kernels. Imports no kernel, since importing one chooses the process's form."""

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dairllm.graph.types import FloatType, row_bytes

__all__ = ["HOSTILE", "arrays", "defined_blocks", "floats", "hostile", "hostile_blocks", "rows_of_blocks", "seeds"]

seeds = st.integers(0, 2**32 - 1)

_SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.1754944e-38, 1e-20, 1.0, -1.0, 3e4, -6e8, 1e12], np.float32)

HOSTILE = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 2e19, 1.0], np.float32)
"""Zeros, infinities, NaN, numbers whose squares or sums are too large, and subnormal ones."""


def hostile(seed: int, rows: int, n: int) -> npt.NDArray[np.float32]:
    """float32 [rows, n]: rows of one hostile value alone, of several, and of ordinary values with one among them."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, n)).astype(np.float32)
    for row in values:
        match rng.integers(0, 4):
            case 0:
                row[:] = rng.choice(HOSTILE)
            case 1:
                row[:] = rng.choice(rng.choice(HOSTILE, 3), n)
            case 2:
                row[:] = np.where(rng.random(n) < 0.1, rng.choice(HOSTILE, n), row)
            case _:
                row[rng.integers(0, n)] = rng.choice(HOSTILE)
    return values


def hostile_blocks(seed: int, float_type: FloatType, rows: int, blocks: int) -> npt.NDArray[np.uint8]:
    """As `rows_of_blocks`, with scales that are infinite, NaN, subnormal or the largest."""
    raw = rows_of_blocks(seed, float_type, rows, blocks).reshape(rows, blocks, -1)
    rng = np.random.default_rng(seed)
    scales = rng.choice(np.array([np.inf, -np.inf, np.nan, 65504, 6e-8, 0, -0.0, 1], np.float16), (rows, blocks))
    where = rng.random((rows, blocks)) < rng.choice([0.05, 0.5], (rows, 1))
    raw[where, :2] = scales[where][..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def defined_blocks(raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Q80 blocks with one NaN for all, whose sign and payload are not defined."""
    blocks = raw.reshape(*raw.shape[:-1], -1, row_bytes(FloatType.Q80, 32)).copy()
    nan = np.isnan(np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0])
    blocks[nan, :2] = np.float16([np.nan]).view(np.uint8)
    return blocks.reshape(raw.shape)


def floats(seed: int, *shape: int, spread: float = 1.0, special: float = 0.1) -> npt.NDArray[np.float32]:
    """Normal values over several magnitudes, some of them zeros, subnormal or large."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * spread * 2.0 ** rng.integers(-6, 7, shape)
    return np.where(rng.random(shape) < special, rng.choice(_SPECIAL, shape), values).astype(np.float32)


def rows_of_blocks(seed: int, float_type: FloatType, rows: int, blocks: int) -> npt.NDArray[np.uint8]:
    """uint8 [rows, bytes]: any bytes, -128 among them; scales of any size but infinite ones."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows, blocks, row_bytes(float_type, 32)), np.uint8)
    raw[rng.random(raw.shape) < 0.05] = 0x80
    scale = (rng.standard_normal((rows, blocks)) * 2.0 ** rng.integers(-24, 10, (rows, blocks))).astype(np.float16)
    scale[rng.random(scale.shape) < 0.1] = 0
    raw[..., :2] = scale[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def arrays(*shape: int, limit: float = 1e18) -> st.SearchStrategy[npt.NDArray[np.float32]]:
    """float32 of any kind that is a number, up to `limit`."""
    limit = float(np.float32(limit))
    return hnp.arrays(np.float32, shape, elements=st.floats(-limit, limit, width=32, allow_subnormal=True))
