import json
import subprocess
import sys
from pathlib import Path

import pytest

from dairllm.commands import prepare, verify
from dairllm.errors import ConfigError, FormatError, GraphError
from dairllm.formats.random_model import small_spec, write_random_model
from tests.patience import PATIENCE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "m.m"
    write_random_model(path, small_spec())
    return path


def test_all_nodes_shares_and_again(path: Path, capsys: Capture) -> None:
    prepare.run(path, nodes=2)
    first = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in first] == [f"{path}.share-0-of-2", f"{path}.share-1-of-2"]
    assert all(line.endswith("  written") for line in first)
    prepare.run(path, nodes=2)
    assert capsys.readouterr().out.count("whole already") == 2


def test_one_node_as_json(path: Path, capsys: Capture) -> None:
    prepare.run(path, shares="2/96,2/32", only=1, json=True)
    found = json.loads(capsys.readouterr().out)
    (only,) = found["files"]
    assert (found["nodes"], only["node"], only["state"], only["path"]) == (2, 1, "written", f"{path}.share-1-of-2")
    assert only["bytes"] == Path(only["path"]).stat().st_size
    verify.run(Path(only["path"]), json=True)
    seen = json.loads(capsys.readouterr().out)
    assert seen["digest"] == only["digest"]
    assert seen["identity"] == found["identity"]
    assert (seen["node"], seen["nodes"], seen["torn"]) == (1, 2, [])


def test_verify_names_what_is_torn(path: Path, capsys: Capture) -> None:
    prepare.run(path, nodes=2, only=1)
    share = path.with_name("m.m.share-1-of-2")
    capsys.readouterr()
    verify.run(share)
    assert capsys.readouterr().out.startswith(f"{share}: node 1 of 2 nodes' share of ")
    raw = bytearray(share.read_bytes())
    raw[-1] ^= 1
    share.write_bytes(raw)
    with pytest.raises(FormatError, match=r"other bytes in final_matmul_logits; run it again"):
        verify.run(share)
    with pytest.raises(FormatError):
        verify.run(share, json=True)
    assert json.loads(capsys.readouterr().out)["torn"] == ["final_matmul_logits"]
    prepare.run(path, nodes=2, only=1)
    verify.run(share)


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({}, ConfigError, "--nodes or --shares"),
        ({"nodes": 1}, ConfigError, "1 node: "),
        ({"nodes": 0}, ConfigError, "0 nodes: "),
        ({"nodes": 3, "shares": "2/64,2/64"}, ConfigError, "--nodes 3, but --shares has 2"),
        ({"nodes": 2, "only": 2}, ConfigError, "--node 2: there are nodes 0"),
        ({"nodes": 9}, GraphError, "9 nodes cannot share this model"),
        ({"shares": "1/64,2/64"}, GraphError, "the nearest that can be dealt"),
    ],
)
def test_what_cannot_be_shared(path: Path, options: dict[str, object], error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        prepare.run(path, **options)  # type: ignore[arg-type] # options of any kind, by the table above
    assert list(path.parent.iterdir()) == [path]


def test_a_torn_model_is_not_spread(path: Path) -> None:
    verify.run(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=r"what m\.m\.digests was made of, found other bytes in final_matmul_logits"):
        prepare.run(path, nodes=2)
    assert not path.with_name("m.m.share-0-of-2").exists()


def test_the_command(path: Path) -> None:
    command = [sys.executable, "-m", "dairllm", "prepare", str(path), "--nodes", "2", "--node", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["files"][0]["state"] == "written"
