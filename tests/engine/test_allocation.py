"""Large memory is the system's own: given back with its last view, and refused as Python refuses memory."""

import gc
import mmap
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dairllm import machine
from dairllm.engine.allocation import aligned, sparse

MEBIBYTE = 1 << 20
Allocate = Callable[[int], NDArray[np.uint8]]


@pytest.mark.parametrize("nbytes", [1, 64, 1000, 65_535, 65_536, 65_537, 5 * MEBIBYTE + 1])
@pytest.mark.parametrize("allocate", [aligned, sparse])
def test_zeroed_bytes_on_a_cache_line(allocate: Allocate, nbytes: int) -> None:
    memory = allocate(nbytes)
    assert memory.shape == (nbytes,)
    assert memory.ctypes.data % 64 == 0
    assert not memory.any()
    memory[-1] = 7
    assert memory[-1] == 7


@pytest.mark.parametrize("allocate", [aligned, sparse])
def test_what_was_given_up_is_the_systems_again(allocate: Allocate) -> None:
    """At any size, with what was allocated later still in use: the C library's heap would keep it."""
    gc.collect()
    kept = []
    before = machine.rss_bytes()
    for mebibytes in (1, 24, 2, 20, 8, 24):
        memory = allocate(mebibytes * MEBIBYTE)
        memory[:: mmap.PAGESIZE] = 1
        view = memory[5:].view()
        kept.append(allocate(128))
        assert machine.rss_bytes() - before > (mebibytes - 1) * MEBIBYTE
        del memory
        assert view[-1] == 0, "it is there while a view is"
        del view
        assert machine.rss_bytes() - before < MEBIBYTE


@pytest.mark.parametrize("allocate", [aligned, sparse])
@pytest.mark.parametrize("nbytes", [1 << 60, 1 << 70])
def test_memory_that_there_is_not_is_refused_as_such(allocate: Allocate, nbytes: int) -> None:
    with pytest.raises(MemoryError, match=f"no {nbytes} bytes"):
        allocate(nbytes)
