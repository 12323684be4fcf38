"""Several conversations at one server: each finds again what was computed of it, and what they say does not depend on that."""

from typing import Any

import pytest
from openai import InternalServerError
from openai.types import Completion

from tests.api.conftest import Serve
from tests.api.serving import Serving

TEMPLATE = list(range(24))
"""How all chats of a model begin."""
DOCUMENT = [*TEMPLATE, *(40 + 7 * place % 200 for place in range(600))]
TITLE = [*TEMPLATE, *range(250, 310)]


async def complete(serving: Serving, prompt: list[int], tokens: int = 6) -> Completion:
    answer: Completion = await serving.client.completions.create(model="small", prompt=prompt, max_tokens=tokens, temperature=0)
    return answer


def cached(answer: Completion) -> int:
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


async def test_a_title_between_two_turns_does_not_cost_the_next_turn_its_prefix(serve: Serve) -> None:
    """By the passes of the model, too; and every answer is that of a server that computes all of it."""
    prompts, turn = [], DOCUMENT
    for number in range(3):
        prompts += [turn, TITLE]
        turn = [*turn, *range(60 + number, 90 + number)]
    async with serve() as single:
        expected = [(await complete(single, prompt)).choices[0].text for prompt in prompts]
    async with serve(conversations=2) as serving:
        found, fed = [], []
        for prompt in prompts:
            serving.models.last.fed.clear()
            answer = await complete(serving, prompt)
            found.append((answer.choices[0].text, cached(answer)))
            fed.append(serving.models.last.fed[0][0])
    assert [text for text, _ in found] == expected
    assert [count for _, count in found] == fed == [0, 24, 624, 83, 654, 83]
    assert serving.metrics.cached_tokens == sum(fed)


async def test_users_in_turn(serve: Serve) -> None:
    """Whose conversations begin alike: all of what they share is copied, not computed."""
    async with serve(conversations=4) as serving:
        turns = [[*DOCUMENT, *range(100 + 10 * user, 180 + 10 * user)] for user in range(4)]
        first = [await complete(serving, turn, 3) for turn in turns]
        assert [cached(answer) for answer in first] == [0, len(DOCUMENT), len(DOCUMENT), len(DOCUMENT)]
        second = [await complete(serving, [*turn, 5, 5], 3) for turn in turns]
        assert [cached(answer) for answer in second] == [len(turn) for turn in turns]
        texts = [answer.choices[0].text for answer in (*first, *second)]
    async with serve() as single:
        plain = [(await complete(single, prompt, 3)).choices[0].text for prompt in (*turns, *([*turn, 5, 5] for turn in turns))]
    assert texts == plain


async def test_a_prompt_asked_for_again_copies_nothing(serve: Serve, monkeypatch: Any) -> None:
    async with serve(conversations=3) as serving:
        caches = serving.models.last.kv_caches
        assert caches is not None
        copies: list[tuple[int, int, int]] = []
        copy = caches.copy

        def counted(source: int, target: int, positions: int) -> Any:
            copies.append((source, target, positions))
            return copy(source, target, positions)

        monkeypatch.setattr(caches, "copy", counted)
        prompt = list(range(40, 52))
        texts = [(await complete(serving, prompt, 40)).choices[0].text for _ in range(4)]
        assert len(set(texts)) == 1
        assert (copies, caches.used) == ([], 0)
        await complete(serving, [*prompt[:6], 99], 3)
        assert (copies, caches.used) == ([(0, 1, 6)], 1)


async def test_a_conversation_without_memory_holds_nothing(serve: Serve, monkeypatch: Any) -> None:
    """It fails; asked again, when there is memory, its answer is that of a server that computes all of it."""
    other = [*DOCUMENT[:300], *range(100, 160)]
    async with serve() as single:
        expected = (await complete(single, other)).choices[0].text
    async with serve(conversations=2) as serving:
        await complete(serving, DOCUMENT)
        with monkeypatch.context() as short:
            short.setattr("dairllm.engine.kv_caches.sparse", _no_memory)
            with pytest.raises(InternalServerError, match="MemoryError"):
                await complete(serving, other)
        assert (await complete(serving, other)).choices[0].text == expected


def _no_memory(_: int) -> None:
    raise MemoryError("no memory")


async def test_a_model_that_is_opened_anew_holds_nothing(serve: Serve) -> None:
    async with serve(conversations=2, reconnect=0.01) as serving:
        await complete(serving, DOCUMENT)
        await complete(serving, TITLE)
        serving.models.last.trouble = "gone"
        await serving.until(lambda: len(serving.models.opened) == 2)
        await serving.until_ready()
        assert [cached(await complete(serving, prompt)) for prompt in (TITLE, DOCUMENT, TITLE)] == [0, 24, len(TITLE) - 1]
