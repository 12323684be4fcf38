"""Scores of a prompt and of an answer over a real model: the same as token by token, in bounded memory."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dairllm.engine.executor import Executor
from dairllm.formats.model_file import ModelFile
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode
from dairllm.serving import scoring
from dairllm.serving.sampler import Sampler
from dairllm.serving.scoring import ScoredGeneration
from tests.api.serving import write_model

PROMPT = [1, *range(40, 90)]


class Noting:
    """A model that notes how many tokens it is fed at once."""

    def __init__(self, model: LocalNode) -> None:
        self._model = model
        self.seq_len, self.vocab_size, self.n_batches = model.seq_len, model.vocab_size, model.n_batches
        self.rows: list[int] = []

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        return await self._model.feed(tokens, position, logits=logits)

    async def feed_rows(self, tokens: Sequence[int], position: int) -> Iterator[NDArray[np.float32]]:
        self.rows.append(len(tokens))
        return await self._model.feed_rows(tokens, position)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scored"))


@pytest.mark.parametrize("rows", [1, 7, 256])
async def test_each_token_is_scored_by_what_led_to_it(
    rows: int, model_path: Path, executors: list[Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Compute(executors[0])
    compute.open()
    with ModelFile.open(model_path) as file:
        node = LocalNode(file, compute, n_threads=executors[0].n_threads)
        await node.open()
        monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * node.vocab_size * rows)
        model = Noting(node)
        generation = ScoredGeneration(model, Sampler(), PROMPT, 6, n_top=3, scores_prompt=True)
        ids = [token async for token in generation.run()]
        assert model.rows == [min(rows, len(PROMPT) - first) for first in range(0, len(PROMPT), rows)]
        text, expected = PROMPT + ids, []
        for position, token in enumerate(text[:-1]):
            logits = await node.feed([token], position, logits=True)
            assert logits is not None
            x = logits.astype(np.float64)
            expected.append(x - x.max() - math.log(np.exp(x - x.max()).sum()))
        await node.close()
    compute.close()
    assert generation.prompt_scores[0] is None
    found = [*generation.prompt_scores[1:], *generation.scores]
    assert len(found) == len(text) - 1
    for token, one, row in zip(text[1:], found, expected, strict=True):
        assert one is not None
        assert one.token == token
        assert one.logprob == pytest.approx(row[token], abs=1e-5)
        assert one.top_ids.tolist() == np.argsort(-row)[:3].tolist()


async def test_no_answer_is_wanted(model_path: Path, executors: list[Executor]) -> None:
    compute = Compute(executors[0])
    compute.open()
    with ModelFile.open(model_path) as file:
        node = LocalNode(file, compute, n_threads=executors[0].n_threads)
        await node.open()
        generation = ScoredGeneration(node, Sampler(), PROMPT, 0, scores_prompt=True)
        assert [token async for token in generation.run()] == []
        assert (len(generation.prompt_scores), generation.scores, generation.finish_reason) == (len(PROMPT), [], "length")
        await node.close()
    compute.close()
