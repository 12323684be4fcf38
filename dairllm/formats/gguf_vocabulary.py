"""The vocabulary of a GGUF file as a `.t` file and, where it can be said, a `tokenizer.json` with exactly the same tokens.

Two kinds (`tokenizer.ggml.model`): "gpt2" is byte-level BPE, whose tokens are bytes written in GPT-2's printable stand-ins and whose
merges have an order; "llama" is SentencePiece, whose tokens are text with U+2581 for a space, or <0xNN> for a byte, and have scores.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from dairllm.errors import FormatError, printable
from dairllm.formats.gguf import GgufFile
from dairllm.formats.token_names import byte_level_piece, sentence_piece
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.formats.tokenizer_json import UnsayableTokenizer, build_sentence_json, build_tokenizer_json

__all__ = ["Vocabulary", "read_vocabulary"]

_KEY = "tokenizer.ggml"
_NEVER_MERGED = -1e10
"""distributed-llama merges into no token that scores this or less."""

_END_OF_ANSWER = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>", "<EOT>"}
)
"""Special tokens that end an answer whatever the metadata say: many files name one of several."""


class _TokenType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is to be written beside the model.

    Attributes:
        file: the `.t` file.
        json: the text of the `tokenizer.json`, or None.
        warnings: what the user should know, a sentence each.
    """

    file: TokenizerFile
    json: str | None
    warnings: tuple[str, ...]


def read_vocabulary(file: GgufFile, n_rows: int) -> Vocabulary:
    """The vocabulary of a GGUF file.

    Args:
        file: the file.
        n_rows: rows of the embedding, which the vocabulary may not exceed.

    Raises:
        FormatError: there is no vocabulary, one of another kind, or one that contradicts itself.
    """
    kind = file.text(f"{_KEY}.model")
    tokens = file.texts(f"{_KEY}.tokens")
    types = file.integers(f"{_KEY}.token_type", [_TokenType.NORMAL] * len(tokens))
    if not tokens or len(tokens) > n_rows:
        raise FormatError(file.path, None, f"from 1 to {n_rows} tokens, the rows of the embedding", str(len(tokens)))
    if len(types) != len(tokens):
        raise FormatError(file.path, None, f"as many types as tokens ({len(tokens)})", str(len(types)))
    if kind == "gpt2":
        pieces, scores, json, warnings = _byte_level(file, tokens, types)
    elif kind == "llama":
        pieces, scores, json, warnings = _sentence_piece(file, tokens, types)
    else:
        raise FormatError(file.path, None, f"a vocabulary of the kind gpt2 or llama ({_KEY}.model)", printable(kind))
    for number, piece in enumerate(pieces):
        if not piece:
            raise FormatError(file.path, None, f"bytes of token {number}", "none")
    bos_id, add_bos, warning = _bos(file, types, pieces, kind)
    result = TokenizerFile(
        pieces=tuple(pieces),
        scores=tuple(scores),
        bos_id=bos_id,
        eos_ids=_eos_ids(file, tokens, types),
        add_bos=add_bos,
        chat_template=file.text("tokenizer.chat_template", "") or None,
        max_token_length=max(map(len, pieces)),
    )
    return Vocabulary(result, json, tuple(warnings) + ((warning,) if warning else ()))


_SPECIAL = (_TokenType.UNKNOWN, _TokenType.CONTROL)
_SPELLED = (*_SPECIAL, _TokenType.USER_DEFINED)
"""Types of tokens that are written as they are, not in stand-ins."""

_Found = tuple[list[bytes], list[float], str | None, list[str]]  # pieces, scores, tokenizer.json, warnings


def _byte_level(file: GgufFile, tokens: list[str], types: list[int]) -> _Found:
    merges = _merges(file)
    pieces = [token.encode() if type_ in _SPELLED else byte_level_piece(token) for token, type_ in zip(tokens, types, strict=True)]
    pre, warnings = file.text(f"{_KEY}.pre", ""), []
    if not pre:
        pre = "default"
        warnings.append(
            f"the file does not say how text is cut into words ({_KEY}.pre): the pre-tokenizer {pre!r} is used, which may be another than "
            "the model's; a newer GGUF file of the model says it"
        )
    json, special, added = None, _of_types(types, *_SPECIAL), _of_types(types, _TokenType.USER_DEFINED)
    try:
        json = build_tokenizer_json(tokens, merges, pre, special, added)
    except UnsayableTokenizer as reason:
        warnings.append(_alone(reason))
    return pieces, _merge_scores(tokens, pieces, merges), json, warnings


