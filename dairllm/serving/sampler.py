"""The choice of the next token from its logits.

A generation can stop and go on elsewhere: after a node was lost, after a restart. So the choice is a function of the logits, the settings
and the number of the draw alone (and of the tokens before it, where there are penalties). The random number of a draw is computed from the
seed and that number (SplitMix64, whose state is a counter), the exponentials by operations that round the same everywhere, and
probabilities become whole numbers, whose sums are exact.

What is done to the logits, in the order of transformers' `generate`: adjustments (`dairllm.serving.adjustments`), temperature, top_k
(Fan, Lewis and Dauphin, 2018), top_p (Holtzman and others, "The Curious Case of Neural Text Degeneration", 2020), min_p (Nguyen and
others, "Turning Up the Heat", 2024).
"""

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dairllm.errors import ConfigError, EngineError
from dairllm.serving.adjustments import Adjustments

__all__ = ["Sampler"]

Floats = npt.NDArray[np.float32]

_ONE = np.float32(1 << 40)
"""A token's weight is floor(2^40 p / p of the best): what has less than 1e-12 of it is never drawn, and the sum of 2^22 fits 63 bits."""
_MAX_VOCAB = 1 << 22

_STEP = 32768
"""Logits treated together: what they need stays in the second-level cache."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014


class Sampler:
    """Chooses tokens; its only state is `draws`, and what its adjustments have seen.

    Args:
        temperature: 0 takes the best token, ties to the lower id; else logits are divided by it.
        top_p: draw only from the smallest set of most probable tokens that together have this probability; 1 is all.
        top_k: draw from so many most probable tokens, of equal ones from the lower ids; 0 is all.
        min_p: draw only from tokens at least this share as probable as the best, of those that top_k and top_p leave; 0 is all.
        seed: any integer; its low 64 bits count.
        draws: how many tokens were drawn before. A generation that is resumed with the number of tokens it had goes on with the same ones.
        adjustments: of this generation, told of each token; None leaves the logits as they are.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        top_k: int = 0,
        min_p: float = 0.0,
        draws: int = 0,
        adjustments: Adjustments | None = None,
    ) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"temperature: {temperature}; expected a number from 0 on")
        if not 0 <= top_p <= 1:
            raise ConfigError(f"top_p: {top_p}; expected a number from 0 to 1")
        if top_k < 0:
            raise ConfigError(f"top_k: {top_k}; expected a whole number from 0 on")
        if not 0 <= min_p <= 1:
            raise ConfigError(f"min_p: {min_p}; expected a number from 0 to 1")
        self.temperature, self.top_p, self.seed, self.draws = temperature, top_p, seed & _MASK, draws
        self.top_k, self.min_p = top_k, np.float32(min_p)
        self._adjustments = None if adjustments is None or adjustments.change_nothing else adjustments
        self._work = _Work(0)

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """The next token's id.

        Args:
            logits: float32 [vocab]; -inf forbids a token.

        Raises:
            EngineError: there is no logit, one is NaN or +inf, or all are -inf: the computation went wrong.
        """
        if logits.ndim != 1 or not 0 < logits.size <= _MAX_VOCAB:
            raise EngineError(f"logits of shape {logits.shape} to sample from; expected one row of them")
        if self._adjustments is not None:
            return self._adjusted(logits, self._adjustments)
        return self._choose(logits)

    def _adjusted(self, logits: Floats, adjustments: Adjustments) -> int:
        """The next token where logits are changed first."""
        self._fit(logits.size)
        adjustments.apply(logits, self._work.adjusted)
        token = self._choose(self._work.adjusted)
        adjustments.add(token)
        return token

    def _fit(self, size: int) -> None:
        if self._work.size != size:
            self._work = _Work(size)

    def _choose(self, logits: Floats) -> int:
        best = int(logits.argmax())  # the first of equals; the first NaN where there is one
        top = float(logits[best])
        if not math.isfinite(top):
            raise EngineError(f"logit {best} of {logits.size} is {top}: the model's numbers have overflowed, or its weights are damaged")
        draw, self.draws = self.draws, self.draws + 1
        if self.temperature == 0:
            return best
        self._fit(logits.size)
        work = self._work
        _relative_probabilities(logits, logits[best], self.temperature, work)
        if 0 < self.top_k < logits.size:
            _keep_most_probable(work, self.top_k)
        if self.top_p < 1:
            _keep_nucleus(work, self.top_p)
        if self.min_p > 0:
            work.p[work.p < self.min_p] = 0
        sums = work.weights(work.p).cumsum(out=work.sums)
        coin = _random_bits(self.seed, draw) * int(sums[-1]) >> 64
        return int(np.searchsorted(sums, coin, side="right"))


