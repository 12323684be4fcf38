"""From prompt ids to generated ids: feed, sample, feed again."""

import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dairllm.errors import ConfigError
from dairllm.serving.sampler import Sampler

__all__ = ["Generation", "Model", "check_prompt"]


class Model(Protocol):
    """Anything that continues token ids: one node, or a cluster behind its root. One call at a time.

    Attributes:
        seq_len: positions that there are.
        vocab_size: ids are below it.
        n_batches: the most tokens of one call.
    """

    seq_len: int
    vocab_size: int
    n_batches: int

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        """Compute 1 to n_batches tokens at position, position + 1, ...

        Cancelled in the middle it returns only when nothing of this pass is being computed any more.

        Returns:
            the logits after the last of them, float32 [vocab], valid until the next call; None unless they were asked for.
        """
        ...


def check_prompt(prompt_ids: Sequence[int], *, vocab_size: int, seq_len: int) -> None:
    """What can be said of a prompt before anything is computed.

    Raises:
        ConfigError: it is empty, holds an id that the model does not know, or is longer than the context.
    """
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens: there is nothing to continue")
    for place, token in enumerate(prompt_ids):
        if not 0 <= token < vocab_size:
            raise ConfigError(f"token {place} of the prompt is {token}; the model knows ids 0 to {vocab_size - 1}")
    if len(prompt_ids) > seq_len:
        raise ConfigError(f"the prompt has {len(prompt_ids)} tokens; the context has room for {seq_len}")


@dataclass(slots=True)
class Generation:
    """One answer; iterate over `run` for its ids as they come.

    Attributes:
        prompt_ids: what it continues.
        steps: most ids to generate, 0 to compute the prompt and no more, fewer where the context ends; None: until it does.
        eos_ids: ids that end it; they are generated too.
        on_logits: called with what led to each id.
        held: so many tokens of the prompt the model has computed before, at these positions; fewer than all of them.
        finish_reason: "stop" after an eos id, else "length".
        prefill_seconds: from the beginning to the first id.
        decode_seconds: from the first id to the last.
    """

    model: Model
    sampler: Sampler
    prompt_ids: Sequence[int]
    steps: int | None
    eos_ids: Collection[int] = ()
    on_logits: Callable[[NDArray[np.float32]], None] | None = None
    held: int = 0
    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    async def run(self) -> AsyncGenerator[int, None]:
        """Generate; yields each id as it is chosen. Whoever stops iterating, or is cancelled, stops it between two passes.

        Raises:
            ConfigError: the prompt is empty, holds an id that the model does not know, or leaves the context no room.
        """
        room = self.model.seq_len
        check_prompt(self.prompt_ids, vocab_size=self.model.vocab_size, seq_len=room)
        start = time.perf_counter()
        logits, position = await self._compute_prompt(list(self.prompt_ids)), len(self.prompt_ids)
        while len(self.ids) != self.steps:
            if self.on_logits is not None:
                self.on_logits(logits)
            token = self.sampler.sample(logits)
            now = time.perf_counter()
            if not self.ids:
                self.prefill_seconds = now - start
                first = now
            self.ids.append(token)
            self._chosen(token, logits)
            self.decode_seconds = now - first
            yield token
            if token in self.eos_ids:
                self.finish_reason = "stop"
                return
            if len(self.ids) == self.steps or position == room:
                return
            logits = _wanted(await self.model.feed([token], position, logits=True))
            position += 1

    async def _compute_prompt(self, prompt: list[int]) -> NDArray[np.float32]:
        """Feed all of it that is not held; the logits after its last token."""
        tokens, position, batch = prompt[self.held :], self.held, self.model.n_batches
        while len(tokens) > batch:
            await self.model.feed(tokens[:batch], position, logits=False)
            tokens, position = tokens[batch:], position + batch
        return _wanted(await self.model.feed(tokens, position, logits=True))

    def _chosen(self, token: int, logits: NDArray[np.float32]) -> None:
        """A token was generated from these logits."""

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens that were computed, over the seconds to the first id."""
        return (len(self.prompt_ids) - self.held) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Ids after the first over the seconds from the first to the last."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0


def _wanted(logits: NDArray[np.float32] | None) -> NDArray[np.float32]:
    assert logits is not None  # noqa: S101 - for the type checker: they were asked for
    return logits
