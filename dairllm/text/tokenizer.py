"""A model's tokenizer: text to ids and back.

Ids are made by the model's own `tokenizer.json` where one with exactly the `.t` file's vocabulary lies beside it, else by greedy
merging from the `.t` file alone: as distributed-llama does it, or as llama.cpp does where the vocabulary is SentencePiece's. Ids become
text by the `.t` file's bytes in either case.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.text.greedy_merging import GreedyMerging, special_ids, stand_in_ids
from dairllm.text.model_tokenizer import ModelTokenizer, VocabularyMismatch
from dairllm.text.sentence_merging import SentenceMerging, first_byte_token
from dairllm.text.stream_decoder import StreamDecoder

if TYPE_CHECKING:
    from dairllm.text.chat_renderer import ChatRenderer

__all__ = ["Tokenizer"]

_log = structlog.get_logger(__name__)

_LONE_SURROGATES = re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Surrogates that stand for no byte (those from U+DC80 to U+DCFF are Python's surrogate escapes)."""


class Tokenizer:
    """Encoder and decoder of one vocabulary.

    Attributes:
        pieces: the bytes of every token, by id.
        bos_id: the id that begins a text, or None where there is none.
        add_bos: whether a prompt begins with it.
        eos_ids: ids at which an answer ends.
        special_ids: ids that stand for no text: not printed in an answer.
        chat_template: the model's Jinja template, or None.
        encoder: "tokenizer.json" or ".t": what makes the ids.
    """

    def __init__(self, file: TokenizerFile, own: ModelTokenizer | None = None) -> None:
        self.pieces: tuple[bytes, ...] = tuple(file.pieces)
        self.bos_id: int | None = file.bos_id
        self.add_bos = file.add_bos and file.bos_id is not None
        self.eos_ids = frozenset(file.eos_ids)
        self.chat_template: str | None = file.chat_template
        self._first_eos: int | None = file.eos_ids[0] if file.eos_ids else None
        self._own = own
        if own is not None:
            self.encoder = "tokenizer.json"
            self.special_ids = own.special | self.eos_ids
        else:
            self.encoder = ".t"
            special = special_ids(self.pieces, file.bos_id)
            self._greedy = _merging(self.pieces, file.scores, special)
            self.special_ids = special - stand_in_ids(self.pieces, file.bos_id) | self.eos_ids

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a `.t` file, and the `tokenizer.json` beside it if that has the same vocabulary (else there is a warning).

        Raises:
            FormatError: the `.t` file is not one, or cannot be read.
        """
        path = Path(path)
        file = TokenizerFile.read(path)
        beside = path.parent / "tokenizer.json"
        own = None
        try:
            own = ModelTokenizer.load(beside, file.pieces)
        except FileNotFoundError:
            pass
        except (VocabularyMismatch, OSError) as reason:
            _log.warning("tokenizer.json is not used", file=str(beside), reason=str(reason))
        return cls(file, own)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def bos_text(self) -> str:
        """What a chat template writes to begin a text; empty where `bos_id` is no special token."""
        return self._text_of(self.bos_id)

    @property
    def eos_text(self) -> str:
        """What a chat template writes to end one; empty where there is no such token."""
        return self._text_of(self._first_eos)

    def chat_renderer(self) -> "ChatRenderer":
        """For the model's chat template; whoever asks for it closes it."""
        from dairllm.text.chat_renderer import ChatRenderer  # most commands render none

        return ChatRenderer(self.chat_template, bos=self.bos_text, eos=self.eos_text)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Nothing is added; special tokens that are written out become their ids.

        Bytes that were no UTF-8 (surrogate escapes, as the command line and `surrogateescape` make them) are kept where the ids
        come from the `.t` file alone; the model's own tokenizer gets U+FFFD for them.
        """
        data = _utf8(text)
        if self._own is not None:
            return self._own.encode(data.decode("utf-8", "replace"))
        return self._greedy.encode(data)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text that begins a conversation: `bos_id` comes first where the vocabulary wants it and `text` has not said it."""
        ids = self.encode(text)
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            return [self.bos_id, *ids]
        return ids

    def decoder(self, *, show_special: bool = False) -> StreamDecoder:
        """A decoder for one answer; special tokens are left out unless they are asked for."""
        return StreamDecoder(self.pieces, frozenset() if show_special else self.special_ids)

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Text of all `ids` at once."""
        decoder = self.decoder(show_special=show_special)
        return "".join(map(decoder.feed, ids)) + decoder.finish()

    def _text_of(self, token: int | None) -> str:
        if token is None or token not in self.special_ids:
            return ""
        return self.pieces[token].decode("utf-8", "replace")


def _merging(pieces: Sequence[bytes], scores: Sequence[float], special: frozenset[int]) -> GreedyMerging:
    first_byte = first_byte_token(pieces, special)
    if first_byte is None:
        return GreedyMerging(pieces, scores, special)
    return SentenceMerging(pieces, scores, special, first_byte)


def _utf8(text: str) -> bytes:
    return _LONE_SURROGATES.sub("\N{REPLACEMENT CHARACTER}", text).encode("utf-8", "surrogateescape")
