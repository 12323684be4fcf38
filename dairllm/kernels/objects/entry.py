"""The functions by which Python enters the kernels: `run_threads` and `ring` of interpreter.py, compiled.

They are object code, shipped, kept from an earlier start or made by another process, in memory without the compiler that made it. Where it
cannot be loaded, numba compiles in this process: 100 MB more, the same numbers.
"""

import ctypes
import platform
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dairllm.errors import EngineError
from dairllm.kernels.objects import targets
from dairllm.kernels.objects.cache import ObjectCodeCache, Objects, numba_folder
from dairllm.kernels.objects.compiler import SIGNATURES, compile_objects
from dairllm.kernels.objects.loader import ObjectCode, ObjectCodeError
from dairllm.machine import give_back_libraries

__all__ = ["Entry", "load_entry"]

_loaded: "Entry | None" = None
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Entry:
    """What the kernels offer. Both are called without the interpreter lock.

    Attributes:
        run_threads: (mailbox, thread, n_threads, guest), see interpreter.py.
        ring: (address of a mailbox or a barrier, value), see interpreter.py.
        why_numba: why numba had to be loaded into this process; None where it was not.
    """

    run_threads: Callable[[int, int, int, int], None]
    ring: Callable[[int, int], None]
    why_numba: str | None


def load_entry() -> Entry:
    """The entry of this process, in its form. Compiles where nobody has: half a minute, once.

    Raises:
        EngineError: there is not enough memory to compile.
    """
    global _loaded
    with _loading:
        if _loaded is None:
            try:
                _loaded = _called_as_c(_objects())
            except ObjectCodeError as error:
                _loaded = _compiled_here(str(error))
        return _loaded


def _objects() -> Objects:
    target = targets.current()
    if target is None:
        raise ObjectCodeError(f"there is no object code for {platform.machine()}")
    cache = ObjectCodeCache(target)
    objects = cache.read()
    if objects is None:
        with cache.alone():
            objects = cache.read()  # whoever was waited for has compiled them
            if objects is None:
                objects = compile_objects(target)
                cache.write(objects)
    return objects


def _called_as_c(objects: Objects) -> Entry:
    """numba's convention: addresses where a result and an exception would be put, then the arguments; returns a status."""
    enter, ring_up = (_function(objects, name, signature.count("int64")) for name, signature in SIGNATURES.items())
    put = ctypes.cast((ctypes.c_int64 * 8)(), ctypes.c_void_p)  # keeps them alive

    def run_threads(mailbox: int, thread: int, n_threads: int, guest: int) -> None:
        if enter(put, put, mailbox, thread, n_threads, guest):
            raise EngineError("the kernels raised an exception")

    def ring(word: int, value: int) -> None:
        if ring_up(put, put, word, value):
            raise EngineError("the kernels raised an exception")

    return Entry(run_threads, ring, None)


def _function(objects: Objects, name: str, n_args: int) -> Any:
    symbol, raw = objects.get(name, ("", b""))
    code = ObjectCode(raw, f"object code of {name}")
    # all as addresses, which is how ctypes passes an int of 64 bits fastest
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * (2 + n_args))(code.function(symbol))
    function.code = code  # type: ignore[attr-defined] # which must live as long
    return function


def _compiled_here(why: str) -> Entry:
    from numba import njit
    from numba.core import config

    from dairllm.kernels import interpreter
    from dairllm.kernels.kernel import OPTIONS

    folder = numba_folder()
    if folder is not None:
        numba: Any = config  # it sets its attributes dynamically
        numba.CACHE_DIR = str(folder)
    functions = {
        name: njit([signature], cache=folder is not None, **OPTIONS)(getattr(interpreter, name)) for name, signature in SIGNATURES.items()
    }
    give_back_libraries()  # numba and LLVM have done what they were loaded for
    return Entry(functions["run_threads"], functions["ring"], why)
