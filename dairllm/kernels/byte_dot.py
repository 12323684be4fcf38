"""Products of bytes, the one place where the forms differ: weights (Q40 nibbles 0..15, Q80 int8) times Q80 activations,
summed over a block, exactly, in integers.

A *group* is eight blocks of one weight row against a row panel; its sums end as <8 x i32>, lane = block. A *tile
block* is one block of several weight rows against the 16 columns of a tile panel; its sums end as i32 vectors whose
lanes are columns. Being exact, the sums are the same whatever the instruction.
"""

from collections.abc import Callable, Sequence

from llvmlite import ir

from dairllm.kernels import forms
from dairllm.kernels.ir import I8, I16, I32, Builder, Value, at, broadcast, call, concat, halves, interleave_sum, load, shuffle, splat, vec

__all__ = [
    "Q80_SCRATCH_XOR",
    "TILE_LANES",
    "TILE_ROWS",
    "group_q40",
    "group_q80",
    "nibbles",
    "pair_q40",
    "pair_q80",
    "tile_q40",
    "tile_q80",
]

FORM = forms.current()
_VNNI = FORM in ("avxvnni", "avx512vnni")
_WIDE = FORM == "avx512vnni"

TILE_LANES = 16 if _WIDE else 8
"""Columns of one vector of a tile."""
TILE_ROWS = 8 if _WIDE else 4
"""Weight rows of a tile: as many accumulators as hide the latency of the dot product and fit the registers."""
Q80_SCRATCH_XOR = 0x80 if _VNNI else 0
"""vpdpbusd multiplies unsigned by signed: Q80 weights are unpacked for it with 128 added, which the seed takes away again."""

Address = Callable[[int], Value]


