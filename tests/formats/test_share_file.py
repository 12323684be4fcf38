"""Files of a node's share: the bytes of the model and no others, whole or not there, whenever their writing is cut short."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from blake3 import blake3

from dairllm.errors import FormatError, LimitError
from dairllm.formats import share_writer
from dairllm.formats.digest import model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import outgoing_weights
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.formats.share_file import HEAD, ShareFile, is_share_file, share_paths
from dairllm.formats.share_writer import ShareWriter
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.slicing import deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType
from tests.patience import PATIENCE

SPEC = small_spec(dim=128, hidden_dim=256, n_layers=3)
MOE = small_spec(Architecture.QWEN3_MOE, FloatType.Q80)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.m"
    write_random_model(path, SPEC)
    return path


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_writer, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(share_writer, "_SYNC_BYTES", 20_000)


def writer_of(model: ModelFile, node: int = 1, shares: int | str = 2) -> ShareWriter:
    sizes = nearly_equal_sizes(model.spec, shares) if isinstance(shares, int) else parse_shares(shares)
    return ShareWriter(model, model_digests(model).identity, node, len(sizes), deal_shares(model.spec, sizes)[node])


def prepared(path: Path, node: int = 1, shares: int | str = 2) -> Path:
    with ModelFile.open(path) as model:
        return writer_of(model, node, shares).prepare().path


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


SHARES: list[tuple[ModelSpec, int | str]] = [
    (SPEC, 2),
    (MOE, 2),
    (small_spec(weight_type=FloatType.F32, vocab_size=322, hidden_dim=96), 3),  # the last one's classifier rows are filled up
    (small_spec(weight_type=FloatType.F32, n_heads=9, n_kv_heads=3, dim=144, hidden_dim=192), "5/64,4/128"),
    (small_spec(weight_type=FloatType.F32, n_heads=12, n_kv_heads=3, dim=192, hidden_dim=192), "5/64,5/64,2/64"),  # heads that lie apart
]


@pytest.mark.parametrize(("spec", "shares"), SHARES)
def test_it_holds_what_a_root_would_send(tmp_path: Path, spec: ModelSpec, shares: int | str) -> None:
    path = tmp_path / "m.m"
    write_random_model(path, spec)
    n_nodes = shares if isinstance(shares, int) else len(shares.split(","))
    for node in range(n_nodes):
        with ModelFile.open(path) as model:
            share = writer_of(model, node, shares)
            sizes = nearly_equal_sizes(spec, shares) if isinstance(shares, int) else parse_shares(shares)
            done = share.prepare()
            assert (done.state, done.nbytes, done.path) == (
                "written",
                share.path.stat().st_size,
                path.with_name(f"m.m.share-{node}-of-{n_nodes}"),
            )
            file = ShareFile.open(done.path)
            assert file.place("block_matmul_q", 0) is None
            file.locate(model)
            raw, seen = done.path.read_bytes(), 0
            for weight in outgoing_weights(model, deal_shares(spec, sizes)[node], -(-spec.vocab_size // n_nodes)):
                place = file.place(weight.name, weight.layer)
                if "norm" in weight.name:
                    assert place is None
                    continue
                assert place is not None
                expert = weight.offset // weight.nbytes
                start = place.offset + expert * place.expert_stride
                assert start % 64 == 0
                expected = memoryview(bytearray(weight.nbytes))
                weight.read(0, weight.n_rows, expected)
                assert raw[start : start + weight.nbytes] == expected, weight
                assert (place.n_rows, place.row_bytes) == (weight.n_rows, weight.row_bytes)
                seen += 1
            assert seen == len(file.contents.slices)
            assert list(file.torn()) == []
            file.close()
    assert len(share_paths(path)) == n_nodes


def test_one_pass_goes_through_it_from_begin_to_end(path: Path) -> None:
    with ModelFile.open(path) as model:
        file = ShareFile.open(prepared(path))
        file.locate(model)
        names = ["q", "k", "v", "wo", "w1", "w3", "w2"]
        order = [(f"block_matmul_{name}", layer) for layer in range(SPEC.n_layers) for name in names] + [("final_matmul_logits", 0)]
        places = [place.offset for key in order if (place := file.place(*key))]
        assert places == sorted(places)
        assert len(places) == len(order)


def test_torn_slices_are_named(path: Path) -> None:
    share = prepared(path)
    file = ShareFile.open(share)
    label, offset, _ = file.contents.slices[3]
    begin = share.stat().st_size - file.contents.nbytes
    file.close()
    flip(share, begin + offset + 7)
    flip(share, share.stat().st_size - 1)
    assert list(ShareFile.open(share).torn()) == [(label, begin + offset), ("final_matmul_logits", begin + file.contents.slices[-1][1])]
    with ModelFile.open(path) as model:  # and made anew
        assert writer_of(model).prepare().state == "written"
        assert writer_of(model).prepare().state == "whole"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda raw: b"", "which begins with"),
        (lambda raw: b"x" + raw[1:], "which begins with"),
        (lambda raw: raw[:60], "the length of a description"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "the length of a description"),
        (lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:], "is sealed"),
        (lambda raw: raw[:70] + bytes([raw[70] ^ 1]) + raw[71:], "description"),
        (lambda raw: raw[:-1], "bytes"),
        (lambda raw: raw + b"0", "bytes"),
    ],
)
def test_what_is_no_share_is_refused(path: Path, change: object, problem: str) -> None:
    share = prepared(path)
    share.write_bytes(change(share.read_bytes()))  # type: ignore[operator] # a parameter that is a function
    with pytest.raises(FormatError, match=problem):
        ShareFile.open(share)
    with ModelFile.open(path) as model:
        assert not writer_of(model).is_there
        assert writer_of(model).prepare().state == "written"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"node": 1', b'"node": 1e400'),
        (b'"nodes": 2', b'"nodes": Infinity'),
        (b'"nodes": 2', b'"nodes": 2.0'),
        (b'"nodes": 2', b'"nodes": 0'),
        (b'"ffn": [', b'"logits": [9, 8], "ffn": [9, 8], "x": ['),
        (b'"ffn": [', b'"ffn": [NaN, '),
        (b'"logits": [', b'"logits": [-Infinity, '),
        (b'["block_matmul_q of layer 0", 0,', b'["block_matmul_q of layer 0", 1e999,'),
        (b'"slices": [', b'"slices": ' + b"[" * 100_000),
    ],
    ids=lambda text: repr(text[:24]),
)
def test_a_sealed_description_with_hostile_numbers(path: Path, old: bytes, new: bytes) -> None:
    """Whoever makes such a file seals it."""
    share = prepared(path)
    raw = share.read_bytes()
    magic, length, _ = HEAD.unpack_from(raw)
    description, digests = raw[HEAD.size : HEAD.size + length], raw[HEAD.size + length : HEAD.size + length + 3200]
    assert old in description
    changed = description.replace(old, new)
    share.write_bytes(HEAD.pack(magic, len(changed), blake3(changed + digests).digest()) + changed + digests)
    with pytest.raises(FormatError, match="expected the description of a share, found another text: ValueError"):
        ShareFile.open(share)


def test_no_share_of_another_model(path: Path, tmp_path: Path) -> None:
    share = ShareFile.open(prepared(path))
    for changes in ({"n_layers": 2}, {"hidden_dim": 128}, {"vocab_size": 640}):
        other = tmp_path / "other.m"
        write_random_model(other, small_spec(**{"dim": 128, "hidden_dim": 256, "n_layers": 3} | changes))
        with ModelFile.open(other) as model, pytest.raises(FormatError, match=r"a share of other\.m|slices of a share"):
            share.locate(model)


CHILD = """
import os, signal, sys
from pathlib import Path
from dairllm.formats import share_writer
from tests.formats.test_share_file import ModelFile, writer_of
share_writer._PIECE_BYTES, share_writer._SYNC_BYTES = 1000, 20_000
def progress(label, done, total):
    if done > total * float(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
with ModelFile.open(sys.argv[1]) as model:
    writer_of(model).prepare(progress)
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_it_goes_on_where_it_was_cut_short(path: Path, tmp_path: Path, name: str) -> None:
    reference = tmp_path / "reference" / "m.m"
    reference.parent.mkdir()
    shutil.copy(path, reference)
    expected = prepared(reference).read_bytes()
    for part in ("0.4", "0.8"):
        command = [sys.executable, "-c", CHILD, str(path), part, name]
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, cwd=Path(__file__).parents[2])
        assert done.returncode == -getattr(signal, name), done.stderr
        assert share_paths(path) == []
    told: list[int] = []
    with ModelFile.open(path) as model:
        writer = writer_of(model)
        assert writer.part_path.exists()
        assert writer.prepare(lambda _label, at, _total: told.append(at)).state == "continued"
        assert not writer.part_path.exists()
        assert writer.path.read_bytes() == expected
        assert told == sorted(told)
        assert writer.prepare().state == "whole"


