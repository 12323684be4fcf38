"""How probable a model finds a token: the logarithm of its softmax, and which tokens are the most probable."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dairllm.errors import EngineError

__all__ = ["MOST_TOP", "TokenScore", "score"]

MOST_TOP = 20
"""The most probable tokens that may be asked for, as OpenAI's API has it."""


class TokenScore(NamedTuple):
    """A token in its place.

    Attributes:
        token: its id.
        logprob: ln of its probability, as the model has it: before temperature, penalties and filters.
        top_ids: the most probable tokens in this place, the best first, of equal ones the lower id; int32 [n].
        top_logprobs: theirs; float32 [n].
    """

    token: int
    logprob: float
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]


def score(logits: NDArray[np.float32], token: int, n_top: int) -> TokenScore:
    """Of `token` by the logits that led to it, float32 [vocab].

    The exponentials are numpy's, so the last digits may differ from machine to machine; of the choice of tokens none of this is a part.
    A logprob and the same token's among the best are the same number.

    Raises:
        EngineError: one of them is NaN or +inf, or all are -inf: the computation went wrong.
    """
    best = logits.max()
    if not np.isfinite(best):
        raise EngineError(f"the best logit is {best}: the model's numbers have overflowed, or its weights are damaged")
    total = np.float32(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    n = min(n_top, logits.size)
    if n == 1:
        top = np.array([logits.argmax()], np.int32)
    else:
        least = np.partition(logits, logits.size - n)[logits.size - n] if n else np.float32(np.inf)
        found = np.flatnonzero(logits >= least)
        top = found[np.argsort(-logits[found], kind="stable")][:n].astype(np.int32)
    return TokenScore(token, float(logits[token] - best - total), top, logits[top] - best - total)
