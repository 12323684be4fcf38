"""The `.t` tokenizer file of distributed-llama: the bytes and the score of every token, and what a conversation needs.

Little-endian: i32 magic, i32 size of the header in bytes, (i32 key, i32 value) pairs; then an obsolete stop text, the chat template,
the ids that end an answer (i32 each), and for every token f32 score, u32 length, its bytes.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from dairllm.errors import FormatError
from dairllm.formats.file_kind import HEAD_BYTES, kind_of, kind_of_folder, unreadable
from dairllm.formats.replaced_file import replaced_file

__all__ = ["TOKENIZER_MAGIC", "TokenizerFile"]

TOKENIZER_MAGIC = 0x567124
_OLD_MAGIC = 0x567123
_PAIR = struct.Struct("<ii")
_TOKEN = struct.Struct("<fI")

_MAX_VOCAB = 2**24
_MAX_TOKEN_BYTES = 2**16
_MAX_TEXT_BYTES = 2**24
_MAX_EOS_IDS = 2**12
_MAX_FILE_BYTES = 2**30
"""The largest known vocabulary makes a file of 5 MB."""


class _Key(IntEnum):
    VERSION = 0
    VOCAB_SIZE = 1
    MAX_TOKEN_LENGTH = 2
    BOS_ID = 3
    EOS_ID = 4
    PAD_ID = 5
    CHAT_EOS_ID = 6
    CHAT_TEMPLATE_BYTES = 7
    CHAT_STOP_BYTES = 8
    N_EOS_IDS = 9
    ADD_BOS = 10


_BOUNDS = {
    _Key.VERSION: (1, 1),
    _Key.VOCAB_SIZE: (1, _MAX_VOCAB),
    _Key.MAX_TOKEN_LENGTH: (1, _MAX_TOKEN_BYTES),
    _Key.CHAT_TEMPLATE_BYTES: (0, _MAX_TEXT_BYTES),
    _Key.CHAT_STOP_BYTES: (0, _MAX_TEXT_BYTES),
    _Key.N_EOS_IDS: (0, _MAX_EOS_IDS),
    _Key.ADD_BOS: (0, 1),
}
_IDS = (_Key.BOS_ID, _Key.EOS_ID, _Key.PAD_ID, _Key.CHAT_EOS_ID)
_REQUIRED = (_Key.VERSION, _Key.VOCAB_SIZE, _Key.MAX_TOKEN_LENGTH)


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """What a `.t` file says.

    Attributes:
        pieces: the bytes of every token, by id.
        scores: of every token (float32 values): the pair whose union scores highest is merged first.
        bos_id: the id that begins a text, or None.
        eos_ids: ids at which an answer ends.
        add_bos: whether a prompt begins with `bos_id`.
        chat_template: Jinja text, or None.
        max_token_length: bytes of the longest piece, or more.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    chat_template: str | None
    max_token_length: int

    @classmethod
    def read(cls, path: str | Path) -> "TokenizerFile":
        """Read a `.t` file.

        Raises:
            FormatError: it cannot be opened, is no `.t` file, contradicts itself, or is shorter or longer than its header says.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise FormatError(path, None, "a .t tokenizer file", kind_of_folder(path) if path.is_dir() else "no plain file")
        try:
            nbytes = path.stat().st_size
            if nbytes > _MAX_FILE_BYTES:
                with path.open("rb") as file:
                    kind = kind_of(path, file.read(HEAD_BYTES), for_tokenizer=True)
                if kind is not None:
                    raise FormatError(path, None, "a .t tokenizer file", kind)
                raise FormatError(path, None, f"a .t tokenizer file of at most {_MAX_FILE_BYTES} bytes", f"{nbytes} bytes")
            data = path.read_bytes()
        except OSError as error:
            raise unreadable(path, "a readable .t tokenizer file", error) from error
        return _Parser(path, data).parse()

    def write(self, path: str | Path) -> None:
        """Write a `.t` file, which appears complete or not at all.

        Raises:
            ValueError: it would be a file that is refused when read.
            OSError: it cannot be written.
        """
        data = self.encode()
        with replaced_file(Path(path)) as file:
            file.write(data)

    def encode(self) -> bytes:
        """The bytes of the file.

        Raises:
            ValueError: they would be refused when read.
        """
        if len(self.pieces) != len(self.scores) or not self.pieces:
            raise ValueError(f"{len(self.pieces)} tokens and {len(self.scores)} scores")
        if not all(self.pieces):
            raise ValueError(f"token {self.pieces.index(b'')} has no bytes, which distributed-llama cannot read")
        template = (self.chat_template or "").encode()
        pairs = {
            _Key.VERSION: 1,
            _Key.VOCAB_SIZE: len(self.pieces),
            _Key.MAX_TOKEN_LENGTH: self.max_token_length,
            _Key.CHAT_TEMPLATE_BYTES: len(template),
            _Key.N_EOS_IDS: len(self.eos_ids),
            _Key.ADD_BOS: int(self.add_bos),  # always: the C++ reader has no default for it
        }
        if self.bos_id is not None:
            pairs[_Key.BOS_ID] = self.bos_id
        out = bytearray(_PAIR.pack(TOKENIZER_MAGIC, _PAIR.size * (1 + len(pairs))))
        for key, value in pairs.items():
            out += _PAIR.pack(key, value)
        out += template
        out += struct.pack(f"<{len(self.eos_ids)}i", *self.eos_ids)
        for score, piece in zip(self.scores, self.pieces, strict=True):
            out += _TOKEN.pack(score, len(piece)) + piece
        data = bytes(out)
        try:
            _Parser(Path("the new .t file"), data).parse()
        except FormatError as error:
            raise ValueError(str(error)) from error
        return data


class _Parser:
    """Reads from the front of `data`; `_at` is the offset of what comes next."""

    def __init__(self, path: Path, data: bytes) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def parse(self) -> TokenizerFile:
        values = self._header()
        vocab_size = values[_Key.VOCAB_SIZE]
        self._take(values.get(_Key.CHAT_STOP_BYTES, 0), "the chat stop text")
        template_at = self._at
        template = self._take(values.get(_Key.CHAT_TEMPLATE_BYTES, 0), "the chat template")
        try:
            chat_template = template.decode() if template else None
        except UnicodeDecodeError as error:
            raise self._error("a chat template in UTF-8", f"byte {template[error.start]:#04x}", template_at + error.start) from None
        named = [values[key] for key in (_Key.EOS_ID, _Key.CHAT_EOS_ID) if values.get(key, -1) >= 0]
        listed = [self._eos_id(number, vocab_size) for number in range(values.get(_Key.N_EOS_IDS, 0))]
        smallest = vocab_size * _TOKEN.size
        if len(self._data) - self._at < smallest:
            found = f"the end of the file after {len(self._data) - self._at}"
            raise self._error(f"at least {smallest} bytes of {vocab_size} tokens", found)
        scores, pieces = self._tokens(vocab_size, values[_Key.MAX_TOKEN_LENGTH])
        if self._at != len(self._data):
            raise self._error(f"the end of the file after {vocab_size} tokens", f"{len(self._data) - self._at} more bytes")
        bos = values.get(_Key.BOS_ID, -1)
        return TokenizerFile(
            pieces=tuple(pieces),
            scores=tuple(scores),
            bos_id=bos if bos >= 0 else None,
            eos_ids=tuple(dict.fromkeys(named + listed)),
            add_bos=bool(values.get(_Key.ADD_BOS, 0)),
            chat_template=chat_template,
            max_token_length=values[_Key.MAX_TOKEN_LENGTH],
        )

    def _header(self) -> dict[_Key, int]:
        kind = kind_of(self._path, self._data[:HEAD_BYTES], for_tokenizer=True)
        if kind is not None and not self._data.startswith(_PAIR.pack(TOKENIZER_MAGIC, 0)[:4]):
            raise FormatError(self._path, None, "a .t tokenizer file", kind)
        magic, nbytes = _PAIR.unpack(self._take(_PAIR.size, "a .t file's magic and header size"))
        if magic == _OLD_MAGIC:
            raise self._error(f"magic {TOKENIZER_MAGIC:#x}", f"{magic:#x}, an old .t format that is no longer read", 0)
        if magic != TOKENIZER_MAGIC:
            raise self._error(f"magic {TOKENIZER_MAGIC:#x} of a .t tokenizer file", f"{magic & 0xFFFFFFFF:#x}", 0)
        largest = _PAIR.size * (1 + len(_Key))
        if not _PAIR.size <= nbytes <= largest or nbytes % _PAIR.size:
            raise self._error(f"a header size that is a multiple of {_PAIR.size} and at most {largest}", str(nbytes), 4)
        values: dict[_Key, int] = {}
        offsets: dict[_Key, int] = {}
        while self._at < nbytes:
            at = self._at
            number, value = _PAIR.unpack(self._take(_PAIR.size, f"a header of {nbytes} bytes"))
            if number not in _Key.__members__.values():
                raise self._error(f"a header key from 0 to {max(_Key).value}", str(number), at)
            key = _Key(number)
            if key in values:
                raise self._error(f"each header key once ({key.name.lower()} stands at byte {offsets[key] - 4})", f"key {number} again", at)
            if key in _BOUNDS:
                low, high = _BOUNDS[key]
                if not low <= value <= high:
                    expected = f"{key.name.lower()} {low}" if low == high else f"{key.name.lower()} from {low} to {high}"
                    raise self._error(expected, str(value), at + 4)
            values[key], offsets[key] = value, at + 4
        for key in _REQUIRED:
            if key not in values:
                raise self._error(f"header key {key.value} ({key.name.lower()})", "the end of the header")
        for key in _IDS:
            if not -1 <= values.get(key, -1) < values[_Key.VOCAB_SIZE]:  # -1 says that there is none
                expected = f"{key.name.lower()} below the vocabulary's size {values[_Key.VOCAB_SIZE]}"
                raise self._error(expected, str(values[key]), offsets[key])
        return values

    def _eos_id(self, number: int, vocab_size: int) -> int:
        at = self._at
        token = int.from_bytes(self._take(4, f"id {number} of those that end an answer"), "little", signed=True)
        if not 0 <= token < vocab_size:
            raise self._error(f"an id below the vocabulary's size {vocab_size}", str(token), at)
        return token

    def _tokens(self, count: int, max_length: int) -> tuple[list[float], list[bytes]]:
        scores, pieces = [], []
        data, at, end = self._data, self._at, len(self._data)
        for token in range(count):
            if end - at < _TOKEN.size:
                raise self._error(f"score and length of token {token} of {count}", "the end of the file", at)
            score, length = _TOKEN.unpack_from(data, at)
            if score != score:
                raise self._error(f"a number as the score of token {token}", "NaN", at)
            if length > max_length:
                raise self._error(f"a length of token {token} up to max_token_length {max_length}", str(length), at + 4)
            at += _TOKEN.size
            if end - at < length:
                raise self._error(f"{length} bytes of token {token} of {count}", f"the end of the file after {end - at}", at)
            scores.append(score)
            pieces.append(data[at : at + length])
            at += length
        self._at = at
        return scores, pieces

    def _take(self, count: int, what: str) -> bytes:
        if len(self._data) - self._at < count:
            raise self._error(f"{what} ({count} bytes)", f"the end of the file after {len(self._data) - self._at}")
        self._at += count
        return self._data[self._at - count : self._at]

    def _error(self, expected: str, found: str, at: int | None = None) -> FormatError:
        return FormatError(self._path, self._at if at is None else at, expected, found)