def nibbles(b: Builder, packed: Value) -> tuple[Value, Value]:
    """<n x i8> of nibble pairs -> (the low ones: values 0..15 of each block, the high ones: values 16..31)."""
    n = packed.type.count
    fifteen = splat(I8, n, 15)
    high = b.bitcast(b.lshr(b.bitcast(packed, vec(I16, n // 2)), splat(I16, n // 2, 4)), vec(I8, n))
    return b.and_(packed, fifteen), b.and_(high, fifteen)


# --------------------------------------------------------------------------------------------------------------------- the instructions
def _pairs_unsigned(b: Builder, u: Value, s: Value) -> Value:
    """<32 x i8> unsigned x signed -> <16 x i16>, sums of two products. Never saturates here: u <= 15, or u <= 128 and |s| <= 127."""
    return call(b, "llvm.x86.avx2.pmadd.ub.sw", vec(I16, 16), [u, s])


def _pairs_words(b: Builder, x: Value, y: Value) -> Value:
    """<16 x i16> x <16 x i16> -> <8 x i32>, sums of two products."""
    return call(b, "llvm.x86.avx2.pmadd.wd", vec(I32, 8), [x, y])


def _widen(b: Builder, x: Value) -> Value:
    """<16 x i16> -> <8 x i32>, sums of neighbours."""
    return _pairs_words(b, x, splat(I16, 16, 1))


def _quads_vnni(b: Builder, acc: Value, u: Value, s: Value) -> Value:
    """acc <n x i32> + sums of four products, unsigned x signed."""
    t = acc.type
    return call(b, f"llvm.x86.avx512.vpdpbusd.{t.count * 32}", t, [acc, b.bitcast(u, t), b.bitcast(s, t)])


def _quads_plain(b: Builder, acc: Value, u: Value, s: Value, signed: bool) -> Value:
    """The same in plain IR: products of bytes fit 16 bits, sums of two as well (u <= 15, or both within -128..127 and s >= -127)."""
    n = u.type.count
    wide = vec(I16, n)
    product = b.mul(b.sext(u, wide) if signed else b.zext(u, wide), b.sext(s, wide))

    def every_second(x: Value, first: int) -> Value:
        return shuffle(b, x, x, range(first, x.type.count, 2))

    pairs = b.sext(b.add(every_second(product, 0), every_second(product, 1)), vec(I32, n // 2))
    return b.add(acc, b.add(every_second(pairs, 0), every_second(pairs, 1)))


# --------------------------------------------------------------------------------------------------------- one row: eight blocks a group
def _gather(b: Builder, address: Address, offset: int, blocks: Sequence[int]) -> Value:
    """16 bytes from each of these blocks, one after the other."""
    parts = [load(b, at(b, address(i), offset), vec(I8, 16)) for i in blocks]
    while len(parts) > 1:
        parts = [concat(b, parts[i], parts[i + 1]) for i in range(0, len(parts), 2)]
    return parts[0]


_PANEL_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the blocks in a row panel
_STEP = 4 if _WIDE else 2  # blocks of one register


def _fold_quads(b: Builder, sums: Sequence[Value]) -> Value:
    """Four i32 lanes a block, in panel order -> <8 x i32>, lane = block."""
    if not _WIDE:
        return interleave_sum(b, interleave_sum(b, sums[0], sums[1], b.add), interleave_sum(b, sums[2], sums[3], b.add), b.add)
    lanes = [4 * _PANEL_ORDER.index(block) for block in range(8)]
    first, second = ([lane + i for i in pair for lane in lanes] for pair in ((0, 1), (2, 3)))
    one = b.add(shuffle(b, sums[0], sums[1], first), shuffle(b, sums[0], sums[1], second))
    return b.add(*halves(b, one))


def _group_quads(b: Builder, address: Address, panel: Value, unpack: Callable[[Sequence[int]], tuple[Value, Value]], signed: bool) -> Value:
    sums = []
    for first in range(0, 8, _STEP):
        low, high = unpack(_PANEL_ORDER[first : first + _STEP])
        acc = splat(I32, 4 * _STEP, 0)
        for weights, offset in ((low, 0), (high, 128)):
            x = load(b, at(b, panel, offset + 16 * first), vec(I8, 16 * _STEP))
            acc = _quads_vnni(b, acc, weights, x) if _VNNI else _quads_plain(b, acc, weights, x, signed)
        sums.append(acc)
    return _fold_quads(b, sums)


def group_q40(b: Builder, address: Address, panel: Value) -> Value:
    """Eight blocks: sums of nibble x activation (nibbles 0..15), <8 x i32>, with the seed that makes them nibble - 8 added."""
    if FORM == "avx2":
        pairs = []
        for i in range(4):
            low, high = nibbles(b, _gather(b, address, 2, (i, i + 4)))
            x = [load(b, at(b, panel, offset + 32 * i), vec(I8, 32)) for offset in (0, 128)]
            pairs.append(_widen(b, b.add(_pairs_unsigned(b, low, x[0]), _pairs_unsigned(b, high, x[1]))))
        # |lane| <= 4 * 15 * 127 * 2: the saturating packs below never saturate, and they sum at half the cost of shuffles
        pairs = [_widen(b, _pack(b, pairs[0], pairs[1])), _widen(b, _pack(b, pairs[2], pairs[3]))]
        dots = _widen(b, _pack(b, *pairs))
    else:
        dots = _group_quads(b, address, panel, lambda blocks: nibbles(b, _gather(b, address, 2, blocks)), signed=False)
    return b.add(dots, load(b, at(b, panel, 256), vec(I32, 8)))


def group_q80(b: Builder, address: Address, panel: Value) -> Value:
    """Eight blocks: sums of int8 weight x activation, <8 x i32>."""
    if FORM == "avx2":
        sums = []
        for i in range(8):
            o = 16 * _PANEL_ORDER.index(i)
            words = [
                _pairs_words(
                    b,
                    b.sext(load(b, at(b, address(i), 2 + 16 * h), vec(I8, 16)), vec(I16, 16)),
                    b.sext(load(b, at(b, panel, o + 128 * h), vec(I8, 16)), vec(I16, 16)),
                )
                for h in (0, 1)
            ]
            sums.append(b.add(*words))
        quads = [
            interleave_sum(b, interleave_sum(b, sums[i], sums[i + 1], b.add), interleave_sum(b, sums[i + 2], sums[i + 3], b.add), b.add)
            for i in (0, 4)
        ]
        return concat(b, *(b.add(*halves(b, q)) for q in quads))

    def unpack(blocks: Sequence[int]) -> tuple[Value, Value]:
        low, high = (_gather(b, address, offset, blocks) for offset in (2, 18))
        return (_biased(b, low), _biased(b, high)) if _VNNI else (low, high)

    return _unbiased(b, _group_quads(b, address, panel, unpack, signed=True), panel)


def _biased(b: Builder, weights: Value) -> Value:
    """int8 weights as unsigned bytes, 128 added."""
    return b.xor(weights, splat(I8, weights.type.count, -128))


def _unbiased(b: Builder, dots: Value, panel: Value) -> Value:
    """Take away what the 128 brought in: 16 times the seed, which is -8 times the sum of the activations."""
    return b.add(dots, b.shl(load(b, at(b, panel, 256), vec(I32, 8)), splat(I32, 8, 4))) if _VNNI else dots


def _block_lanes(b: Builder, weights: Value, x: Value, signed: bool) -> Value:
    """Half a block, <16 x i8> times <16 x i8> -> <4 x i32> whose lanes are yet to be added."""
    zero = splat(I32, 4, 0)
    if FORM != "avx2":
        return _quads_vnni(b, zero, weights, x) if _VNNI else _quads_plain(b, zero, weights, x, signed)
    if signed:
        return b.add(*halves(b, _pairs_words(b, b.sext(weights, vec(I16, 16)), b.sext(x, vec(I16, 16)))))
    pairs = call(b, "llvm.x86.ssse3.pmadd.ub.sw.128", vec(I16, 8), [weights, x])
    return call(b, "llvm.x86.sse2.pmadd.wd", vec(I32, 4), [pairs, splat(I16, 8, 1)])


def _pair(b: Builder, panel: Value, unpack: Callable[[int], tuple[Value, Value]], signed: bool) -> Value:
    """The first two blocks of a group: their sums in lanes 0 and 1; what the other lanes hold is of no meaning."""
    sums = []
    for block in (0, 1):
        offset = 16 * _PANEL_ORDER.index(block)
        x = [load(b, at(b, panel, offset + half), vec(I8, 16)) for half in (0, 128)]
        sums.append(b.add(*(_block_lanes(b, w, y, signed) for w, y in zip(unpack(block), x, strict=True))))
    both = interleave_sum(b, sums[0], sums[1], b.add)
    both = interleave_sum(b, both, both, b.add)
    return shuffle(b, both, both, (0, 1, 2, 3, 0, 1, 2, 3))


def pair_q40(b: Builder, address: Address, panel: Value) -> Value:
    """`group_q40` of two blocks, for the end of short rows: three in ten of the time of a row of 576 values."""
    dots = _pair(b, panel, lambda block: nibbles(b, load(b, at(b, address(block), 2), vec(I8, 16))), signed=False)
    return b.add(dots, load(b, at(b, panel, 256), vec(I32, 8)))


def pair_q80(b: Builder, address: Address, panel: Value) -> Value:
    """`group_q80` of two blocks."""

    def unpack(block: int) -> tuple[Value, Value]:
        low, high = (load(b, at(b, address(block), offset), vec(I8, 16)) for offset in (2, 18))
        return (_biased(b, low), _biased(b, high)) if _VNNI else (low, high)

    return _unbiased(b, _pair(b, panel, unpack, signed=True), panel)


def _pack(b: Builder, x: Value, y: Value) -> Value:
    return call(b, "llvm.x86.avx2.packssdw", vec(I16, 16), [x, y])


# -------------------------------------------------------------------------------------------- a tile: several rows x 16 columns, one block
def _pin(b: Builder, values: Sequence[Value]) -> list[Value]:
    """An empty asm through which all these registers pass.

    Without it LLVM reorders the tile row by row and spills the activations it had loaded: a third slower.
    """
    t, n = values[0].type, len(values)
    f = ir.FunctionType(ir.LiteralStructType([t] * n), [t] * n)
    r = b.asm(f, "", ",".join(["=x"] * n + [str(i) for i in range(n)]), values, False)
    return [b.extract_value(r, i) for i in range(n)]


def _tile_seeds(b: Builder, panel: Value, shift: int) -> list[Value]:
    seeds = [load(b, at(b, panel, 512 + 4 * TILE_LANES * g), vec(I32, TILE_LANES), 4 * TILE_LANES) for g in range(16 // TILE_LANES)]
    return [b.shl(s, splat(I32, TILE_LANES, shift)) for s in seeds] if shift else seeds


def _tile_columns(b: Builder, panel: Value, k: int) -> list[Value]:
    return [load(b, at(b, panel, 64 * k + 4 * TILE_LANES * g), vec(I8, 4 * TILE_LANES), 4 * TILE_LANES) for g in range(16 // TILE_LANES)]


def _weight(b: Builder, scratch: Value, row: int, k: int) -> Value:
    """Bytes 4k..4k+3 of a row's block, in every lane."""
    return b.bitcast(broadcast(b, load(b, at(b, scratch, 32 * row + 4 * k), I32, 4), TILE_LANES), vec(I8, 4 * TILE_LANES))


def _tile_quads(b: Builder, scratch: Value, panel: Value, seeds: Sequence[Value], signed: bool) -> list[list[Value]]:
    acc = [list(seeds) for _ in range(TILE_ROWS)]
    for k in range(8):
        columns = _tile_columns(b, panel, k)
        for r in range(TILE_ROWS):
            w = _weight(b, scratch, r, k)
            acc[r] = [_quads_vnni(b, a, w, x) if _VNNI else _quads_plain(b, a, w, x, signed) for a, x in zip(acc[r], columns, strict=True)]
    return acc


def tile_q40(b: Builder, scratch: Value, panel: Value) -> list[list[Value]]:
    """One block of TILE_ROWS rows, unpacked in scratch [row][32] -> [row][column group] of <TILE_LANES x i32>, seeds included."""
    seeds = _tile_seeds(b, panel, 0)
    if FORM != "avx2":
        return _tile_quads(b, scratch, panel, seeds, signed=False)
    # the eight pair sums of a lane fit 16 bits (8 * 15 * 127 * 2 = 30480): one widening a block
    part: list[list[Value]] = [[] for _ in range(TILE_ROWS)]
    for k in range(8):
        columns = _tile_columns(b, panel, k)
        for r in range(TILE_ROWS):
            w = _weight(b, scratch, r, k)
            products = [_pairs_unsigned(b, w, x) for x in columns]
            part[r] = products if k == 0 else [b.add(p, m) for p, m in zip(part[r], products, strict=True)]
        flat = _pin(b, [p for row in part for p in row])
        part = [flat[2 * r : 2 * r + 2] for r in range(TILE_ROWS)]
    return [[b.add(_widen(b, p), s) for p, s in zip(row, seeds, strict=True)] for row in part]


def tile_q80(b: Builder, scratch: Value, panel: Value) -> list[list[Value]]:
    """The same for int8 weights."""
    if FORM != "avx2":
        zero = splat(I32, TILE_LANES, 0)
        seeds = _tile_seeds(b, panel, 4) if _VNNI else [zero] * (16 // TILE_LANES)
        return _tile_quads(b, scratch, panel, seeds, signed=True)
    acc: list[list[Value]] = [[splat(I32, 8, 0)] * 2 for _ in range(TILE_ROWS)]
    for k in range(8):
        columns = _tile_columns(b, panel, k)
        for r in range(TILE_ROWS):
            w = _weight(b, scratch, r, k)
            size = call(b, "llvm.abs.v32i8", vec(I8, 32), [w, ir.Constant(ir.IntType(1), 0)])
            for g, x in enumerate(columns):
                # |w| x (x with the sign of w): pair sums <= 2 * 128 * 127 fit 16 bits
                signed = b.select(b.icmp_signed("<", w, splat(I8, 32, 0)), b.sub(splat(I8, 32, 0), x), x)
                acc[r][g] = b.add(acc[r][g], _widen(b, _pairs_unsigned(b, size, signed)))
    return acc
