"""From prompt ids to generated ids: feed, sample, feed again."""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dairllm.engine.sampler import Sampler
from dairllm.errors import ConfigError

__all__ = ["Generation", "Model"]


class Model(Protocol):
    """Anything that continues token ids: one node, or a cluster behind its root."""

    seq_len: int
    vocab_size: int

    def feed(self, tokens: list[int], position: int) -> NDArray[np.float32]:
        """Compute tokens at position, position + 1, ...; the logits after the last of them, float32 [vocab], valid until the next call."""
        ...


@dataclass(slots=True)
class Generation:
    """One answer; iterate over `run` for its ids as they come.

    Attributes:
        prompt_ids: what it continues.
        steps: most ids to generate; fewer where the context ends.
        eos_ids: ids that end it; they are generated too.
        on_logits: called with what led to each id.
        finish_reason: "stop" after an eos id, else "length".
    """

    model: Model
    sampler: Sampler
    prompt_ids: Sequence[int]
    steps: int
    eos_ids: Collection[int] = ()
    on_logits: Callable[[NDArray[np.float32]], None] | None = None
    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def run(self) -> Iterator[int]:
        """Generate; yields each id as it is chosen.

        Raises:
            ConfigError: the prompt is empty, holds an id that the model does not know, or leaves the context no room.
        """
        prompt, room = list(self.prompt_ids), self.model.seq_len
        if not prompt:
            raise ConfigError("the prompt has no tokens: there is nothing to continue")
        for place, token in enumerate(prompt):
            if not 0 <= token < self.model.vocab_size:
                raise ConfigError(f"token {place} of the prompt is {token}; the model knows ids 0 to {self.model.vocab_size - 1}")
        if len(prompt) > room:
            raise ConfigError(f"the prompt has {len(prompt)} tokens; the context has room for {room}")
        start = time.perf_counter()
        logits = self.model.feed(prompt, 0)
        position = len(prompt)
        while True:
            if self.on_logits is not None:
                self.on_logits(logits)
            token = self.sampler.sample(logits)
            now = time.perf_counter()
            if not self.ids:
                self.prefill_seconds = now - start
                first = now
            self.ids.append(token)
            self.decode_seconds = now - first
            yield token
            if token in self.eos_ids:
                self.finish_reason = "stop"
                return
            if len(self.ids) == self.steps or position == room:
                return
            logits = self.model.feed([token], position)
            position += 1

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens over the seconds to the first id."""
        return len(self.prompt_ids) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Ids after the first over the seconds from the first to the last."""
        return (len(self.ids) - 1) / self.decode_seconds if self.decode_seconds else 0.0
