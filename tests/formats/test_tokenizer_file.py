import os
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import FormatError
from dairllm.formats.random_model import byte_vocabulary
from dairllm.formats.tokenizer_file import TOKENIZER_MAGIC, TokenizerFile

TINY = Path(__file__).parents[1] / "data" / "dllama" / "tiny.t"

SMALL = TokenizerFile(
    pieces=(b"a", b"b", b"ab", b"<end>"),
    scores=(0.0, -1.0, -2.5, 0.0),
    bos_id=3,
    eos_ids=(3, 2),
    add_bos=True,
    chat_template="{{ 'é' }}",
    max_token_length=5,
)


def pack(pairs: list[tuple[int, int]], rest: bytes = b"", magic: int = TOKENIZER_MAGIC) -> bytes:
    data = b"".join(struct.pack("<ii", *pair) for pair in pairs)
    return struct.pack("<ii", magic, 8 + len(data)) + data + rest


def tokens(*pieces: bytes) -> bytes:
    return b"".join(struct.pack("<fI", -float(number), len(piece)) + piece for number, piece in enumerate(pieces))


def read(tmp_path: Path, data: bytes) -> TokenizerFile:
    path = tmp_path / "x.t"
    path.write_bytes(data)
    return TokenizerFile.read(path)


def refusal(tmp_path: Path, data: bytes) -> FormatError:
    with pytest.raises(FormatError) as caught:
        read(tmp_path, data)
    return caught.value


def test_a_file_that_the_cpp_program_reads() -> None:
    file = TokenizerFile.read(TINY)
    assert len(file.pieces) == len(file.scores) == 320
    assert (file.bos_id, file.eos_ids, file.add_bos, file.chat_template) == (317, (318,), True, None)
    assert file.pieces[65] == b"A"
    assert file.scores[300] == -300.0
    assert file.max_token_length == max(map(len, file.pieces))


@pytest.mark.parametrize("file", [SMALL, replace(SMALL, bos_id=None, eos_ids=(), add_bos=False, chat_template=None), byte_vocabulary(300)])
def test_what_is_written_is_read(tmp_path: Path, file: TokenizerFile) -> None:
    file.write(tmp_path / "x.t")
    assert TokenizerFile.read(tmp_path / "x.t") == file


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=9), st.floats(allow_nan=False, width=32)), min_size=1, max_size=20),
    st.text(max_size=20),
)
@settings(max_examples=100, deadline=None)
def test_any_vocabulary_comes_back(entries: list[tuple[bytes, float]], template: str) -> None:
    pieces, scores = zip(*entries, strict=True)
    file = TokenizerFile(pieces, scores, len(pieces) - 1, (0,), False, template or None, max(map(len, pieces)))
    path = Path(f"/proc/self/fd/{os.memfd_create('t')}")
    try:
        path.write_bytes(file.encode())
        assert TokenizerFile.read(path) == file
    finally:
        os.close(int(path.name))


def test_older_ways_to_say_things(tmp_path: Path) -> None:
    """Two ids of the header that end an answer, and a stop text that is skipped; the list's ids follow, each once."""
    pairs = [(0, 1), (1, 3), (2, 2), (4, 2), (5, 0), (6, 1), (8, 4), (7, 2), (9, 2)]
    file = read(tmp_path, pack(pairs, b"STOP" + b"{}" + struct.pack("<ii", 1, 0) + tokens(b"a", b"b", b"ab")))
    assert file.eos_ids == (2, 1, 0)
    assert (file.bos_id, file.add_bos, file.chat_template) == (None, False, "{}")


def test_ids_of_minus_one_are_none(tmp_path: Path) -> None:
    file = read(tmp_path, pack([(0, 1), (1, 1), (2, 1), (3, -1), (4, -1)], tokens(b"a")))
    assert (file.bos_id, file.eos_ids) == (None, ())


def test_truncation_at_every_byte(tmp_path: Path) -> None:
    data = SMALL.encode()
    for length in range(len(data)):
        error = refusal(tmp_path, data[:length])
        assert error.offset is not None
        assert error.offset <= length


def test_an_overlong_file(tmp_path: Path) -> None:
    data = SMALL.encode()
    error = refusal(tmp_path, data + b"\0\0")
    assert (error.offset, error.found) == (len(data), "2 more bytes")