def _sentence_piece(file: GgufFile, tokens: list[str], types: list[int]) -> _Found:
    pieces = [token.encode() if type_ in _SPELLED else sentence_piece(token) for token, type_ in zip(tokens, types, strict=True)]
    scores = [_single(score) for score in file.numbers(f"{_KEY}.scores")]
    if len(scores) != len(tokens):
        raise FormatError(file.path, None, f"as many scores as tokens ({len(tokens)})", str(len(scores)))
    if not all(map(math.isfinite, scores)):
        number = next(number for number, score in enumerate(scores) if not math.isfinite(score))
        raise FormatError(file.path, None, f"a number as the score of token {number}", f"{scores[number]}")
    json, warnings = None, []
    try:
        json = build_sentence_json(
            tokens,
            scores,
            normal=_of_types(types, _TokenType.NORMAL),
            special=_of_types(types, *_SPECIAL),
            added=_of_types(types, _TokenType.USER_DEFINED),
            unknown=_unknown_id(file, types),
            space_prefix=file.flag(f"{_KEY}.add_space_prefix", True),
        )
    except UnsayableTokenizer as reason:
        warnings.append(_alone(reason))
    return pieces, scores, json, warnings


def _unknown_id(file: GgufFile, types: Sequence[int]) -> int | None:
    named = _token_id(file, "unknown", len(types))
    return next(iter(_of_types(types, _TokenType.UNKNOWN)), None) if named is None else named


def _of_types(types: Sequence[int], *wanted: _TokenType) -> list[int]:
    return [number for number, type_ in enumerate(types) if type_ in wanted]


def _alone(reason: UnsayableTokenizer) -> str:
    return f"no tokenizer.json is written: {reason}; text is tokenized from the .t file alone, which is less exact"


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = []
    for number, text in enumerate(file.texts(f"{_KEY}.merges")):
        space = text.find(" ", 1)
        left, right = text[:space], text[space + 1 :]
        if space < 0 or not right:
            raise FormatError(file.path, None, f"two tokens and a space between them as merge {number}", printable(repr(text)))
        merges.append((left, right))
    return merges


def _merge_scores(tokens: list[str], pieces: list[bytes], merges: list[tuple[str, str]]) -> list[float]:
    """Scores that make greedy merging go in the order of the merges."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    scores = []
    for token, piece in zip(tokens, pieces, strict=True):
        if token in rank:
            scores.append(-float(rank[token]))
        else:
            scores.append(0.0 if len(piece) == 1 else _NEVER_MERGED)
    return scores


def _eos_ids(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[int, ...]:
    """The ids that end an answer: the end of a text first, then those that end a turn."""
    ids = []
    for name in ("eos", "eot", "eom"):
        token = _token_id(file, name, len(tokens))
        if token is not None:
            ids.append(token)
    ids += [number for number, token in enumerate(tokens) if token in _END_OF_ANSWER and types[number] in _SPELLED]
    return tuple(dict.fromkeys(ids))


def _token_id(file: GgufFile, name: str, n_tokens: int) -> int | None:
    token = file.integer(f"{_KEY}.{name}_token_id", -1)
    if token < 0:
        return None
    if token >= n_tokens:
        raise FormatError(file.path, None, f"{_KEY}.{name}_token_id below {n_tokens}", str(token))
    return token


def _bos(file: GgufFile, types: list[int], pieces: list[bytes], kind: str) -> tuple[int | None, bool, str | None]:
    """`bos_id` and `add_bos` of the `.t` file, and a warning.

    distributed-llama takes all ids below `bos_id` for text and all others for special tokens. Where the special tokens come first, the
    true `bos_id` would leave it next to no text: unless prompts must begin with it, the file names the last id instead, which that
    program then takes for its only special token.
    """
    bos_id = _token_id(file, "bos", len(pieces))
    by_default = kind == "llama" or file.text(f"{_KEY}.pre", "") in ("llama-bpe", "llama-v3", "llama3")
    add_bos = file.flag(f"{_KEY}.add_bos_token", by_default) and bos_id is not None
    last_byte = max((number for number, piece in enumerate(pieces) if len(piece) == 1), default=-1)
    tail = len(pieces)
    while tail and types[tail - 1] not in (_TokenType.NORMAL, _TokenType.BYTE):
        tail -= 1
    if bos_id is not None and bos_id > last_byte:
        return bos_id, add_bos, None
    if add_bos:
        reason = "the special tokens of this vocabulary come first, and prompts must begin with one"
        return bos_id, True, f"a distributed-llama root cannot use the .t file: {reason}"
    return min(tail, len(pieces) - 1), False, None


def _single(value: float) -> float:
    """A score as float32 has it."""
    with np.errstate(over="ignore"):
        return float(np.float32(value))