def cut_short(path: Path, part: float) -> Path:
    """The part that an attempt has left."""

    class CutError(Exception):
        pass

    def progress(_label: str, done: int, total: int) -> None:
        if done > part * total:
            raise CutError

    with ModelFile.open(path) as model:
        writer = writer_of(model)
        with pytest.raises(CutError):
            writer.prepare(progress)
        return writer.part_path


def test_a_half_file_under_the_name_of_a_whole_one_is_none(path: Path) -> None:
    part = cut_short(path, 0.6)
    part.rename(path.with_name("m.m.share-1-of-2"))
    assert is_share_file(share_paths(path)[0])
    with pytest.raises(FormatError, match="is sealed"):
        ShareFile.open(share_paths(path)[0])


@pytest.mark.parametrize("place", [0.2, 0.5])
def test_a_part_that_was_torn_meanwhile_is_kept_as_far_as_it_is_right(path: Path, place: float) -> None:
    expected = prepared(path).read_bytes()
    share_paths(path)[0].unlink()
    part = cut_short(path, 0.9)
    flip(part, int(len(expected) * place))
    with ModelFile.open(path) as model:
        assert writer_of(model).prepare().state == "continued"
    assert share_paths(path)[0].read_bytes() == expected


def test_a_part_of_another_model_is_begun_anew(path: Path) -> None:
    cut_short(path, 0.9)
    write_random_model(path, SPEC, seed=5)
    with ModelFile.open(path) as model:
        assert writer_of(model).prepare().state == "written"
        assert list(ShareFile.open(share_paths(path)[0]).torn()) == []


def test_a_model_that_is_written_to_meanwhile(path: Path) -> None:
    def progress(_label: str, done: int, total: int) -> None:
        if done > total // 2:
            os.utime(path, ns=(1, 1))

    with ModelFile.open(path) as model, pytest.raises(FormatError, match=r"m\.m: expected the file that was opened, unchanged"):
        writer_of(model).prepare(progress)
    assert share_paths(path) == []


def test_a_full_disk_is_noticed_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**6, 10**6, 1000))
    with ModelFile.open(path) as model, pytest.raises(LimitError, match=r"share-1-of-2: .* are to be written, and its disk has 1000B free"):
        writer_of(model).prepare()
    assert list(path.parent.iterdir()) == [path]


def test_one_at_a_time(path: Path) -> None:
    with ModelFile.open(path) as model:
        writer, other = writer_of(model), writer_of(model)

        def progress(_label: str, done: int, total: int) -> None:
            if done < total:
                with pytest.raises(LimitError, match="is being prepared by another process"):
                    other.prepare()

        assert writer.prepare(progress).state == "written"
        assert other.prepare().state == "whole"
