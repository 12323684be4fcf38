"""The interpreter that every compute thread runs: instructions in, numbers out, no Python.

`run_threads` is a resident thread's whole life: it waits at its mailbox, runs what it is handed, meets the others and
waits again, spinning for some tens of microseconds before it sleeps. The host writes the call into the mailboxes and
rings. Thread 0 has a mailbox of its own, since there are two ways to run: either its resident is rung too, and signals
the eventfd when all are done, which an event loop can wait for; or the host takes the part of thread 0 itself, as a
guest, and has the result when it returns: that saves two threads' awakening, 50 to 100 microseconds.

Where a thread will not come any more, the host breaks the barriers of the call: the others leave it at the next one, and say nothing.

Both functions here are plain until entry.py has them compiled, in this process or in another.
"""

from dairllm.kernels import attention_steps, matmul_steps, pack_steps, steps
from dairllm.kernels.instructions import INSTRUCTION_WORDS, Kind, State
from dairllm.kernels.ir import load_i, store_i
from dairllm.kernels.mailbox import MAILBOX_CALL, MAILBOX_EVENTFD, MAILBOX_SLEEPERS, MAILBOX_STOP
from dairllm.kernels.threads import atomic_load, atomic_store, barrier, clock_cycles, pause, signal_eventfd, sleep_while, wake

__all__ = ["ring", "run_threads"]

(
    BARRIER,
    EMBED,
    COPY,
    TO_BLOCKS,
    FROM_BLOCKS,
    MERGE_ADD_F32,
    MERGE_ADD_BLOCKS,
    PACK,
    PACK_BLOCKS,
    INV_RMS,
    RMS_NORM,
    MATMUL_F32,
    MATMUL_Q40,
    MATMUL_Q80,
    _,
    _,
    EXPERTS_Q80,
    ROPE_NEIGHBOURS,
    ROPE_HALVES,
    SHIFT,
    ATTEND,
    FOLD,
    SILU,
    GELU,
    MUL,
    SCALE,
    SOFTMAX,
    GATE,
    MERGE_SUM,
    RMS_NORM_PACK,
    SILU_MUL_PACK,
    GELU_MUL_PACK,
) = (int(kind) for kind in Kind)
_KINDS = len(Kind)
_INSTRUCTION_BYTES = 8 * INSTRUCTION_WORDS
_FIRST_ROW, _END_ROW, _PROFILE = (8 * int(word) for word in State)
_SPINS = 2000


def run_threads(mailbox, thread, n_threads, guest):
    """Thread `thread` of n_threads. A resident returns when it is rung with MAILBOX_STOP set, a guest after the call.

    One function, since numba optimises what it inlines once more for each function around it.
    """
    seen = 0
    while True:
        if guest == 0:
            spins = 0
            while atomic_load(mailbox) == seen:
                spins += 1
                if spins < _SPINS:
                    pause()
                else:
                    sleep_while(mailbox, mailbox + MAILBOX_SLEEPERS, seen)
            seen += 1
            if atomic_load(mailbox + MAILBOX_STOP) != 0:
                return
        c = mailbox + MAILBOX_CALL
        scratch = load_i(c + 40) + thread * load_i(c + 48)
        program, first, end, state, counter = load_i(c), load_i(c + 8), load_i(c + 16), load_i(c + 24), load_i(c + 32)
        row0, row1 = load_i(state + _FIRST_ROW), load_i(state + _END_ROW)
        profile = load_i(state + _PROFILE)
        begin = clock_cycles()
        for i in range(first, end):
            r = program + i * _INSTRUCTION_BYTES
            kind = load_i(r)
            if kind == BARRIER:
                if barrier(counter, n_threads):
                    break
            elif MATMUL_F32 <= kind <= EXPERTS_Q80:
                claimed = matmul_steps.parts_claimed(kind, r, row1 - row0, n_threads)
                n_parts = claimed if claimed else n_threads
                part = steps.claim(r, claimed, n_threads) if claimed else thread
                while part < n_parts:
                    if kind in (MATMUL_Q40, MATMUL_Q80):
                        matmul_steps.matmul(kind, r, row0, row1, part, n_parts, scratch)
                    elif kind == MATMUL_F32:
                        matmul_steps.matmul_float(r, row0, row1, part, n_parts)
                    else:
                        matmul_steps.experts(kind, r, row0, row1, part, n_parts, scratch)
                    part = steps.claim(r, claimed, n_threads) if claimed else n_parts
            elif kind in (PACK, PACK_BLOCKS, RMS_NORM_PACK, SILU_MUL_PACK, GELU_MUL_PACK):
                pack_steps.pack(kind, r, row0, row1, thread, n_threads)
            elif kind in (MERGE_ADD_F32, MERGE_ADD_BLOCKS):
                steps.merge_add(kind, r, row0, row1, thread, n_threads)
            elif kind == INV_RMS:
                steps.inv_rms(r, row0, row1, thread, n_threads)
            elif kind == RMS_NORM:
                steps.rms_norm(r, row0, row1, thread, n_threads)
            elif kind in (ROPE_NEIGHBOURS, ROPE_HALVES):
                steps.rope(kind, r, row0, row1, thread, n_threads)
            elif kind == SHIFT:
                steps.shift(r, row0, row1, thread, n_threads)
            elif kind == ATTEND:
                attention_steps.attend(r, row0, row1, n_threads, scratch)
            elif kind == FOLD:
                attention_steps.fold(r, row0, row1, thread, n_threads, scratch)
            elif kind == EMBED:
                steps.embed(r, row0, row1, thread, n_threads)
            elif kind == SOFTMAX:
                steps.soft_max(r, row0, row1, thread, n_threads)
            elif kind == GATE:
                steps.gate(r, row0, row1, thread, n_threads)
            elif kind == MERGE_SUM:
                steps.merge_sum(r, row0, row1, thread, n_threads)
            else:
                steps.map_columns(kind, r, row0, row1, thread, n_threads)
            if profile != 0:
                end_cycles = clock_cycles()
                p = profile + 8 * (thread * _KINDS + kind)
                store_i(p, load_i(p) + end_cycles - begin)
                begin = end_cycles
        broken = barrier(load_i(c + 56), n_threads)
        if guest != 0:
            return
        if thread == 0 and not broken:
            signal_eventfd(load_i(mailbox + MAILBOX_EVENTFD))


def ring(word, value):
    """Store a value in a mailbox or a barrier, and wake those who wait there.

    A mailbox's call is handed over by one more than the last time, 1 at first; a barrier is broken by BARRIER_BROKEN.
    """
    atomic_store(word, value)
    wake(word, word + MAILBOX_SLEEPERS)
