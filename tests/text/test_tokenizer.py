"""Ids by the model's own tokenizer where it lies beside the `.t` file, by greedy merging otherwise; text by the `.t` file's bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import models, normalizers

from dairllm.errors import FormatError
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.text.tokenizer import Tokenizer

TINY = Path(__file__).parent.parent / "data" / "dllama" / "tiny.t"
GOLDEN = TINY.with_name("golden.json")

Edit = Callable[[Callable[[dict[str, Any]], None]], None]

VECTORS = [
    # text, ids of the model's own tokenizer, ids by greedy merging
    ("", [], []),
    (" ", [222], [222]),
    ("the cat", [259, 263], [259, 263]),
    ("     the", [265, 260], [265, 260]),
    ("best testes", [67, 271, 222, 85, 271, 270], [67, 271, 222, 85, 271, 270]),
    ("a1234b", [66, 18, 19, 20, 21, 67], [66, 267, 21, 67]),
    ("<|turn|>the<|end|>", [1, 259, 0], [1, 259, 0]),
    ("<|turn", [29, 93, 85, 86, 83, 79], [29, 93, 85, 86, 83, 79]),
    ("\n\n\n", [269, 200], [269, 200]),
    ("\ttab", [199, 85, 66, 67], [199, 85, 66, 67]),
    ("caté", [262, 268], [262, 268]),
    ("中", [162, 118, 257], [162, 118, 257]),
    ("😀", [174, 255, 248, 224], [174, 255, 248, 224]),
]


def test_the_models_own_tokenizer_is_used(model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder / "small.t")
    assert tokenizer.encoder == "tokenizer.json"
    assert tokenizer.special_ids == {0, 1}


@pytest.mark.parametrize(("text", "own", "greedy"), VECTORS, ids=[repr(vector[0]) for vector in VECTORS])
def test_recorded_ids(model_folder: Path, text: str, own: list[int], greedy: list[int]) -> None:
    assert Tokenizer.load(model_folder / "small.t").encode(text) == own
    (model_folder / "tokenizer.json").unlink()
    assert Tokenizer.load(model_folder / "small.t").encode(text) == greedy


def test_without_it_the_t_file_alone(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    with structlog.testing.capture_logs() as logs:
        tokenizer = Tokenizer.load(model_folder / "small.t")
    assert tokenizer.encoder == ".t"
    assert not logs
    assert tokenizer.special_ids == {0, 1}, "the last id, which stands in for bos, is the end of a word to a reader"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: document["model"]["vocab"].update({"extra": 999}), "it has 273 tokens, the .t file 272"),
        (lambda document: document["model"]["vocab"].update({"est": 300}), "it has no token 271"),
        (
            lambda document: document["added_tokens"][1].update({"content": "<|other|>"}),
            "token 1 is b'<|other|>', in the .t file b'<|turn|>'",
        ),
        (lambda document: document["model"]["vocab"].update(th=261, ca=258), "token 258 is b'ca', in the .t file b'th'"),
        (lambda document: document["model"]["vocab"].update(th=263, Ġcat=258), "token 258 is b' cat', in the .t file b'th'"),
        (lambda document: document.pop("model"), "it cannot be read as a tokenizer: 'model'"),
        (lambda document: document["model"].update({"type": "Nonesuch"}), "it cannot be read as a tokenizer"),
        (
            lambda document: document.update(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
            "it cannot be read as a tokenizer: the library panics: Precompiled",
        ),
        (lambda document: document["model"].update(continuing_subword_prefix="##"), "it cannot be read as a tokenizer: merge"),
        (
            lambda document: document["added_tokens"][1].update({"content": "\x1b[2J" * 1000}),
            "token 1 is b'\\x1b[2J\\x1b[2J",
        ),
    ],
    ids=[
        *("more", "other id", "other piece", "of one length", "of other lengths"),
        *("no model", "unknown kind", "a panic", "an abort", "a long name"),
    ],
)
def test_another_vocabulary_is_a_warning(
    model_folder: Path, edit_tokenizer_json: Edit, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    edit_tokenizer_json(change)
    with structlog.testing.capture_logs() as logs:
        tokenizer = Tokenizer.load(model_folder / "small.t")
    assert tokenizer.encoder == ".t"
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert logs[0]["file"] == str(model_folder / "tokenizer.json")
    assert logs[0]["reason"].startswith(reason)
    assert logs[0]["reason"].isprintable()
    assert len(logs[0]["reason"]) < 500


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_torn_file_is_a_warning(model_folder: Path, content: bytes) -> None:
    (model_folder / "tokenizer.json").write_bytes(content)
    with structlog.testing.capture_logs() as logs:
        assert Tokenizer.load(model_folder / "small.t").encoder == ".t"
    assert len(logs) == 1


def test_a_file_that_panics_when_it_is_used(model_folder: Path, edit_tokenizer_json: Edit) -> None:
    edit_tokenizer_json(lambda document: document.update(pre_tokenizer={"type": "FixedLength", "length": 0}))
    tokenizer = Tokenizer.load(model_folder / "small.t")
    with pytest.raises(
        FormatError, match=r"tokenizer\.json: expected a tokenizer that can encode any text, found the library panics: chunk"
    ):
        tokenizer.encode("the cat")


def test_one_that_cannot_be_read_is_a_warning(model_folder: Path) -> None:
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "tokenizer.json").mkdir()
    with structlog.testing.capture_logs() as logs:
        assert Tokenizer.load(model_folder / "small.t").encoder == ".t"
    assert "Is a directory" in logs[0]["reason"]


def test_truncation_and_padding_of_the_file_are_not_ours(model_folder: Path, edit_tokenizer_json: Edit) -> None:
    """Files are often saved with the settings of a training run."""

    def limit(document: dict[str, Any]) -> None:
        document["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
        document["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
        document["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|end|>"}

    edit_tokenizer_json(limit)
    assert Tokenizer.load(model_folder / "small.t").encode("the cat the cat the cat") == [259, 263, 260, 263, 260, 263]


def test_sentencepiece_names_are_their_bytes(tmp_path: Path) -> None:
    """U+2581 is a space and <0x0A> a byte, as distributed-llama's converter writes them."""
    names = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "▁a"]
    library = LibraryTokenizer(
        models.BPE({name: token for token, name in enumerate(names)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")  # noqa: S106
    )
    library.normalizer = normalizers.Replace(" ", "▁")
    library.add_special_tokens(names[:3])
    library.save(str(tmp_path / "tokenizer.json"))
    pieces = (b"<unk>", b"<s>", b"</s>", b"\n", b" ", b"a", b" a")
    TokenizerFile(pieces, (0.0,) * 7, 1, (2,), True, None, 5).write(tmp_path / "m.t")
    tokenizer = Tokenizer.load(tmp_path / "m.t")
    assert tokenizer.encoder == "tokenizer.json"
    assert tokenizer.encode_prompt(" a\na") == [1, 6, 3, 5]
    assert tokenizer.decode([1, 6, 3, 5, 2]) == " a\na"


def test_the_prompt_of_the_golden_answers() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for model in golden["models"].values():
        assert Tokenizer.load(TINY).encode_prompt(golden["prompt"]) == model["prompt_ids"]


def test_a_prompt_begins_once() -> None:
    """A chat template often writes the first token itself."""
    tokenizer = Tokenizer.load(TINY)
    assert tokenizer.encode("the") == [256, 101]
    assert tokenizer.encode_prompt("the") == [317, 256, 101]
    assert tokenizer.encode_prompt(tokenizer.bos_text + "the") == [317, 256, 101]
    assert tokenizer.encode_prompt("") == [317]


def test_what_the_file_says() -> None:
    tokenizer = Tokenizer.load(TINY)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.add_bos, tokenizer.eos_ids) == (320, 317, True, {318})
    assert (tokenizer.bos_text, tokenizer.eos_text) == ("<|begin|>", "<|end|>")
    assert tokenizer.special_ids == {317, 318, 319}


def test_a_stand_in_for_bos_is_no_text_to_begin_with(model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder / "small.t")
    assert (tokenizer.bos_text, tokenizer.eos_text) == ("", "<|end|>")
    assert tokenizer.encode_prompt("est") == tokenizer.encode("est") == [271]
    (model_folder / "tokenizer.json").unlink()
    assert Tokenizer.load(model_folder / "small.t").decode([85, 271]) == "test"


def test_special_tokens_are_not_printed_unless_asked_for() -> None:
    tokenizer = Tokenizer.load(TINY)
    ids = tokenizer.encode("<|begin|>the<|turn|>cat<|end|>")
    assert tokenizer.decode(ids) == "thecat"
    assert tokenizer.decode(ids, show_special=True) == "<|begin|>the<|turn|>cat<|end|>"


@given(st.text())
def test_text_comes_back(text: str) -> None:
    tokenizer = _tiny()
    assert tokenizer.decode(tokenizer.encode(text), show_special=True) == text


def test_bytes_that_are_no_text_come_back_from_a_command_line() -> None:
    tokenizer = _tiny()
    text = b"a\xff\xc3b".decode("utf-8", "surrogateescape")
    assert tokenizer.encode(text) == [97, 255, 195, 98]
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a�b", "half a surrogate pair, as a careless client sends it"


def test_the_models_own_tokenizer_gets_replacements_for_them(model_folder: Path) -> None:
    tokenizer = Tokenizer.load(model_folder / "small.t")
    assert tokenizer.encode("a\udcffb") == tokenizer.encode("a�b")


def test_a_file_of_another_kind() -> None:
    with pytest.raises(FormatError, match=r"golden\.json: expected a \.t tokenizer file, found a JSON file"):
        Tokenizer.load(GOLDEN)


def _tiny(cache: list[Tokenizer] = []) -> Tokenizer:  # noqa: B006 - one for all examples of a property
    if not cache:
        cache.append(Tokenizer.load(TINY))
    return cache[0]
