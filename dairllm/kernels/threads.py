"""How compute threads meet without Python: atomics, a barrier and sleeping on a futex.

A thread spins for some tens of microseconds and then sleeps. Spinning on would be ruinous where the cores are shared
with other work (a token took 13 times as long), and so would be sched_yield, which leaves the core to the other process
for a whole time slice; a sleeper is put back as soon as it is woken.
"""

import platform

from llvmlite import ir
from numba.core import cgutils

from dairllm.kernels.ir import I32, I64, VOID, Builder, Value, call, i64, ir_function, k64, void
from dairllm.kernels.kernel import kernel
from dairllm.kernels.sizes import BARRIER_BROKEN, BARRIER_SLEEPERS

__all__ = [
    "SPINS",
    "atomic_add",
    "atomic_load",
    "atomic_store",
    "barrier",
    "clock_cycles",
    "pause",
    "signal_eventfd",
    "sleep_while",
    "wake",
]

SPINS = 1000
_X86 = platform.machine() in ("x86_64", "AMD64")
_FUTEX = {"x86_64": 202, "AMD64": 202, "aarch64": 98}.get(platform.machine())
_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, private to the process


@ir_function(i64, i64, i64)
def atomic_add(b: Builder, p: Value, v: Value) -> Value:
    return b.atomic_rmw("add", b.inttoptr(p, I64.as_pointer()), v, "seq_cst")


@ir_function(i64, i64)
def atomic_load(b: Builder, p: Value) -> Value:
    return b.load_atomic(b.inttoptr(p, I64.as_pointer()), "seq_cst", 8)


@ir_function(void, i64, i64)
def atomic_store(b: Builder, p: Value, v: Value) -> None:
    b.store_atomic(v, b.inttoptr(p, I64.as_pointer()), "seq_cst", 8)


@ir_function(void)
def pause(b: Builder) -> None:
    if _X86:
        call(b, "llvm.x86.sse2.pause", VOID, [])


@ir_function(i64)
def clock_cycles(b: Builder) -> Value:
    return call(b, "llvm.readcyclecounter", I64, [])


@ir_function(i64, i64, i64, i64)
def _futex(b: Builder, p: Value, op: Value, value: Value) -> Value:
    # Through libc's symbol and not through ctypes: numba refuses to cache what holds a ctypes pointer.
    if _FUTEX is None:
        return call(b, "sched_yield", I32, []) and k64(0)
    f = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
    return b.call(f, [k64(_FUTEX), p, op, value, k64(0), k64(0), k64(0)])


@ir_function(i64, i64)
def signal_eventfd(b: Builder, fd: Value) -> Value:
    """Adds 1 to an eventfd, which makes it readable."""
    one = cgutils.alloca_once_value(b, k64(1))
    f = cgutils.get_or_insert_function(b.module, ir.FunctionType(I64, [I32, I64, I64]), "write")
    return b.call(f, [b.trunc(fd, I32), b.ptrtoint(one, I64), k64(8)])


@kernel
def sleep_while(word, sleepers, value):
    """Sleeps while the low 32 bits at `word` are those of `value`; may wake without a reason."""
    atomic_add(sleepers, 1)
    _futex(word, _WAIT, value & 0xFFFFFFFF)
    atomic_add(sleepers, -1)


@kernel
def wake(word, sleepers):
    """Wakes all who sleep on `word`; a system call only when someone does."""
    if atomic_load(sleepers) != 0:
        _futex(word, _WAKE, 1 << 30)


@kernel
def barrier(counter, n_threads):
    """Returns when all n_threads have called it, or it is broken; whether it is.

    counter: BARRIER_BYTES (sizes.py) of zeros at first, shared by all. Whoever stores BARRIER_BROKEN there breaks it for good.
    """
    if n_threads == 1:
        return atomic_load(counter) >= BARRIER_BROKEN
    seen = atomic_add(counter, 1)
    target = (seen // n_threads + 1) * n_threads
    if seen + 1 == target:
        wake(counter, counter + BARRIER_SLEEPERS)
        return seen >= BARRIER_BROKEN
    spins = 0
    while True:
        now = atomic_load(counter)
        if now >= BARRIER_BROKEN:
            return True
        if now >= target:
            return False
        spins += 1
        if spins < SPINS:
            pause()
        else:
            sleep_while(counter, counter + BARRIER_SLEEPERS, now)
