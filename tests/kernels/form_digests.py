"""A digest of what each op computes of fixed inputs, by the kernels of one form: for a process of its own, which has one form alone.

    python -m tests.kernels.form_digests FORM [--emulate]

prints a JSON object of digests. --emulate runs the quantized products of a VNNI form on any processor with AVX2: all its layouts and its
arithmetic, the one instruction that the processor may lack being put together from others.
"""

import argparse
import hashlib
import json
import mmap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np

from dairllm.graph.types import FloatType, RopeType, row_bytes
from dairllm.kernels import forms, reference
from tests.kernels.samples import defined_blocks, floats, hostile, hostile_blocks, rows_of_blocks

__all__ = ["cases", "digests"]

F32, Q40, Q80 = FloatType.F32, FloatType.Q40, FloatType.Q80


def cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(function of the arithmetic, its arguments): all ops; for products every place where a form's code differs."""
    for weight_type in (Q40, Q80):
        for blocks in (*range(1, 10), 16, 18, 33):
            for rows in (1, 4, 5, 17, 40):
                for outputs in (64, 37):
                    yield (
                        "matmul",
                        (rows_of_blocks(blocks, weight_type, outputs, blocks), weight_type, rows_of_blocks(rows, Q80, rows, blocks), Q80),
                    )
        for weight_byte in (0x00, 0x7F, 0x80, 0xFF):
            for activation_byte in (0x7F, 0x80, 0x81):
                weights, x = rows_of_blocks(1, weight_type, 32, 9), rows_of_blocks(2, Q80, 18, 9)
                for raw, byte in ((weights, weight_byte), (x, activation_byte)):
                    raw.reshape(len(raw), 9, -1)[..., 2:] = byte
                yield "matmul", (weights, weight_type, x[:1], Q80)
                yield "matmul", (weights, weight_type, x, Q80)
        experts = rows_of_blocks(3, weight_type, 4 * 40, 5).reshape(4, 40, -1)
        active = np.random.default_rng(0).integers(0, 4, (6, 2))
        yield "expert_matmul", (experts, weight_type, rows_of_blocks(4, Q80, 12, 5).reshape(2, 6, -1), Q80, active)
        yield "matmul", (rows_of_blocks(1, weight_type, 32, 5), weight_type, floats(5, 20, 160), F32)
    for n in (1, 16, 31, 100):
        for rows in (1, 7):
            yield "matmul", (floats(1, 33, n), F32, floats(2, rows, n), F32)
    yield "quantize_q80", (floats(1, 17, 9 * 32),)
    # a scale at and beside every middle of two halves
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2])
    around = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(1e9))])
    yield "quantize_q80", (np.repeat(around * np.float32(127), 32)[None],)
    every = np.full((1, 1 << 16, 34), 3, np.uint8)
    every[0, :, :2] = np.arange(1 << 16, dtype=np.uint16)[:, None].view(np.uint8)
    yield "cast", (every[:, (every[0, :, 1] & 0x7C) != 0x7C].reshape(1, -1), Q80, F32)
    yield "merge_add", (floats(1, 5, 96), rows_of_blocks(2, Q80, 5, 9), Q80)
    yield "merge_add", (floats(1, 5, 33), floats(2, 5, 99), F32)
    yield "merge_sum", (floats(1, 3, 5, 33),)
    yield "inv_rms", (floats(1, 5, 96), 1e-5, 3)
    yield "rms_norm", (floats(1, 5, 96), floats(2, 5, 3), floats(3, 32))
    for name in ("silu", "gelu"):
        yield name, (floats(1, 2, 5, 33, spread=3),)
    yield "mul", (floats(1, 5, 33), floats(2, 5, 33))
    yield "scale", (floats(1, 2, 5, 33), floats(2, 2, 5))
    yield "softmax", (floats(1, 5, 60, special=0),)
    yield "moe_gate", (np.abs(floats(1, 5, 60)), 4, True)
    table = reference.rope_table(reference.rope_frequencies(24, 10000.0), np.arange(5))
    for rope_type in (RopeType.LLAMA, RopeType.FALCON):
        yield "rope", (floats(1, 5, 72), table, rope_type)
    for rows in (1, 4):
        q, k, v = floats(1, rows, 5 * 40, special=0), floats(2, 140, 2 * 40, special=0), floats(3, 140, 2 * 40, special=0)
        yield "attention", (q, k, v, np.arange(140 - rows, 140), 40, 3)
        halves = (floats(seed, 140, 2 * 40, special=0).astype(np.float16) for seed in (2, 3))
        yield "attention", (q, *halves, np.arange(140 - rows, 140), 40, 3, FloatType.F16)
        blocks = (reference.quantize_q80(floats(seed, 140, 2 * 96, special=0)) for seed in (2, 3))
        yield "attention", (floats(1, rows, 5 * 96, special=0), *blocks, np.arange(140 - rows, 140), 96, 3, Q80)
    yield from hostile_cases()


