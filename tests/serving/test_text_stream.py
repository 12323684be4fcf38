"""Text that is given out is certain: no torn characters, nothing of a stop string, however the text is divided into tokens."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.serving.generation import Generation
from dairllm.serving.sampler import Sampler
from dairllm.serving.text_stream import Answer
from dairllm.text.tokenizer import Tokenizer

EOS = 0


class Saying:
    """A model with a vocabulary of its own, which says it from the second token on, one after the other."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = [b"<end>", b"?", *pieces]
        self.seq_len, self.vocab_size, self.n_batches = len(self.pieces) + 1, len(self.pieces), 4

    async def feed(self, tokens: Sequence[int], position: int, *, logits: bool) -> NDArray[np.float32] | None:
        found = np.zeros(self.vocab_size, np.float32)
        found[(tokens[-1] + 1) % self.vocab_size] = 1.0
        return found

    def answer(self, stop: Sequence[str] = (), steps: int = 1000) -> Answer:
        file = TokenizerFile(self.pieces, [0.0] * self.vocab_size, 1, (EOS,), False, None, max(map(len, self.pieces)))
        return Answer(Generation(self, Sampler(0.0, 1.0, 0), [1], steps, {EOS}), Tokenizer(file), stop)


async def said(pieces: Sequence[bytes], stop: Sequence[str] = (), steps: int = 1000) -> tuple[list[str], str]:
    answer = Saying(pieces).answer(stop, steps)
    found = [piece async for piece in answer.pieces()]
    assert "".join(found) == answer.text
    assert "" not in found
    return found, answer.finish_reason


async def test_the_end_is_no_text() -> None:
    assert await said([b"Hello", b", ", b"you"]) == (["Hello", ", ", "you"], "stop")
    assert await said([b"Hello", b", ", b"you"], steps=2) == (["Hello", ", "], "length")


async def test_a_character_over_several_tokens_comes_when_it_is_whole() -> None:
    assert await said([b"a\xf0\x9f", b"\x8d", b"\x8eb"]) == (["a", "🍎b"], "stop")


async def test_a_character_that_is_never_completed_is_shown_as_such() -> None:
    assert await said([b"a", b"\xf0\x9f"], steps=2) == (["a", "�"], "length")
    assert await said([b"a", b"\xf0\x9f"]) == (["a", "�"], "stop")


async def test_a_stop_string_is_left_out_and_ends_the_answer() -> None:
    answer = Saying([b"one", b"\n\n", b"two"]).answer(["\n\n"])
    assert [piece async for piece in answer.pieces()] == ["one"]
    assert (answer.finish_reason, len(answer.generation.ids)) == ("stop", 2), "no token is computed after it"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"ab", b"cST", b"OPde"], ["STOP"], ["ab", "c"]),
        ([b"abS", b"T", b"O", b"Pde"], ["STOP"], ["ab"]),
        ([b"STOP"], ["STOP"], []),
        ([b"abSTOPde"], ["STOP"], ["ab"]),
        ([b"aS", b"ST", b"OP"], ["STOP"], ["a", "S"]),  # only the second S begins one
        ([b"x\xc3", b"\xa9!", b"y"], ["é"], ["x"]),  # half of it in each token
        ([b"ab", b"cd"], ["bc", "abcd"], ["a"]),  # the one that ends first
        ([b"ab", b"cd"], ["bcd", "abcd", "d"], []),  # of those that end together the longest
        ([b"ab", b"cd"], ["", "c"], ["ab"]),  # nothing is no stop string
    ],
)
async def test_stop_strings_across_tokens(pieces: list[bytes], stop: list[str], expected: list[str]) -> None:
    assert await said(pieces, stop) == (expected, "stop")


async def test_the_beginning_of_a_stop_string_that_does_not_go_on_is_text() -> None:
    assert await said([b"a", b"ST", b"AR", b"ST"], ["STOP"], steps=4) == (["a", "STAR", "ST"], "length")
    assert await said([b"a", b"ST", b"AR", b"ST"], ["STOP"]) == (["a", "STAR", "ST"], "stop")


async def test_a_stop_string_that_only_the_end_completes() -> None:
    assert await said([b"ab", b"\xf0\x9f"], ["�"]) == (["ab"], "stop")


_text = st.text("ab🍎é", max_size=30)


@given(_text, st.lists(st.text("ab🍎", min_size=1, max_size=4), max_size=3), st.data())
async def test_it_makes_no_difference_how_a_text_is_divided(text: str, stop: list[str], data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(whole) - 1)), max_size=len(whole))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True) if whole[a:b]]
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    found, reason = await said(pieces, stop)
    assert "".join(found) == (text[: min(ends)[1]] if ends else text)
    assert reason == "stop"