class _Work:
    """Arrays of a vocabulary's size, kept from token to token: new pages for each would cost more than the arithmetic."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.p = np.empty(size, np.float32)
        self.best = np.empty(size, np.float32)
        self.kept = np.empty(size, np.bool_)
        self.sums = np.empty(size, np.int64)
        self.parts = [np.empty(min(size, _STEP), np.float32) for _ in range(3)]
        self._scaled = np.empty(size, np.float32)
        self._weights = np.empty(size, np.int64)

    @cached_property
    def adjusted(self) -> Floats:
        """Room for logits; few requests need it."""
        return np.empty(self.size, np.float32)

    def weights(self, p: Floats) -> npt.NDArray[np.int64]:
        """floor(2^40 p), until the next call."""
        weights = self._weights[: p.size]
        weights[:] = np.multiply(p, _ONE, out=self._scaled[: p.size])
        return weights


def _random_bits(seed: int, draw: int) -> int:
    """64 random bits, a function of both."""
    return _mix((_mix(seed) + (draw + 1) * _GOLDEN) & _MASK)


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def _relative_probabilities(logits: Floats, top: np.float32, temperature: float, work: _Work) -> None:
    """work.p = exp((logit - top) / temperature), 1 for the best token."""
    divisor = np.float32(min(max(temperature, 1e-30), 1e30))
    with np.errstate(over="ignore"):  # to -inf, where the temperature is very small
        for first in range(0, logits.size, _STEP):
            p = work.p[first : first + _STEP]
            x, k, t = (part[: p.size] for part in work.parts)
            np.subtract(logits[first : first + _STEP], top, out=x)
            np.divide(x, divisor, out=x)
            _exp(x, k, t, p)


def _exp(x: Floats, k: Floats, t: Floats, out: Floats) -> None:
    """out = exp(x) of numbers from -inf to 0, within 2e-6; below -30 as for -30, whose weight is 0. Overwrites x, k and t.

    Every operation rounds by itself, so the bits are the same everywhere, which numpy's own exp does not promise. The polynomial is that of
    docs/arithmetic.md.
    """
    np.maximum(x, np.float32(-30), out=x)
    np.rint(np.multiply(x, np.float32(1.4426950216293335), out=k), out=k)
    np.subtract(x, np.multiply(k, np.float32(0.693359375), out=t), out=x)
    np.add(x, np.multiply(k, np.float32(2.12194440e-4), out=t), out=x)
    np.multiply(x, np.float32(1.9875691500e-4), out=out)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        np.multiply(np.add(out, np.float32(coefficient), out=out), x, out=out)
    np.multiply(np.add(out, np.float32(1), out=out), x, out=out)
    np.add(out, np.float32(1), out=out)
    exponent = t.view(np.int32)
    exponent[:] = k
    np.add(exponent, np.int32(127), out=exponent)
    np.left_shift(exponent, np.int32(23), out=exponent)
    np.multiply(out, t, out=out)


def _keep_nucleus(work: _Work, top_p: float) -> None:
    """Set work.p to 0 but for the fewest most probable tokens that together have at least `top_p`; of equal ones the lower ids stay."""
    p, best = work.p, work.best
    wanted = max(1, math.ceil(top_p * int(work.weights(p).sum())))
    # the nucleus is mostly small: look for it among the best few before sorting a whole vocabulary, which takes five times as long
    best[:] = p
    few, mass = 1024, 0
    while few < p.size // 4 and (not mass or 16 * mass >= wanted):  # 16 times as many cannot have more than 16 times as much
        best.partition(p.size - few)
        mass = int(work.weights(best[-few:]).sum())
        if mass >= wanted:
            best = best[-few:]
            break
        few *= 16
    best.sort()
    sums = work.weights(best[::-1]).cumsum(out=work.sums[: best.size])
    count = 1 + int(np.searchsorted(sums, wanted))
    _keep_from(work, best[-count], count)


def _keep_most_probable(work: _Work, count: int) -> None:
    """Set work.p to 0 but for so many most probable tokens; of equal ones the lower ids stay."""
    work.best[:] = work.p
    work.best.partition(work.p.size - count)
    _keep_from(work, work.best[-count], count)


def _keep_from(work: _Work, least: np.float32, count: int) -> None:
    """Set work.p to 0 but for `count` tokens of at least this probability; of those that have just this, the lower ids stay."""
    p = work.p
    np.greater_equal(p, least, out=work.kept)
    excess = int(np.count_nonzero(work.kept)) - count
    if excess:
        work.kept[np.flatnonzero(p == least)[-excess:]] = False
    np.multiply(p, work.kept, out=p)
