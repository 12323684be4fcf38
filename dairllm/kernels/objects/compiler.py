"""Compiling the kernels in a process of its own, which ends when it has: numba and LLVM would take 100 MB of this one for good.

The other process is this module's `main`. It says nothing but a file of objects (objects/cache.py), to its standard output. It runs
none of what it compiles, so this processor need not be able to.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from dairllm import machine
from dairllm.errors import EngineError
from dairllm.kernels import forms
from dairllm.kernels.objects.cache import Objects, decode, encode
from dairllm.kernels.objects.loader import ObjectCodeError
from dairllm.kernels.objects.targets import Target
from dairllm.units import format_size

__all__ = ["SIGNATURES", "compile_objects", "main"]

SIGNATURES = {"run_threads": "void(int64, int64, int64, int64)", "ring": "void(int64, int64)"}
"""The functions of dairllm.kernels.interpreter by which Python enters the kernels."""

_PROGRAM = "import sys; sys.path[:] = sys.argv[3:]; from dairllm.kernels.objects.compiler import main; main(*sys.argv[1:3])"
_LEAST_MEMORY = 210 << 20
"""Of the other process, whose peak is 235 MiB: with 205 it still takes as long as with 400; with 200 it reads its libraries again and again
and has not ended after five times as long."""
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def compile_objects(target: Target) -> Objects:
    """A target's objects; some ten seconds, and 235 MiB of the other process.

    Raises:
        ObjectCodeError: the compiler cannot be run, fails, or says something else.
        EngineError: there is not enough memory for it, or it was killed.
    """
    free = machine.free_memory_bytes()
    if free < _LEAST_MEMORY:
        raise EngineError(
            f"compiling the kernels takes {format_size(_LEAST_MEMORY)} of memory, and {format_size(free)} are free here: raise the limit "
            "for the first start, or run `dairllm kernels --compile` outside of it, or use an image that has them (docs/operating.md)"
        )
    command = [sys.executable, "-c", _PROGRAM, target.form, str(os.getpid()), *sys.path]
    # what else there is for numba in the environment would make other code
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"NUMBA_CPU_NAME": target.level, "NUMBA_CPU_FEATURES": target.features}
    try:
        # a session of its own: an interrupt at the terminal is for this process, with which it ends
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True, env=environment, check=False
        )
    except (OSError, ValueError) as error:
        raise ObjectCodeError(f"compiling the kernels: {sys.executable!r} cannot be run: {error}") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ", as where memory is short: it takes 235 MiB" if name == "SIGKILL" else ""
        raise EngineError(f"compiling the kernels was ended by {name}{hint}")
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ObjectCodeError(f"compiling the kernels failed: {said or f'exit code {done.returncode}'}")
    return decode(done.stdout, "what the kernels' compiler made")


def main(form: str, parent: str) -> None:
    """Compile the kernels of a form, for the target that the environment has, and write their objects to standard output."""
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != int(parent):
        return  # it ended before
    with contextlib.suppress(OSError):
        # where memory is short it is this process that the system should end, not the one that waits for it
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is said does not belong there
    forms.select(form)
    from numba import njit

    from dairllm.kernels import interpreter
    from dairllm.kernels.kernel import OPTIONS

    # What numba wraps around a function, so that Python can call it, would need numba at hand.
    bare: Any = OPTIONS | {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    objects = {}
    for name, signature in SIGNATURES.items():
        dispatcher = njit(**bare)(getattr(interpreter, name))
        dispatcher.compile(signature)
        (result,) = dispatcher.overloads.values()
        _, _, (raw, _) = result.library.serialize_using_object_code()
        objects[name] = result.fndesc.llvm_func_name, raw
    with out:
        out.write(encode(objects))
