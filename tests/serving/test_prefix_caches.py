"""Which cache serves a prompt: a conversation finds its own, another one takes none that is missed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dairllm.serving.prefix_caches import Choice, PrefixCaches

DOCUMENT = list(range(1000, 1900))
TEMPLATE = list(range(24))
TITLE = [*TEMPLATE, *range(500, 560)]


def answer(caches: PrefixCaches, prompt: list[int], said: list[int]) -> Choice:
    """A request and its answer, of which the last token is not computed any further."""
    choice = caches.choose(prompt)
    caches.ids[:] = [*prompt, *said[:-1]]
    return choice


def test_a_title_between_two_turns_does_not_cost_the_next_turn_its_prefix() -> None:
    caches = PrefixCaches(2)
    turn = [*TEMPLATE, *DOCUMENT]
    assert answer(caches, turn, [7, 8, 9]) == Choice(0, None, 0)
    for _ in range(3):
        assert answer(caches, TITLE, [1, 2]).cache == 1
        held = len(turn) + 2
        turn += [7, 8, 9, *range(200, 220)]
        assert answer(caches, turn, [7, 8, 9]) == Choice(0, None, held)


def test_the_first_title_takes_a_copy_of_what_it_shares() -> None:
    caches = PrefixCaches(2)
    answer(caches, [*TEMPLATE, *DOCUMENT], [7])
    assert caches.choose(TITLE) == Choice(1, 0, 24)
    assert caches.ids == TEMPLATE
    assert caches.choose(TITLE) == Choice(1, None, 24)


def test_a_short_prompt_asked_for_again_stays_in_its_cache() -> None:
    """However long the answers are, and although it shares much with others: nothing is copied."""
    caches = PrefixCaches(4)
    answer(caches, [*TEMPLATE, *DOCUMENT], [7])
    prompt = [*TEMPLATE, 77, 78]
    first = answer(caches, prompt, list(range(300, 400)))
    assert first == Choice(1, 0, 24)
    for _ in range(5):
        assert answer(caches, prompt, list(range(300, 400))) == Choice(1, None, len(prompt) - 1)
    assert answer(caches, [5], [6, 7, 8]).cache == 2
    assert answer(caches, [5], [6, 7, 8]) == Choice(2, None, 0), "one token is always computed"


@pytest.mark.parametrize(
    ("shared", "more", "stays"),
    [(100, 0, True), (100, 8, True), (100, 9, False), (33, 8, True), (32, 0, True), (32, 1, False), (1000, 100, False)],
)
def test_a_conversation_may_lose_its_last_answer_and_not_what_was_asked(shared: int, more: int, stays: bool) -> None:
    """As where a template leaves out what the model thought, or writes the end of a prompt otherwise."""
    caches = PrefixCaches(2)
    prompt = list(range(shared + more))
    answer(caches, prompt, list(range(5000, 5200)))
    choice = caches.choose([*prompt[:shared], 8, 8])
    assert choice == (Choice(0, None, shared) if stays else Choice(1, 0, shared))


def test_users_whose_conversations_begin_alike_keep_their_own() -> None:
    caches = PrefixCaches(3)
    turns = [[*DOCUMENT, *range(100 * user, 100 * user + 50)] for user in range(3)]
    assert [answer(caches, turn, [7]) for turn in turns] == [Choice(0, None, 0), Choice(1, 0, 900), Choice(2, 1, 900)]
    assert [answer(caches, [*turn, 8], [7]) for turn in turns] == [Choice(user, None, 950) for user in range(3)]


def test_the_least_recently_used_goes() -> None:
    caches = PrefixCaches(3)
    texts = [[number, *range(100, 150)] for number in range(5)]
    assert [answer(caches, texts[number], [7]).cache for number in (0, 1, 2)] == [0, 1, 2]
    assert answer(caches, [*texts[0], 8], [7]).cache == 0
    assert answer(caches, texts[3], [7]) == Choice(1, None, 0)
    assert answer(caches, texts[4], [7]) == Choice(2, None, 0)
    assert answer(caches, [*texts[0], 8, 9], [7]) == Choice(0, None, 52)
    assert answer(caches, texts[1], [7]) == Choice(1, None, 0), "it had gone"


def test_a_copy_never_comes_from_the_cache_that_it_goes_to() -> None:
    """Where the one that shares the most is the one that has to go."""
    caches = PrefixCaches(2)
    answer(caches, [*TEMPLATE, *DOCUMENT], [7])
    answer(caches, list(range(600, 700)), [7])
    assert caches.choose(TITLE) == Choice(0, None, 24)
    assert caches.ids == TEMPLATE


def test_one_cache_serves_all() -> None:
    caches = PrefixCaches()
    for prompt, shared in ((DOCUMENT, 0), (DOCUMENT[:5], 4), ([1, 2, 3], 0), ([1, 2, 4], 2)):
        assert answer(caches, prompt, [7]) == Choice(0, None, shared)


TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(count=st.integers(1, 4), requests=st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 12)), max_size=25))
def test_what_is_said_to_be_held_is_held(count: int, requests: list[tuple[list[int], list[int], int]]) -> None:
    """Against caches of tokens; requests may be cut short anywhere."""
    caches, real = PrefixCaches(count), [list[int]() for _ in range(count)]
    for prompt, said, done in requests:
        best = max(
            next((n for n, (a, b) in enumerate(zip(text, prompt, strict=False)) if a != b), min(len(text), len(prompt))) for text in real
        )
        choice = caches.choose(prompt)
        assert choice.source != choice.cache
        if choice.source is not None:
            real[choice.cache][: choice.shared] = real[choice.source][: choice.shared]
        assert real[choice.cache][: choice.shared] == prompt[: choice.shared] == caches.ids
        assert choice.shared == min(best, len(prompt) - 1), "the longest that there is"
        fed = [*prompt, *said][: max(choice.shared, done)]
        caches.ids[:] = fed
        real[choice.cache][:] = fed


def test_a_prompt_that_is_scored_shares_nothing() -> None:
    """What led to its tokens is not kept; other conversations stay."""
    caches = PrefixCaches(2)
    answer(caches, DOCUMENT, [7])
    assert caches.choose([*DOCUMENT[:50], 8], shares=False) == Choice(1, None, 0)
    assert caches.ids == []
    assert caches.choose([*DOCUMENT, 7]) == Choice(0, None, len(DOCUMENT))
