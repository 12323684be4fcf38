"""The table of rotary angles, (cos, sin) for each position and pair of a head: the same bits on every machine.

The cosine of a library differs between processors and versions in the last place, and a node that takes over from another must turn its
keys by the same numbers. So the frequencies are rounded from an exact value, and the angles are reduced and evaluated in float64 by
additions and multiplications alone, as docs/arithmetic.md defines them.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt

from dairllm.engine.allocation import aligned
from dairllm.errors import GraphError
from dairllm.graph.types import RopeConfig, RopeType

__all__ = ["MAX_POSITIONS", "cos_sin", "rope_frequencies", "rope_table"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

MAX_POSITIONS = 1 << 24
"""Positions are F32 in pipe 0; up to here they are exact there, and so is their product with a frequency in float64."""

_DIGITS = 60
_CHUNK = 16384  # angles treated together: what they need stays in the second-level cache

_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
# pi / 2 in three parts; the first two have 29 bits, so that their products with a number of quarter turns are exact
_QUARTER = tuple(float.fromhex(h) for h in ("0x1.921fb54000000p+0", "0x1.10b4611000000p-30", "0x1.4c4c6628b80dcp-59"))
_SINE = tuple((-1) ** (k // 2) / math.factorial(k) for k in range(3, 14, 2))
_COSINE = tuple((-1) ** (k // 2) / math.factorial(k) for k in range(4, 15, 2))


def rope_table(config: RopeConfig) -> Floats:
    """The table for positions 0..seq_len - 1: float32 [seq_len, head_dim / 2, 2], (cos, sin) of position * frequency.

    Raises:
        GraphError: numbers that no rotation can have.
    """
    if not 1 <= config.seq_len <= MAX_POSITIONS:
        raise GraphError(f"rope: a table of {config.seq_len} positions; expected 1 to {MAX_POSITIONS}")
    frequencies = rope_frequencies(config).astype(np.float64)
    table = aligned(config.seq_len * len(frequencies) * 8).view(np.float32).reshape(config.seq_len, len(frequencies), 2)
    step = max(1, _CHUNK // len(frequencies))
    for first in range(0, config.seq_len, step):
        part = table[first : first + step]
        positions = np.arange(first, first + len(part), dtype=np.float64)
        cosine, sine = cos_sin(positions[:, None] * frequencies)
        part[..., 0], part[..., 1] = cosine, sine
    return table


def rope_frequencies(config: RopeConfig) -> Floats:
    """Radians a position for each pair of a head: float32 [head_dim / 2], theta^(-2i / head_dim) rounded once.

    Where the scaling factor is not 1 they are then rescaled as Llama 3.1 does; FALCON knows no scaling.

    Raises:
        GraphError: numbers that no rotation can have.
    """
    c = config
    if c.head_dim < 2 or c.head_dim % 2:
        raise GraphError(f"rope: heads of {c.head_dim} values; expected an even number")
    theta, factor, low, high = (float(np.float32(v)) for v in (c.theta, c.scaling_factor, c.low_freq_factor, c.high_freq_factor))
    if not (math.isfinite(theta) and theta >= 1):
        raise GraphError(f"rope: a base of {theta}; expected a number from 1 on")
    frequencies = [_power(theta, -2 * i, c.head_dim) for i in range(c.head_dim // 2)]
    if c.type != RopeType.FALCON and factor != 1:
        context = c.orig_max_seq_len
        if not all(math.isfinite(v) and v >= 0 for v in (factor, low, high, context)) or factor == 0:
            raise GraphError(f"rope: scaling by {factor}, frequency factors {low} and {high}, context {context}; expected positive numbers")
        frequencies = [_rescaled(f, factor, low, high, context) for f in frequencies]
    if max(frequencies) > 1:
        raise GraphError(f"rope: scaling by {factor} turns heads by {max(frequencies)} radians a position; expected 1 at most")
    return np.array(frequencies, np.float64).astype(np.float32)


def _power(base: float, numerator: int, denominator: int) -> float:
    """base ** (numerator / denominator), rounded to float32 once."""
    with localcontext() as context:
        context.prec = _DIGITS
        exact = (Decimal(numerator) * Decimal(base).ln() / denominator).exp()
        nearest = np.float32(float(exact))
        # float() rounded to float64 first: where that fell on the middle between two float32, rounding again may have taken the wrong one
        around = (np.nextafter(nearest, np.float32(0)), nearest, np.nextafter(nearest, np.float32(np.inf)))
        return min((float(v) for v in around), key=lambda v: abs(Decimal(v) - exact))


def _rescaled(frequency: float, factor: float, low: float, high: float, context: int) -> float:
    """Llama 3.1: waves too long for the original context are slowed down, short ones are kept, between them it goes linearly."""
    if frequency == 0:
        return frequency
    wave = 2 * math.pi / frequency
    if wave < (context / high if high else math.inf):
        return frequency
    if wave > (context / low if low else math.inf):
        return frequency / factor
    smooth = (context / wave - low) / (high - low) if high != low else 0.0
    return (1 - smooth) * frequency / factor + smooth * frequency


def cos_sin(angle: Doubles) -> tuple[Doubles, Doubles]:
    """(cos, sin) of angles from 0 to 2^24, float64 of any shape, each within 1e-13; the bits depend on nothing but the angle."""
    turns = np.rint(angle * _TWO_OVER_PI)
    r = ((angle - turns * _QUARTER[0]) - turns * _QUARTER[1]) - turns * _QUARTER[2]
    z = r * r
    sine = r + (r * z) * _horner(z, _SINE)
    cosine = (1 - 0.5 * z) + (z * z) * _horner(z, _COSINE)
    quadrant = turns.astype(np.int64)
    swapped = (quadrant & 1).astype(bool)
    cos_sign = 1.0 - ((quadrant + 1) & 2)
    sin_sign = 1.0 - (quadrant & 2)
    return np.where(swapped, sine, cosine) * cos_sign, np.where(swapped, cosine, sine) * sin_sign


def _horner(z: Doubles, coefficients: tuple[float, ...]) -> Doubles:
    total = np.full_like(z, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = coefficient + z * total
    return total