@pytest.mark.parametrize(
    ("data", "offset", "message"),
    [
        (b"GOOF" + bytes(20), 0, "magic 0x567124 of a .t tokenizer file, found 0x464f4f47"),
        (pack([], magic=0x567123), 0, "an old .t format"),
        (struct.pack("<ii", TOKENIZER_MAGIC, 12) + bytes(20), 4, "a header size that is a multiple of 8"),
        (struct.pack("<ii", TOKENIZER_MAGIC, 2**31 - 8) + bytes(20), 4, "at most 96"),
        (pack([(11, 1)]), 8, "a header key from 0 to 10, found 11"),
        (pack([(0, 1), (0, 1)]), 16, "each header key once"),
        (pack([(0, 2)]), 12, "version 1, found 2"),
        (pack([(0, 1), (1, 0)]), 20, "vocab_size from 1 to"),
        (pack([(0, 1), (1, 2**31 - 1)]), 20, "vocab_size from 1 to"),
        (pack([(0, 1), (1, 5), (2, 0)]), 28, "max_token_length from 1 to"),
        (pack([(7, -5)]), 12, "chat_template_bytes from 0 to"),
        (pack([(0, 1), (1, 5)]), 24, "header key 2 (max_token_length), found the end of the header"),
        (pack([(0, 1), (1, 5), (2, 9), (3, 5)]), 36, "bos_id below the vocabulary's size 5, found 5"),
        (pack([(0, 1), (1, 5), (2, 9), (4, -2)]), 36, "eos_id below the vocabulary's size 5, found -2"),
        (pack([(0, 1), (1, 2), (2, 9), (9, 1)], b"\2\0\0\0" + tokens(b"a", b"b")), 40, "an id below the vocabulary's size 2, found 2"),
        (pack([(0, 1), (1, 2), (2, 9), (7, 2)], b"\xff\xff" + tokens(b"a", b"b")), 40, "a chat template in UTF-8, found byte 0xff"),
        (pack([(0, 1), (1, 2**24), (2, 9)], tokens(b"a")), 32, "at least 134217728 bytes of 16777216 tokens"),
        (pack([(0, 1), (1, 2), (2, 1)], tokens(b"a", b"bb")), 45, "a length of token 1 up to max_token_length 1, found 2"),
        (pack([(0, 1), (1, 1), (2, 1)], struct.pack("<fI", float("nan"), 0)), 32, "a number as the score of token 0, found NaN"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, data: bytes, offset: int, message: str) -> None:
    error = refusal(tmp_path, data)
    assert error.offset == offset
    assert message in str(error)


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    for path, found in ((tmp_path / "none.t", "no file of this name"), (tmp_path, "a folder")):
        with pytest.raises(FormatError, match=found):
            TokenizerFile.read(path)
    os.mkfifo(tmp_path / "pipe.t")
    with pytest.raises(FormatError, match="no plain file"):
        TokenizerFile.read(tmp_path / "pipe.t")
    with (tmp_path / "x.t").open("wb") as file:
        file.truncate(2**31)
    with pytest.raises(FormatError, match="at most 1073741824 bytes"):
        TokenizerFile.read(tmp_path / "x.t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": (0.0,)}, "4 tokens and 1 scores"),
        ({"pieces": (b"a", b"", b"ab", b"x")}, "token 1 has no bytes"),
        ({"max_token_length": 4}, "max_token_length 4, found 5"),
        ({"bos_id": 4}, "bos_id below the vocabulary's size"),
        ({"eos_ids": (7,)}, "an id below the vocabulary's size"),
        ({"scores": (float("nan"),) * 4}, "NaN"),
    ],
)
def test_what_would_be_refused_is_not_written(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes).write(tmp_path / "x.t")
    assert not list(tmp_path.iterdir())


@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(-1, 12), st.one_of(st.integers(-2, 9), st.integers(-(2**31), 2**31 - 1)))))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_vocabulary_or_a_format_error(rest: bytes, pairs: list[tuple[int, int]]) -> None:
    path = Path(f"/proc/self/fd/{os.memfd_create('t')}")
    tracemalloc.start()
    try:
        for data in (rest, pack(pairs, rest), pack([(0, 1), (1, 3), (2, 9), *pairs], rest)):
            path.write_bytes(data)
            with suppress(FormatError):
                TokenizerFile.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(int(path.name))
    assert peak < 1 << 20


def test_scores_are_float32(tmp_path: Path) -> None:
    replace(SMALL, scores=(0.1, 0.2, 0.3, 0.4)).write(tmp_path / "x.t")
    assert TokenizerFile.read(tmp_path / "x.t").scores == tuple(np.float32([0.1, 0.2, 0.3, 0.4]).tolist())
