import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dairllm.commands.verify import run
from dairllm.errors import FormatError
from dairllm.formats.digest import digests_path
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from tests.patience import PATIENCE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.m"
    write_random_model(path, small_spec())
    return path


def flip(path: Path, *offsets: int) -> None:
    raw = bytearray(path.read_bytes())
    for offset in offsets:
        raw[offset] ^= 1
    path.write_bytes(raw)


def test_a_file_that_stays_the_same(path: Path, capsys: Capture) -> None:
    run(path)
    first = capsys.readouterr().out
    assert first.startswith(f"{path}: ")
    assert f"its digests are kept in {path.name}.digests)" in first
    os.utime(path, ns=(1, 1))  # a copy: another time, the same bytes
    run(path)
    again = capsys.readouterr().out
    assert "the same as before" in again
    assert again.split()[1] == first.split()[1]
    with ModelFile.open(path) as model:
        assert f"{len(model.tensors)} tensors" in again


def test_torn_tensors_are_named_and_stay_named(path: Path, capsys: Capture) -> None:
    run(path)
    with ModelFile.open(path) as model:
        torn = [model.tensor("block_matmul_wo", 0), model.tensor("block_norm_1", 1)]
    flip(path, *(tensor.offset for tensor in torn))
    for _ in range(2):
        with pytest.raises(
            FormatError, match=rf"byte {torn[0].offset}: .* other bytes in block_matmul_wo of layer 0, block_norm_1 of layer 1;"
        ):
            run(path)
    capsys.readouterr()
    with pytest.raises(FormatError):
        run(path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["torn"] == ["block_matmul_wo of layer 0", "block_norm_1 of layer 1"]
    assert not found["kept"]
    digests_path(path).unlink()  # as the message says, where it was changed on purpose
    run(path, json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["torn"], found["kept"]) == ([], True)
    assert len(found["tensors"]) == len(found["tensors"].values())
    assert found["identity"] == json.loads(digests_path(path).read_text())["identity"]


def test_many_torn_tensors_are_counted(path: Path) -> None:
    run(path)
    with ModelFile.open(path) as model:
        flip(path, *(tensor.offset for tensor in model.tensors[:8]))
    with pytest.raises(FormatError, match=r"block_matmul_q of layer 0, .* and 3 more;"):
        run(path)


def test_the_command(path: Path) -> None:
    def verify(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "dairllm", "verify", str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)

    done = verify("--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["identity"]) == 64
    flip(path, path.stat().st_size - 1)
    failed = verify()
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"dairllm: error: {path}, byte ")
    assert "other bytes in final_matmul_logits; copy the file again, or delete m.m.digests" in failed.stderr
