"""What a request changes about logits before a token is chosen: biases of its own, and penalties for what has been said.

For the logit x of a token that the prompt holds or that was generated c times, in this order:

- `bias`: x + b, for the tokens that are named.
- `repetition`: x / r where x is positive, else x * r, for tokens of prompt and answer (Keskar and others, "CTRL", 2019; so
  `RepetitionPenaltyLogitsProcessor` of transformers, and vLLM).
- `frequency` and `presence`: x - c * f - p, for tokens of the answer (OpenAI's API reference, "Frequency and presence penalties").
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dairllm.errors import ConfigError

__all__ = ["Adjustments"]

_RANGE = np.finfo(np.float32)


class Adjustments:
    """Of one generation. Only tokens that were named or seen are touched: a large vocabulary costs its copy and no more.

    Args:
        prompt_ids: what is continued.
        repetition: above 0; 1 changes nothing.
        frequency, presence: any; 0 changes nothing.
        bias: by token id, in 0..vocab - 1.
        generated: ids that there are already, of a generation that is resumed.

    Raises:
        ConfigError: a number that is not finite, or out of range.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        bias: Mapping[int, float] | None = None,
        generated: Iterable[int] = (),
    ) -> None:
        if not (math.isfinite(repetition) and repetition > 0):
            raise ConfigError(f"repetition_penalty: {repetition}; expected a number above 0")
        biases = {f"logit_bias of token {token}": value for token, value in (bias or {}).items()}
        for name, value in {"frequency_penalty": frequency, "presence_penalty": presence, **biases}.items():
            if not math.isfinite(value):
                raise ConfigError(f"{name}: {value}; expected a finite number")
        self._repetition = np.float32(min(max(repetition, float(_RANGE.tiny)), float(_RANGE.max)))  # not 0, which float32 makes of 1e-50
        self._frequency, self._presence = np.float32(frequency), np.float32(presence)
        self._bias_ids = np.array(list(bias or ()), np.intp)
        self._biases = np.array(list((bias or {}).values()), np.float32)
        self._seen = _Counts(prompt_ids if repetition != 1 else ())
        self._said = _Counts(())
        for token in generated:
            self.add(token)

    @property
    def change_nothing(self) -> bool:
        """Whether all logits stay as they are, whatever is generated."""
        return bool(self._repetition == 1 and not self._frequency and not self._presence and not self._bias_ids.size)

    def add(self, token: int) -> None:
        """A token was generated."""
        if self._repetition != 1:
            self._seen.add(token)
        if self._frequency or self._presence:
            self._said.add(token)

    def apply(self, logits: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """out = the logits, changed; both float32 [vocab]. -inf stays: such a token is forbidden. What is finite stays finite: who reads an
        infinity takes the model for broken."""
        out[:] = logits
        with np.errstate(over="ignore", invalid="ignore"):
            out[self._bias_ids] += self._biases
            if self._repetition != 1:
                ids = self._seen.ids
                x = out[ids]
                out[ids] = _finite(np.where(x > 0, x / self._repetition, x * self._repetition), x)
            if self._frequency or self._presence:
                x = out[self._said.ids]
                out[self._said.ids] = _finite(x - (self._said.counts * self._frequency + self._presence), x)


def _finite(changed: NDArray[np.float32], before: NDArray[np.float32]) -> NDArray[np.float32]:
    """`changed`, with the largest number in the place of an infinity that was none before."""
    return np.where(np.isfinite(before), np.clip(changed, _RANGE.min, _RANGE.max), changed)


class _Counts:
    """How often each of some tokens was seen: two arrays that grow, and a place for each token."""

    def __init__(self, ids: Sequence[int]) -> None:
        found, counts = np.unique(np.array(ids, np.intp), return_counts=True)
        self._n = found.size
        self._places = dict(zip(found.tolist(), range(self._n), strict=True))
        self._ids, self._counts = found, counts.astype(np.float32)

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._n)
        if place < self._n:
            self._counts[place] += 1
            return
        if self._n == self._ids.size:
            more = max(64, self._n)
            self._ids, self._counts = (np.concatenate([a, np.zeros(more, a.dtype)]) for a in (self._ids, self._counts))
        self._ids[place], self._counts[place] = token, 1
        self._n += 1

    @property
    def ids(self) -> NDArray[np.intp]:
        return self._ids[: self._n]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._n]
