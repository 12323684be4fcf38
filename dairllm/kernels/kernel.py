"""What a kernel is compiled with: no interpreter lock, and no exception.

An exception in the middle of a call would leave the other threads waiting at a barrier for ever. So arithmetic never raises: what is
divided by zero is infinite or NaN, as docs/arithmetic.md says, and so is any other number that comes of numbers. Kernels use no `range`
whose step is a variable, and no other thing of Python's that checks something and raises.
"""

from typing import Any

from numba import njit

__all__ = ["OPTIONS", "kernel"]

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
"""For whatever compiles kernels: a function has the error model of what it is compiled with."""

kernel = njit(**OPTIONS)
"""Decorator: a function that other kernels call."""
