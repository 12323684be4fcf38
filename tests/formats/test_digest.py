"""Digests of model files: what they say, where they are kept, and what makes them invalid."""

import json
import os
from pathlib import Path

import pytest
from blake3 import blake3

from dairllm.errors import FormatError
from dairllm.formats import digest
from dairllm.formats.digest import compute_digests, digests_path, keep_digests, kept_digests, model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.m"
    write_random_model(path, small_spec(Architecture.QWEN3_MOE))
    return path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_each_tensor_and_the_header_have_their_own(path: Path) -> None:
    raw = path.read_bytes()
    with ModelFile.open(path) as model:
        found = compute_digests(model)
        assert found.header == blake3(raw[: model.header_bytes]).digest()
        for tensor, each in zip(model.tensors, found.tensors, strict=True):
            assert each == blake3(raw[tensor.offset : tensor.offset + tensor.nbytes]).digest()
        assert found.identity == blake3(found.header + b"".join(found.tensors)).digest()


def test_pieces_do_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelFile.open(path) as model:
        expected = compute_digests(model)
        monkeypatch.setattr(digest, "_PIECE_BYTES", 777)
        seen: list[tuple[str, int, int]] = []
        assert compute_digests(model, lambda *told: seen.append(told)) == expected
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (path.stat().st_size, path.stat().st_size)
    assert {label for label, _, _ in seen} >= {"the header", "embedding", "block_matmul_w2 of layer 1, expert 7", "final_matmul_logits"}


def test_identity_is_of_the_bytes_alone(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "called otherwise.m"
    other.write_bytes(path.read_bytes())
    with ModelFile.open(path) as one, ModelFile.open(other, max_seq_len=16) as same:
        assert compute_digests(one).identity == compute_digests(same).identity
    flip(other, other.stat().st_size - 1)
    with ModelFile.open(path) as one, ModelFile.open(other) as changed:
        a, b = compute_digests(one), compute_digests(changed)
        assert a.identity != b.identity
        assert a.differences(b, one) == ["final_matmul_logits"]


def test_a_small_file_is_given_no_companion_and_a_large_one_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ModelFile.open(path) as model:
        found = model_digests(model)
        assert not digests_path(path).exists()
        monkeypatch.setattr(digest, "WORTH_KEEPING", path.stat().st_size)
        assert model_digests(model) == found == kept_digests(model)
        monkeypatch.setattr(digest, "compute_digests", lambda *_: pytest.fail("computed though kept"))
        assert model_digests(model) == found


def test_kept_ones_hold_while_size_and_time_do(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WORTH_KEEPING", 1)
    with ModelFile.open(path) as model:
        before = model_digests(model)
    os.utime(path, ns=(5, 5))
    with ModelFile.open(path) as model:
        kept = kept_digests(model)
        assert kept is not None
        assert not kept.fits(model.stamp)
        assert model_digests(model).identity == before.identity
        kept = kept_digests(model)
        assert kept is not None
        assert kept.fits(model.stamp)


def test_what_the_file_contradicts_stays_for_verify(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "WORTH_KEEPING", 1)
    with ModelFile.open(path) as model:
        before = model_digests(model)
        place = model.tensor("block_matmul_w1", 1, 3)
    flip(path, place.offset + 5)
    with ModelFile.open(path) as model:
        now = model_digests(model)
        kept = kept_digests(model)
        assert kept == before
        assert kept.differences(now, model) == ["block_matmul_w1 of layer 1, expert 3"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: kept.update(format="dairllm digests 9"),
        lambda kept: kept.update(bytes="many"),
        lambda kept: kept.update(bytes=float("inf")),
        lambda kept: kept.update(mtime_ns=float("nan")),
        lambda kept: kept.update(bytes=[]),
        lambda kept: kept.pop("mtime_ns"),
        lambda kept: kept["digests"].pop("embedding"),
        lambda kept: kept["digests"].update(another="00" * 32),
        lambda kept: kept["digests"].update(embedding="00" * 31),
        lambda kept: kept["digests"].update(embedding="00" * 32),
        lambda kept: kept["digests"].update(embedding="zz"),
        lambda kept: kept["digests"].update(embedding=None),
        lambda kept: kept.update(digests=[]),
    ],
)
def test_a_spoilt_companion_counts_for_nothing(path: Path, spoil: object) -> None:
    with ModelFile.open(path) as model:
        assert keep_digests(model, compute_digests(model))
        kept = json.loads(digests_path(path).read_text())
        assert kept_digests(model) is not None
        spoil(kept)  # type: ignore[operator] # a parameter that is a function
        digests_path(path).write_text(json.dumps(kept))
        assert kept_digests(model) is None


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00", '{"bytes": 1e400}', "[" * 100_000], ids=lambda text: text[:8])
def test_a_companion_that_is_none_counts_for_nothing(path: Path, text: str) -> None:
    digests_path(path).write_text(text)
    with ModelFile.open(path) as model:
        assert kept_digests(model) is None


def test_a_folder_that_cannot_be_written_to_is_no_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests_path(path).mkdir()  # for root too
    monkeypatch.setattr(digest, "WORTH_KEEPING", 1)
    with ModelFile.open(path) as model:
        found = model_digests(model)
        assert found == compute_digests(model)
        assert not keep_digests(model, found)
        monkeypatch.setattr(digest, "compute_digests", lambda *_: pytest.fail("computed again in the same process"))
        assert model_digests(model) is found


def test_a_file_that_changes_while_it_is_read_is_told(path: Path) -> None:
    with ModelFile.open(path) as model:
        touched = False

        def touch(_what: str, done: int, _total: int) -> None:
            nonlocal touched
            if done and not touched:
                touched = True
                os.utime(path, ns=(7, 7))

        with pytest.raises(FormatError, match="expected the file that was opened, unchanged, found one that was written to"):
            compute_digests(model, touch)


def test_another_file_under_the_path_is_told(path: Path, tmp_path: Path) -> None:
    with ModelFile.open(path) as model:
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        copy.replace(path)
        assert model.stamp.change(path) == f"{path} has been replaced since it was opened"
        with pytest.raises(FormatError, match="the file that was opened"):
            compute_digests(model)
        path.unlink()
        assert "cannot be found any more" in str(model.stamp.change(path))
        with pytest.raises(FormatError, match="readable"):
            compute_digests(model)
