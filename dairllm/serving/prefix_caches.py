"""Which texts' K and V a model holds, and which of its KV caches is to serve the next prompt.

A conversation that goes on finds its own cache: the one that shares the longest beginning with the prompt. Another prompt takes a cache
that is free, or the one that was least recently used, and a copy of the beginning that it shares with some other, which stays as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Choice", "PrefixCaches"]

_SHORT = 32
"""Tokens that texts share without being one conversation: how a template begins."""
_END = 8
"""Tokens at the end of a prompt that may be others when the conversation goes on: how an answer begins, and what is joined to it."""


@dataclass(slots=True)
class _Cache:
    ids: list[int] = field(default_factory=list)
    """The tokens whose K and V it holds, by position."""
    n_prompt: int = 0
    """Of these, the last prompt."""
    used_at: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """For one prompt.

    Attributes:
        cache: the number of the one that serves it.
        source: the number of the one from which tokens are to be copied to it first, or None.
        shared: tokens of the prompt that need not be computed then; never all of them.
    """

    cache: int
    source: int | None
    shared: int


class PrefixCaches:
    """Of one model.

    Args:
        count: caches, one at least.

    Attributes:
        ids: the tokens that the chosen cache holds, by position; whoever feeds the model keeps them.
    """

    def __init__(self, count: int = 1) -> None:
        self._caches = [_Cache() for _ in range(count)]
        self._prompts = 0
        self.ids = self._caches[0].ids

    def choose(self, prompt: Sequence[int], *, shares: bool = True) -> Choice:
        """The cache for a prompt, which from now on holds no more than what it shares with it: that many tokens of `ids`.

        Where there is a `source`, they are there once they have been copied.

        Args:
            shares: whether tokens that were computed before are of use.
        """
        wanted = list(prompt)
        common = [_common(cache.ids, wanted) for cache in self._caches]
        # Of several the one that loses the least, then the one that was used last.
        best = max(
            range(len(common)),
            key=lambda number: (common[number], -len(self._caches[number].ids), self._caches[number].used_at),
        )
        shared = min(common[best], len(wanted) - 1) if shares else 0
        target = best if self._goes_on(best, common[best]) else self._least_used()
        self._prompts += 1
        chosen = self._caches[target]
        chosen.ids[:] = wanted[:shared]
        chosen.n_prompt, chosen.used_at = len(wanted), self._prompts
        self.ids = chosen.ids
        return Choice(target, None if target == best or shared == 0 else best, shared)

    def _goes_on(self, number: int, common: int) -> bool:
        """Whether a prompt is that cache's own text, going on or once more: it loses nothing, or no more than the last answer."""
        cache = self._caches[number]
        end = _END if common > _SHORT else 0
        return len(self._caches) == 1 or common == len(cache.ids) or common >= cache.n_prompt - end

    def _least_used(self) -> int:
        """A free one, while there is one."""
        return min(range(len(self._caches)), key=lambda number: (self._caches[number].used_at, number))


def _common(ids: list[int], prompt: list[int]) -> int:
    """How many tokens two texts begin with together."""
    low, high = 0, min(len(ids), len(prompt))
    if ids[:high] == prompt[:high]:
        return high
    while high - low > 1:  # the first that differs is in low..high-1
        middle = (low + high) // 2
        if ids[low:middle] == prompt[low:middle]:
            low = middle
        else:
            high = middle
    return low
