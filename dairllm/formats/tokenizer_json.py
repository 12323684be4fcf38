"""Builds a `tokenizer.json` (the format of Hugging Face's `tokenizers` library, which does the work) of a byte-level BPE vocabulary.

What a GGUF file says about cutting text into words is a name: the expressions behind the names are those of the models' own
`tokenizer.json` files, or llama.cpp's where there is no such model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["PRE_TOKENIZERS", "UnsayableTokenizer", "build_tokenizer_json", "json_vocabulary"]

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    "[0-9][0-9][0-9]",
)

PRE_TOKENIZERS = {
    "gpt-2": "gpt-2",
    "gpt2": "gpt-2",
    "mpt": "gpt-2",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "default": "default",
    "smollm": "smollm",
    "codeshell": "smollm",
    "command-r": "smollm",
    "refact": "smollm",
    "starcoder": "smollm",
    "llama-bpe": "llama3",
    "llama-v3": "llama3",
    "llama3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
}
"""GGUF's names of pre-tokenizers (`tokenizer.ggml.pre`), and which of ours they are."""


class UnsayableTokenizer(Exception):  # noqa: N818 - a finding, answered with a warning
    """There can be no `tokenizer.json` of this vocabulary; `str()` says why."""


def build_tokenizer_json(
    tokens: Sequence[str], merges: Sequence[tuple[str, str]], pre: str, special: Sequence[int], added: Sequence[int]
) -> str:
    """The text of a `tokenizer.json`.

    Args:
        tokens: by id, bytes written in GPT-2's stand-ins.
        merges: in the order of their rank.
        pre: GGUF's name of the pre-tokenizer.
        special: ids that are taken whole where the text spells them out, and stand for no text.
        added: ids that are taken whole, too, but are text.

    Raises:
        UnsayableTokenizer: the pre-tokenizer is unknown, or the library does not take this vocabulary.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    kind = PRE_TOKENIZERS.get(pre)
    if kind is None:
        raise UnsayableTokenizer(f"its pre-tokenizer {pre!r} is not known")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise UnsayableTokenizer(f"token {twice!r} comes twice in its vocabulary")
    try:
        # Llama 3 takes words that are in the vocabulary whole, whatever the merges say.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=kind == "llama3"))
        if pre == "qwen2":  # the models whose name it is; others took its expression alone
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _pre_tokenizer(kind)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(tokens[number], normalized=False, special=True) for number in special])
        tokenizer.add_tokens([AddedToken(tokens[number], normalized=False) for number in added])
        _check(tokenizer, vocabulary)
        return tokenizer.to_str(pretty=True)
    except UnsayableTokenizer:
        raise
    except Exception as error:  # the library raises plain Exception for what it cannot take
        raise UnsayableTokenizer(f"the tokenizers library does not take it: {error}") from error


def json_vocabulary(text: str | bytes) -> dict[str, int]:
    """The vocabulary of a `tokenizer.json`, added tokens included.

    Raises:
        UnsayableTokenizer: the library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(text if isinstance(text, bytes) else text.encode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UnsayableTokenizer(f"the tokenizers library cannot read it: {error}") from error


def _pre_tokenizer(kind: str) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    def split(*patterns: str) -> "PreTokenizer":
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt-2":
        return gpt2
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return split(*{"default": _DEFAULT, "llama3": (_LLAMA3,), "qwen2": (_QWEN2,)}[kind])


def _check(tokenizer: "Tokenizer", vocabulary: dict[str, int]) -> None:
    """The library must have kept every id."""
    if tokenizer.get_vocab(with_added_tokens=True) != vocabulary:
        raise UnsayableTokenizer("the tokenizers library gives other ids to its tokens")
