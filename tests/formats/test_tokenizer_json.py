import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from dairllm.formats.library_panic import panics_are_errors
from dairllm.formats.tokenizer_json import PRE_TOKENIZERS, UnsayableTokenizer, build_tokenizer_json, json_vocabulary

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [chr(value) for value in PRINTABLE] + [chr(256 + place) for place in range(256 - len(PRINTABLE))]
MERGES = [("h", "e"), ("1", "2"), ("Ġ", "he"), ("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ì", "ģ")]
TOKENS = ["<s>", *BYTES, *map("".join, MERGES), "<tool>", "whole"]
TOOL, WHOLE = len(TOKENS) - 2, len(TOKENS) - 1


def build(pre: str) -> Tokenizer:
    return Tokenizer.from_str(build_tokenizer_json(TOKENS, MERGES, pre, special=[0], added=[TOOL]))


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_token(number) for number in tokenizer.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_kind_keeps_ids_and_text(pre: str) -> None:
    tokenizer = build(pre)
    assert [tokenizer.token_to_id(token) for token in TOKENS] == list(range(len(TOKENS)))
    text = " he  12\n\té日本🎉 don't <tool>!"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert words(tokenizer, "he<s> he<tool>") == ["he", "<s>", "Ġhe", "<tool>"]
    added = {token["content"]: token["special"] for token in json.loads(tokenizer.to_str())["added_tokens"]}
    assert added == {"<s>": True, "<tool>": False}


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "12", ["1", "2"]),
        ("gpt-2", "12", ["12"]),
        ("llama-bpe", "12", ["12"]),
        ("qwen2", "12", ["1", "2"]),
        ("default", "12", ["12"]),
        # Four spaces before a word: the last of them is the word's.
        ("gpt-2", "    he", ["ĠĠ", "Ġ", "Ġhe"]),
        ("llama-bpe", "    he", ["ĠĠ", "Ġ", "Ġhe"]),
        # llama-bpe takes a word that is in the vocabulary whole, though no merge makes it.
        ("llama-bpe", "whole", ["whole"]),
        ("gpt-2", "whole", ["w", "h", "o", "l", "e"]),
        # qwen2 composes characters first: e and a combining accent become one.
        ("qwen2", "e\u0301", ["Ã", "©"]),
        ("deepseek-r1-qwen", "e\u0301", ["e", "Ìģ"]),
    ],
)
def test_text_is_cut_as_the_name_says(pre: str, text: str, expected: list[str]) -> None:
    assert words(build(pre), text) == expected


def test_an_unknown_name() -> None:
    with pytest.raises(UnsayableTokenizer, match="its pre-tokenizer 'tekken' is not known"):
        build("tekken")


def test_a_token_that_comes_twice() -> None:
    with pytest.raises(UnsayableTokenizer, match="token '!' comes twice"):
        build_tokenizer_json([*TOKENS, "!"], MERGES, "gpt-2", [], [])


def test_merges_that_lead_nowhere() -> None:
    with pytest.raises(UnsayableTokenizer, match="the tokenizers library does not take it"):
        build_tokenizer_json(TOKENS, [("x", "y")], "gpt-2", [], [])


def test_the_vocabulary_of_a_file() -> None:
    text = build_tokenizer_json(TOKENS, MERGES, "gpt-2", [0], [TOOL])
    assert json_vocabulary(text) == json_vocabulary(text.encode()) == {token: number for number, token in enumerate(TOKENS)}
    with pytest.raises(UnsayableTokenizer, match="cannot read it"):
        json_vocabulary("{}")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"model": {"continuing_subword_prefix": "####"}},
        {"model": {"continuing_subword_prefix": "h"}},  # ends the process, if the library reads it: "Ì" is cut within the character
        {"model": {"continuing_subword_prefix": 5}},
    ],
    ids=str,
)
def test_a_file_that_the_library_panics_about(changes: dict[str, Any]) -> None:
    document = json.loads(build_tokenizer_json(TOKENS, MERGES, "gpt-2", [0], [TOOL]))
    for key, value in changes.items():
        document[key] = document[key] | value if key == "model" else value
    with pytest.raises(UnsayableTokenizer):
        json_vocabulary(json.dumps(document))


def test_only_panics_are_caught() -> None:
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit, ZeroDivisionError):
        with pytest.raises(error), panics_are_errors():
            raise error