def hostile_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """All ops with zeros, infinities, NaN, the largest and the smallest numbers."""
    for rows, n in ((1, 32), (20, 9 * 32)):
        yield "quantize_q80", (hostile(rows, rows, n),)
        yield "merge_add", (hostile(1, rows, n), hostile(2, rows, 2 * n), F32)
        yield "merge_add", (hostile(1, rows, n), hostile_blocks(2, Q80, rows, 2 * n // 32), Q80)
        yield "cast", (hostile_blocks(3, Q80, rows, n // 32), Q80, F32)
        yield "merge_sum", (hostile(4, 3 * rows, n).reshape(3, rows, n),)
        for epsilon in (0.0, 1e-5, -1.0, np.inf, np.nan):
            yield "inv_rms", (hostile(5, rows, n), epsilon, n // 32)
        yield "rms_norm", (hostile(6, rows, n), hostile(7, rows, n // 32), hostile(8, 1, 32)[0])
        for name in ("silu", "gelu", "softmax"):
            yield name, (hostile(9, rows, n),)
        yield "mul", (hostile(10, rows, n), hostile(11, rows, n))
        yield "scale", (hostile(12, 2 * rows, n).reshape(2, rows, n), hostile(13, 2, rows))
        for k, normalise in ((1, True), (4, True), (4, False)):
            yield "moe_gate", (hostile(14, rows, n), k, normalise)
        yield "matmul", (hostile(15, 9, n), F32, hostile(16, rows, n), F32)
        for weight_type in (Q40, Q80):
            weights = hostile_blocks(17, weight_type, 40, n // 32)
            yield "matmul", (weights, weight_type, hostile(18, rows, n), F32)
            yield "matmul", (weights, weight_type, hostile_blocks(19, Q80, rows, n // 32), Q80)
            active = np.random.default_rng(20).integers(0, 4, (rows, 2))
            x = hostile_blocks(21, Q80, 2 * rows, n // 32).reshape(2, rows, -1)
            yield "expert_matmul", (weights.reshape(4, 10, -1), weight_type, x, Q80, active)
        table = reference.rope_table(reference.rope_frequencies(32, 10000.0), np.arange(rows))
        for rope_type in (RopeType.LLAMA, RopeType.FALCON):
            yield "rope", (hostile(22, rows, n), table, rope_type)
    for rows in (1, 4):
        q, k, v = hostile(23, rows, 5 * 32), hostile(24, 140, 2 * 32), hostile(25, 140, 2 * 32)
        places = np.arange(140 - rows, 140)
        some = floats(26, 140, 2 * 32, special=0)
        yield "attention", (q, some, some, places, 32, 3)
        yield "attention", (q[:, ::-1].copy(), k, v, places, 32, 3)
        yield "attention", (floats(27, rows, 5 * 32), some, v, places, 32, 3)
        yield "attention", (floats(27, rows, 5 * 32), k, some, places, 32, 3)
        with np.errstate(over="ignore"):
            yield "attention", (q, some.astype(np.float16), v.astype(np.float16), places, 32, 3, FloatType.F16)
        yield "attention", (floats(28, rows, 5 * 32), *(hostile_blocks(seed, Q80, 140, 2) for seed in (29, 30)), places, 32, 3, Q80)


def digests(arithmetic: ModuleType, products_alone: bool = False) -> dict[str, str]:
    """A digest of each case's result; a NaN counts as one, whatever its payload.

    Args:
        arithmetic: dairllm.kernels.reference or a module of the same functions.
        products_alone: only products of quantized weights.
    """
    found = {}
    for number, (name, args) in enumerate(cases()):
        if products_alone and not (name.endswith("matmul") and args[1] != F32):
            continue
        with np.errstate(all="ignore"):
            results = getattr(arithmetic, name)(*args)
        digest = hashlib.sha256()
        for result in results if isinstance(results, tuple) else (results,):
            if result.dtype == np.float32:
                result = np.where(np.isnan(result), np.float32(np.nan), result)
            elif name == "quantize_q80":
                result = defined_blocks(result)
            digest.update(np.ascontiguousarray(result).tobytes())
        found[f"{number} {name} {' '.join(str(getattr(a, 'shape', a)) for a in args)}"] = digest.hexdigest()[:16]
    return found


def emulate_vnni(form: str) -> None:
    """Select a form whether or not this processor has its instructions, with vpdpbusd put together from plain ones.

    Products run without the interpreter, which takes long to compile.
    """
    forms._NEEDS[form] = forms._NEEDS["avx2"]
    forms.select(form)
    from dairllm.kernels import byte_dot, matmul_steps, pack_steps
    from dairllm.kernels.instructions import INSTRUCTION_WORDS, Kind
    from dairllm.kernels.ir import I8, I16, Builder, Value, concat, load_i, shuffle, vec
    from dairllm.kernels.kernel import kernel
    from tests.kernels import compiled

    def quads(b: Builder, acc: Value, u: Value, s: Value) -> Value:
        """Sixteen bytes at a time: narrow vectors compile in half the time."""
        u, s = (b.bitcast(v, vec(I8, 4 * acc.type.count)) for v in (u, s))
        sums = []
        for first in range(0, u.type.count, 16):
            lanes = range(first, first + 16)
            pairs = byte_dot._pairs_words(b, b.zext(shuffle(b, u, u, lanes), vec(I16, 16)), b.sext(shuffle(b, s, s, lanes), vec(I16, 16)))
            sums.append(b.add(*(shuffle(b, pairs, pairs, range(i, 8, 2)) for i in (0, 1))))
        while len(sums) > 1:
            sums = [concat(b, sums[i], sums[i + 1]) for i in range(0, len(sums), 2)]
        return b.add(acc, sums[0])

    byte_dot._quads_vnni = quads
    packs, experts = (int(Kind.PACK), int(Kind.PACK_BLOCKS)), (int(Kind.EXPERTS_Q40), int(Kind.EXPERTS_Q80))

    @kernel
    def step(instruction, rows, scratch):  # type: ignore[no-untyped-def]  # addresses: numba reads the types off the call
        kind = load_i(instruction)
        if kind in packs:
            pack_steps.pack(kind, instruction, 0, rows, 0, 1)
        elif kind in experts:
            matmul_steps.experts(kind, instruction, 0, rows, 0, 1, scratch)
        else:
            matmul_steps.matmul(kind, instruction, 0, rows, 0, 1, scratch)

    def run_all(instructions: list[list[int]], rows: int, threads: int, scratch: int = 0) -> None:
        call = compiled.Call(instructions, 1, scratch)
        program, _, _, memory = call.addresses
        for number in range(len(instructions)):
            step(program + number * 8 * INSTRUCTION_WORDS, rows, memory)

    compiled.run_all = run_all


def read_to_the_last_byte() -> None:
    """Weights that end where their mapping ends, and unmapped memory behind: who reads further is killed."""
    import ctypes

    from tests.kernels import compiled

    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    memory = np.frombuffer(mmap.mmap(-1, 4 * page), np.uint8)
    guard = ctypes.c_void_p(memory.ctypes.data + 3 * page)
    assert libc.mprotect(guard, ctypes.c_size_t(page), 0) == 0
    for weight_type, n in ((Q40, 32 * 9), (Q80, 32 * 9), (F32, 37), (Q40, 32), (Q80, 32 * 7), (F32, 16)):
        row = row_bytes(weight_type, n)
        for rows in (1, 20):
            raw = memory[3 * page - 8 * row : 3 * page]
            raw[:] = 0
            x = rows_of_blocks(1, Q80, rows, n // 32) if weight_type != F32 else floats(1, rows, n)
            compiled.matmul(raw.reshape(8, row), weight_type, x, F32 if weight_type == F32 else Q80, in_place=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("form")
    parser.add_argument("--emulate", action="store_true")
    options = parser.parse_args()
    if options.emulate:
        emulate_vnni(options.form)
    else:
        forms.select(options.form)
    from tests.kernels import compiled

    if not options.emulate:
        read_to_the_last_byte()
    print(json.dumps(digests(compiled, products_alone=options.emulate)))  # noqa: T201  # what this program is for


if __name__ == "__main__":
    main()
