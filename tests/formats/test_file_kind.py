"""The wrong file: what it is, and what to do with it, whichever reader is given it."""

import json
import struct
from pathlib import Path

import pytest

from dairllm.errors import FormatError
from dairllm.formats.file_kind import check_is_model, is_gguf
from dairllm.formats.gguf import GgufFile
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.formats.tokenizer_file import TokenizerFile

KINDS = {
    "x.gguf": (b"GGUF" + bytes(100), "found a GGUF file: dairllm convert {path} {folder}/x.m"),
    "x.t": (byte_vocabulary(300).encode(), "found a .t tokenizer file; the model that it belongs to is probably {folder}/x.m"),
    "x.m.share-1-of-2": (b"dairllm share 1\n" + bytes(100), "found one node's share of a model; name the model, x.m,"),
    "x.safetensors": (struct.pack("<Q", 20) + b'{"__metadata__":{}}', "found a safetensors file, which cannot be read: a GGUF file"),
    "x.bin": (b"PK\x03\x04" + bytes(60), "found a PyTorch file, which cannot be read: a GGUF file"),
    "x.pth": (b"\x80\x02}q\x00" + bytes(60), "found a PyTorch file"),
    "lfs.m": (b"version https://git-lfs.github.com/spec/v1\noid", "found a pointer of Git LFS in place of the file itself"),
    "page.m": (b"\n<!DOCTYPE html><html>", "found an HTML page in place of the file"),
    "tokenizer.json": (json.dumps({"model": {}}, indent=2).encode(), "found a model's tokenizer.json, which is used where it lies beside"),
    "x.json": (b'{"a": 1}', "found a JSON file"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_model_that_is_none(tmp_path: Path, name: str) -> None:
    data, message = KINDS[name]
    path = tmp_path / name
    path.write_bytes(data)
    expected = f"{path}: expected a .m model file, {message.format(path=path, folder=tmp_path)}"
    for read in (ModelFile.open, check_is_model):
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value).startswith(expected)


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    for name, (data, message) in KINDS.items():
        if name == "x.t":
            continue
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            TokenizerFile.read(path)
        assert str(caught.value).startswith(f"{path}: expected a .t tokenizer file, {message.format(path=path, folder=tmp_path)}")


def test_the_tokenizer_of_a_model_is_named(tmp_path: Path) -> None:
    write_random_model(tmp_path / "x.m", small_spec())
    with pytest.raises(FormatError) as caught:
        TokenizerFile.read(tmp_path / "x.m")
    found = f"a .m model file; its tokenizer is probably {tmp_path / 'x.t'}"
    assert str(caught.value) == f"{tmp_path / 'x.m'}: expected a .t tokenizer file, found {found}"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("some-modle{}", "no file of this name; did you mean {folder}/some-model{suffix}?"),
        ("quite-another{}", "no file of this name"),
        ("modles/some-model{}", "no folder {folder}/modles"),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, name: str, found: str) -> None:
    for suffix, kind, read in (
        (".m", "a readable .m model file", ModelFile.open),
        (".t", "a readable .t tokenizer file", TokenizerFile.read),
        (".gguf", "a readable GGUF file", GgufFile.open),
    ):
        (tmp_path / f"some-model{suffix}").touch()
        path = tmp_path / name.format(suffix)
        with pytest.raises(FormatError) as caught:
            read(path)
        assert str(caught.value) == f"{path}: expected {kind}, found {found.format(folder=tmp_path, suffix=suffix)}"


def test_a_source_that_is_none(tmp_path: Path) -> None:
    write_random_model(tmp_path / "x.m", small_spec())
    with pytest.raises(FormatError, match=r"expected a GGUF file, .* found a \.m model file, which needs no conversion"):
        GgufFile.open(tmp_path / "x.m")
    for name, (data, message) in KINDS.items():
        if name == "x.gguf":
            continue
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            GgufFile.open(path)
        assert message.format(path=path, folder=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ((), "found a folder"),
        (("config.json", "model-00001-of-00002.safetensors"), "found a Hugging Face folder, which cannot be read: a GGUF file"),
        (("a.txt", "some.m", "some.t"), "found a folder; it has {folder}/some.m"),
        (("some.Q4_0.gguf",), "found a folder; it has {folder}/some.Q4_0.gguf"),
    ],
)
def test_a_folder(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    for read in (ModelFile.open, TokenizerFile.read, GgufFile.open, check_is_model):
        with pytest.raises(FormatError) as caught:
            read(tmp_path)
        assert str(caught.value).endswith(found.format(folder=tmp_path)) or f"{found} of the same model" in str(caught.value)


def test_models_are_models(tmp_path: Path) -> None:
    path = tmp_path / "x.m"
    write_random_model(path, small_spec())
    check_is_model(path)
    check_is_model(tmp_path / "none.m")
    path.write_bytes(b"")
    with pytest.raises(FormatError, match=r"expected a \.m model file, found an empty file"):
        check_is_model(path)
    path.write_bytes(b"something else that nobody knows")
    check_is_model(path)
    assert not is_gguf(path)
    assert not is_gguf(tmp_path)
    path.write_bytes(b"GGUF")
    assert is_gguf(path)
