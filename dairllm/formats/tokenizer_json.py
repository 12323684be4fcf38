"""Builds a `tokenizer.json` (the format of Hugging Face's `tokenizers` library, which does the work) of a vocabulary.

Of a byte-level BPE vocabulary a GGUF file says the merges, and by a name how text is cut into words: the expressions behind the names
are those of the models' own `tokenizer.json` files, or llama.cpp's where there is no such model.

Of a SentencePiece vocabulary it says scores: of all neighbours that together are a token, those whose token scores highest are merged
first. Merges say the same: every way to make a token of two others, in the order of the scores.
"""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dairllm.errors import printable
from dairllm.formats.library_panic import panics_are_errors
from dairllm.formats.token_names import SPACE

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

__all__ = ["PRE_TOKENIZERS", "UnsayableTokenizer", "build_sentence_json", "build_tokenizer_json", "check_subword_prefix", "json_vocabulary"]

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
    """The text of a `tokenizer.json` of a byte-level BPE vocabulary.

    Args:
        tokens: by id, bytes written in GPT-2's stand-ins.
        merges: in the order of their rank.
        pre: GGUF's name of the pre-tokenizer.
        special: ids that are taken whole where the text spells them out, and stand for no text.
        added: ids that are taken whole, too, but are text.

    Raises:
        UnsayableTokenizer: the pre-tokenizer is unknown, or the library does not take this vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    kind = PRE_TOKENIZERS.get(pre)
    if kind is None:
        raise UnsayableTokenizer(f"its pre-tokenizer {printable(repr(pre))} is not known")
    vocabulary = _vocabulary(tokens)

    def build() -> "Tokenizer":
        # Llama 3 takes words that are in the vocabulary whole, whatever the merges say.
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), ignore_merges=kind == "llama3"))
        if pre == "qwen2":  # the models whose name it is; others took its expression alone
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _pre_tokenizer(kind)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    return _finished(build, tokens, vocabulary, special, added)


def build_sentence_json(
    tokens: Sequence[str],
    scores: Sequence[float],
    normal: Sequence[int],
    special: Sequence[int],
    added: Sequence[int],
    *,
    unknown: int | None,
    space_prefix: bool,
) -> str:
    """The text of a `tokenizer.json` of a SentencePiece vocabulary.

    A character that no token says becomes its bytes' tokens (<0x0A>), as far as there are any.

    Args:
        tokens: by id, U+2581 written for a space.
        scores: by id. Of equal ones the token with the lower id comes first: ids are in the order in which tokens were found.
        normal: ids that merges may make: neither special nor a byte.
        special: ids that are taken whole where the text spells them out, and stand for no text.
        added: ids that are taken whole, too, but are text.
        unknown: the id of what has no bytes' tokens, or None.
        space_prefix: whether a text, and what follows a token that was taken whole, begins with a space more.

    Raises:
        UnsayableTokenizer: the library does not take this vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary = _vocabulary(tokens)
    merges = []
    for number in sorted(normal, key=lambda number: (-scores[number], number)):
        token = tokens[number]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = ((vocabulary[left], vocabulary[right]) for left, right in pairs if left in vocabulary and right in vocabulary)
        merges += [(tokens[left], tokens[right]) for left, right in sorted(known)]

    def build() -> "Tokenizer":
        word = tokens[unknown] if unknown is not None else None
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=word, fuse_unk=True, byte_fallback=True))
        prefix = [normalizers.Prepend(SPACE)] if space_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
        stripped = [decoders.Strip(" ", 1, 0)] if space_prefix else []
        tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
        return tokenizer

    return _finished(build, tokens, vocabulary, special, added)


def json_vocabulary(text: str | bytes) -> dict[str, int]:
    """The vocabulary of a `tokenizer.json`, added tokens included.

    Raises:
        UnsayableTokenizer: the library cannot read it.
    """
    from tokenizers import Tokenizer

    try:
        check_subword_prefix(json.loads(text))
        with panics_are_errors():
            return Tokenizer.from_buffer(text if isinstance(text, bytes) else text.encode()).get_vocab(with_added_tokens=True)
    except UnsayableTokenizer:
        raise
    except Exception as error:  # the library raises plain Exception for what it cannot read
        raise UnsayableTokenizer(f"the tokenizers library cannot read it: {printable(error)}") from error


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise UnsayableTokenizer(f"token {printable(repr(twice))} comes twice in its vocabulary")
    return vocabulary


def _finished(
    build: Callable[[], "Tokenizer"], tokens: Sequence[str], vocabulary: dict[str, int], special: Sequence[int], added: Sequence[int]
) -> str:
    """The text of what `build` makes, with the tokens that are taken whole; the library must have kept every id."""
    from tokenizers import AddedToken

    try:
        with panics_are_errors():
            tokenizer = build()
            tokenizer.add_special_tokens([AddedToken(tokens[number], normalized=False, special=True) for number in special])
            tokenizer.add_tokens([AddedToken(tokens[number], normalized=False) for number in added])
            if tokenizer.get_vocab(with_added_tokens=True) != vocabulary:
                raise UnsayableTokenizer("the tokenizers library gives other ids to its tokens")
            return tokenizer.to_str(pretty=True)
    except UnsayableTokenizer:
        raise
    except Exception as error:  # the library raises plain Exception for what it cannot take
        raise UnsayableTokenizer(f"the tokenizers library does not take it: {printable(error)}") from error


def check_subword_prefix(document: Any) -> None:
    """Raise UnsayableTokenizer where the second token of a merge lacks the prefix that the document says such tokens have: the library
    cuts it off unseen, and may end the process where that is in the middle of a character."""
    model = document.get("model") if isinstance(document, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not prefix:
        return
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(prefix, str) or len(pair) != 2 or not str(pair[1]).startswith(prefix):
            raise UnsayableTokenizer(f"merge {printable(merge)} has no token that begins with {printable(repr(prefix))}")


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
