"""What every kernel owes: the bits of the definition with any number of threads, and its numpy twin's value within its own rounding."""

from typing import Any

import numpy as np
import numpy.typing as npt

from dairllm.kernels import reference
from tests.kernels import compiled, exact

__all__ = ["THREADS", "assert_close", "assert_same_bits", "bytes_of", "check"]

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
