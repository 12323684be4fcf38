"""A generation over a model whose every call is known: what is fed, where, and when it ends. With real logits: test_local.py."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dairllm.errors import ConfigError, NetworkError
from dairllm.serving.generation import Generation, check_prompt
from dairllm.serving.sampler import Sampler


@dataclass
class Counting:
    """A model that follows a token with the next number, and notes what it is fed."""

    seq_len: int = 64
    vocab_size: int = 50
    n_batches: int = 8
    fed: list[tuple[tuple[int, ...], int, bool]] = field(default_factory=list)

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        await asyncio.sleep(0)
        assert 1 <= len(tokens) <= self.n_batches
        assert position + len(tokens) <= self.seq_len
        self.fed.append((tuple(tokens), position, logits))
        if not logits:
            return None
        found = np.zeros(self.vocab_size, np.float32)
        found[(tokens[-1] + 1) % self.vocab_size] = 1.0
        return found


def greedy() -> Sampler:
    return Sampler(0.0, 1.0, 0)


async def collected(generation: Generation) -> list[int]:
    return [token async for token in generation.run()]


async def test_a_prompt_goes_in_batches_and_logits_are_asked_of_the_last() -> None:
    model = Counting()
    generation = Generation(model, greedy(), list(range(20)), 3)
    assert await collected(generation) == [20, 21, 22] == generation.ids
    assert model.fed == [
        (tuple(range(8)), 0, False),
        (tuple(range(8, 16)), 8, False),
        (tuple(range(16, 20)), 16, True),
        ((20,), 20, True),
        ((21,), 21, True),
    ]


async def test_a_prompt_of_whole_batches_has_no_empty_one() -> None:
    model = Counting()
    await collected(Generation(model, greedy(), list(range(16)), 1))
    assert [(len(tokens), logits) for tokens, _, logits in model.fed] == [(8, False), (8, True)]


async def test_what_the_model_holds_is_not_fed_again() -> None:
    model = Counting()
    generation = Generation(model, greedy(), list(range(20)), 2, held=19)
    assert await collected(generation) == [20, 21]
    assert model.fed == [((19,), 19, True), ((20,), 20, True)]
    assert generation.prefill_tokens_per_second == pytest.approx(1 / generation.prefill_seconds)


async def test_it_ends_at_an_eos_id_at_the_last_step_or_where_the_context_ends() -> None:
    async def ending(steps: int, eos: tuple[int, ...] = (), prompt: int = 3) -> tuple[list[int], str]:
        generation = Generation(Counting(seq_len=10), greedy(), list(range(prompt)), steps, eos)
        return await collected(generation), generation.finish_reason

    assert await ending(4) == ([3, 4, 5, 6], "length")
    assert await ending(4, (5, 30)) == ([3, 4, 5], "stop")
    assert await ending(3, (5,)) == ([3, 4, 5], "stop")
    assert await ending(100) == ([*range(3, 11)], "length"), "the last id is predicted from the last position and needs none"
    assert await ending(100, prompt=10) == ([10], "length")


async def test_who_stops_iterating_stops_it_between_passes() -> None:
    model = Counting()
    generation = Generation(model, greedy(), [1], 50)
    async with aclosing(generation.run()) as ids:
        async for token in ids:
            if token == 4:
                break
    assert generation.ids == [2, 3, 4]
    assert len(model.fed) == 3


async def test_who_is_cancelled_stops_it_in_the_middle_of_a_prompt() -> None:
    class Cancelling(Counting):
        async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
            if position == 16:
                task.cancel()
            return await super().feed(tokens, position, logits=logits)

    model = Cancelling()
    task = asyncio.create_task(collected(Generation(model, greedy(), [1] * 60, 1)))
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [position for _, position, _ in model.fed] == [0, 8]


async def test_what_led_to_each_id_is_shown() -> None:
    best: list[int] = []
    await collected(Generation(Counting(), greedy(), [7], 3, on_logits=lambda logits: best.append(int(logits.argmax()))))
    assert best == [8, 9, 10]


async def test_rates_are_of_the_seconds_spent() -> None:
    generation = Generation(Counting(), greedy(), [1, 2, 3], 3)
    assert (generation.prefill_tokens_per_second, generation.decode_tokens_per_second) == (0.0, 0.0)
    await collected(generation)
    assert generation.prefill_tokens_per_second * generation.prefill_seconds == pytest.approx(3)
    assert generation.decode_tokens_per_second * generation.decode_seconds == pytest.approx(2)


async def test_an_error_of_the_model_is_raised() -> None:
    class Losing(Counting):
        async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
            if position == 3:
                raise NetworkError("worker 10.0.0.2:9990 has gone")
            return await super().feed(tokens, position, logits=logits)

    generation = Generation(Losing(), greedy(), [1], 50)
    with pytest.raises(NetworkError, match="has gone"):
        await collected(generation)
    assert generation.ids == [2, 3, 4], "what there was remains"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no tokens"),
        ([1, 50], "token 1 of the prompt is 50; the model knows ids 0 to 49"),
        ([-1], "token 0 of the prompt is -1"),
        ([0] * 65, "the prompt has 65 tokens; the context has room for 64"),
    ],
)
async def test_a_prompt_that_cannot_be_is_refused_before_anything_is_fed(prompt: list[int], message: str) -> None:
    model = Counting()
    with pytest.raises(ConfigError, match=message):
        await collected(Generation(model, greedy(), prompt, 4))
    assert model.fed == []
    with pytest.raises(ConfigError, match=message):
        check_prompt(prompt, vocab_size=50, seq_len=64)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 64), st.data())
async def test_every_position_is_fed_once(length: int, steps: int, batch: int, data: st.DataObject) -> None:
    model = Counting(n_batches=batch)
    prompt = data.draw(st.lists(st.integers(0, 49), min_size=length, max_size=length))
    held = data.draw(st.integers(0, length - 1))
    generation = Generation(model, greedy(), prompt, steps, held=held)
    ids = await collected(generation)
    assert len(ids) == min(steps, model.seq_len - length + 1)
    flat = [(position + place, token) for tokens, position, _ in model.fed for place, token in enumerate(tokens)]
    assert flat == list(enumerate(prompt + ids[:-1]))[held:]
    assert sum(logits for _, _, logits in model.fed) == len(ids)
