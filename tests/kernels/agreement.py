"""What every kernel owes: the bits of the definition with any number of threads, and its numpy twin's value within its own rounding."""

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dairllm.graph.types import FloatType, row_bytes
from dairllm.kernels import reference
from tests.kernels import compiled, exact

__all__ = ["THREADS", "arrays", "assert_close", "assert_same_bits", "bytes_of", "check", "floats", "rows_of_blocks", "seeds"]

THREADS = (1, 2, 3)


def assert_same_bits(got: npt.NDArray[Any], want: npt.NDArray[Any]) -> None:
    """NaN counts as NaN, whatever its payload."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    same = bytes_of(got) == bytes_of(want)
    if got.dtype == np.float32 and not same.all():
        same = (got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))
    where = np.argwhere(~same)
    assert not len(where), f"{len(where)} differ, the first at {where[0]}: {got[tuple(where[0])]!r} for {want[tuple(where[0])]!r}"


def bytes_of(x: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(x).view(np.uint8)


def assert_close(got: npt.NDArray[np.float32], twin: npt.NDArray[np.float32], size: Any, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of `size`, what the sum's terms amount to, or of the smallest normal number."""
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - twin)
        allowed = tolerance * np.maximum(np.abs(size), np.finfo(np.float32).tiny)
    good = (error <= allowed) | (got == twin) | (np.isnan(got) & np.isnan(twin))
    assert good.all(), f"off by {np.max((error / allowed)[~good]):.2f} times what is allowed"


def check(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Demand the definition's bits with 1, 2 and 3 threads; returns (the kernel's result, its twin's)."""
    want = getattr(exact, name)(*args)
    got = None
    for threads in THREADS:
        got = getattr(compiled, name)(*args, threads=threads, **options)
        for one, other in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
            assert_same_bits(one, other)
    return got, getattr(reference, name)(*args)


seeds = st.integers(0, 2**32 - 1)

_SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1.1754944e-38, 1e-20, 1.0, -1.0, 3e4, -6e8, 1e12], np.float32)


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
