"""The model's own tokenizer: a `tokenizer.json` (the format of Hugging Face's `tokenizers` library, which does the work).

It knows what a `.t` file cannot say: how text is cut into words before the merging, in which order merges go, which tokens are
special. It is of use only if its ids mean the same as those of the model's `.t` file, so every piece is compared.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as LibraryTokenizer

from dairllm.errors import FormatError, printable
from dairllm.formats.library_panic import panics_are_errors
from dairllm.formats.token_names import byte_level_piece, sentence_piece
from dairllm.formats.tokenizer_json import check_subword_prefix
from dairllm.machine import give_back_memory

__all__ = ["ModelTokenizer", "VocabularyMismatch"]

MAX_FILE_BYTES = 256 << 20
"""The largest known (a vocabulary of 262,144 tokens) has 33 MB."""


class VocabularyMismatch(Exception):  # noqa: N818 - a finding about two files, answered with a warning
    """The file cannot stand in for the `.t` file; `str()` says why."""


class ModelTokenizer:
    """Encoder by the model's own rules.

    Attributes:
        special: ids of the tokens that the file marks as special.
    """

    def __init__(self, path: Path, library: LibraryTokenizer, special: frozenset[int]) -> None:
        self._path = path
        self._library = library
        self.special = special

    @classmethod
    def load(cls, path: Path, pieces: Sequence[bytes]) -> "ModelTokenizer":
        """Read `path`, whose vocabulary must be `pieces`.

        Raises:
            VocabularyMismatch: it is another vocabulary, or no tokenizer.json at all.
            OSError: it cannot be read.
        """
        if path.stat().st_size > MAX_FILE_BYTES:
            raise VocabularyMismatch(f"it is larger than {MAX_FILE_BYTES >> 20} MiB")
        text = path.read_bytes()
        try:
            document = json.loads(text)
            added = [(int(token["id"]), str(token["content"]), bool(token.get("special"))) for token in document.get("added_tokens") or ()]
            _compare(document, added, pieces)
            check_subword_prefix(document)
            del document  # tens of megabytes, which the library can use
            with panics_are_errors():
                library = LibraryTokenizer.from_buffer(text)
                library.no_truncation()
                library.no_padding()
        except VocabularyMismatch:
            raise
        except Exception as error:  # the library raises plain Exception for what it cannot read
            raise VocabularyMismatch(f"it cannot be read as a tokenizer: {printable(error)}") from error
        give_back_memory()  # the library needs three times what it keeps
        return cls(path, library, frozenset(token for token, _, special in added if special))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; adds nothing to it.

        Raises:
            FormatError: the file contradicts itself in a way that only a text brings to light.
        """
        try:
            with panics_are_errors():
                return list(self._library.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # plain, as above
            raise FormatError(self._path, None, "a tokenizer that can encode any text", str(error)) from error


def _compare(document: dict[str, Any], added: list[tuple[int, str, bool]], pieces: Sequence[bytes]) -> None:
    """Raise VocabularyMismatch unless the ids of `document` are those of `pieces`, with the same bytes."""
    vocabulary = document["model"]["vocab"]
    byte_level = any(part.get("type") == "ByteLevel" for part in _parts(document.get("pre_tokenizer"), document.get("decoder")))
    # BPE and WordPiece: {token: id}; Unigram: [[token, score], ...]
    named = vocabulary.items() if isinstance(vocabulary, dict) else ((entry[0], token) for token, entry in enumerate(vocabulary))
    names = {token: name for name, token in named}
    contents = {token: content for token, content, _ in added}
    n_tokens = len(names.keys() | contents.keys())
    if n_tokens != len(pieces):
        raise VocabularyMismatch(f"it has {n_tokens} tokens, the .t file {len(pieces)}")
    ordinary = [token for token in range(len(pieces)) if token in names and token not in contents]
    same = (
        set(ordinary) if byte_level and _same_at_once([names[token] for token in ordinary], [pieces[token] for token in ordinary]) else ()
    )
    for token, piece in enumerate(pieces):
        if token in same:
            continue
        if token in contents:
            # As it is written, and as distributed-llama's converter writes it.
            forms = {contents[token].encode(), byte_level_piece(contents[token])}
        elif token in names:
            forms = {byte_level_piece(names[token]) if byte_level else sentence_piece(names[token])}
        else:
            raise VocabularyMismatch(f"it has no token {token}")
        if piece not in forms:
            raise VocabularyMismatch(f"token {token} is {printable(repr(min(forms)))}, in the .t file {printable(repr(piece))}")


def _same_at_once(names: Sequence[str], pieces: Sequence[bytes]) -> bool:
    """Whether byte-level names are these pieces, in a third of the time that one by one takes: with a character for each byte, lengths and
    the whole text tell. Names with other characters in them may be the same all the same."""
    return list(map(len, names)) == list(map(len, pieces)) and byte_level_piece("".join(names)) == b"".join(pieces)


def _parts(*roots: object) -> Iterator[dict[str, Any]]:
    """All objects of a JSON document's branches."""
    waiting = list(roots)
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting.extend(part.values())
        elif isinstance(part, list):
            waiting.extend(part)
