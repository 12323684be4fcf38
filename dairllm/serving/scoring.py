"""A generation that says how probable the model found its tokens, those of the prompt included: what evaluations ask for."""

import asyncio
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dairllm.serving.generation import Generation, Model
from dairllm.serving.logprobs import TokenScore, score
from dairllm.serving.reply import Reply

__all__ = ["ScoredGeneration", "ScoringModel", "generation_for"]

_LOGITS_BYTES = 8 << 20
"""Of the logits of all tokens that are computed together: memory that no other request touches."""


class ScoringModel(Model, Protocol):
    """A model that tells the logits of each token, and not only of the last."""

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        """As `feed`; returns the logits after each of the tokens, float32 [vocab]. Each is valid until the next is taken, the last one
        until the next call."""
        ...


@dataclass(slots=True)
class ScoredGeneration(Generation):
    """As `Generation`, with the score of each token.

    Attributes:
        model: one that tells them.
        n_top: the most probable tokens to name in each place.
        scores_prompt: whether the prompt's tokens are scored too; then none of it may be `held`.
        scores: of the ids generated so far.
        prompt_scores: each by what led to it; nothing did to the first, which has None. Empty unless `scores_prompt`.
    """

    model: ScoringModel
    n_top: int = 0
    scores_prompt: bool = False
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore | None] = field(default_factory=list)

    async def _compute_prompt(self, prompt: list[int]) -> NDArray[np.float32]:
        if not self.scores_prompt:
            return await Generation._compute_prompt(self, prompt)  # what super() means is lost where slots make the class anew
        rows = max(1, min(self.model.n_batches, _LOGITS_BYTES // (4 * self.model.vocab_size)))
        self.prompt_scores.append(None)
        for first in range(0, len(prompt), rows):
            for place, logits in enumerate(await self.model.feed_rows(prompt[first : first + rows], first), first + 1):
                if place < len(prompt):
                    self.prompt_scores.append(score(logits, prompt[place], self.n_top))
                    await asyncio.sleep(0)  # a large vocabulary takes a millisecond
        return logits

    def _chosen(self, token: int, logits: NDArray[np.float32]) -> None:
        self.scores.append(score(logits, token, self.n_top))


def generation_for(reply: Reply, model: ScoringModel, eos_ids: Collection[int]) -> Generation:
    """What answers a reply's order; with scores, which the reply then has as they come, where they were ordered."""
    order = reply.order
    words = (order.sampler(), order.prompt_ids, order.steps, () if order.ignore_eos else eos_ids, None, reply.cached_tokens)
    if order.logprobs is None:
        return Generation(model, *words)
    scored = ScoredGeneration(model, *words, n_top=order.logprobs, scores_prompt=order.scores_prompt)
    reply.scores, reply.prompt_scores = scored.scores, scored.prompt_scores
    return scored
