import json
from pathlib import Path

import pytest

from dairllm.commands.inspect import run
from dairllm.errors import ConfigError, FormatError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture
from dairllm.graph.types import RopeType


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    path = tmp_path / "moe.m"
    write_random_model(path, small_spec(Architecture.QWEN3_MOE))
    return path


def test_a_table_for_people(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(moe)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{moe}: {moe.stat().st_size} bytes (")
    assert any(line.split() == ["arch", "qwen3_moe"] for line in lines)
    assert any(line.split() == ["n_experts", "8"] for line in lines)
    with ModelFile.open(moe) as file:
        norm, w1, w3 = file.tensor("block_norm_1", 1), file.tensor("block_matmul_w1", 1), file.tensor("block_matmul_w3", 1, 7)
    assert [str(norm.offset), "256", "f32", "64", "1", "block_norm_1"] in [line.split() for line in lines]
    experts = next(line for line in reversed(lines) if line.endswith("w1, w2, w3 of 8 experts")).split()
    assert experts[:2] == [str(w1.offset), str(w3.offset + w3.nbytes - w1.offset)]
    assert lines[-1].endswith("final_matmul_logits")


def test_one_layer_with_every_expert(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(moe, layer=1)
    out = capsys.readouterr().out
    assert "block_matmul_w2, expert 7" in out
    assert "embedding" not in out


def test_json(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(moe, json=True)
    found = json.loads(capsys.readouterr().out)
    with ModelFile.open(moe) as file:
        assert (found["path"], found["bytes"], found["header_bytes"]) == (str(moe), file.nbytes, file.header_bytes)
        assert len(found["tensors"]) == len(file.tensors)
    assert found["header"]["weight_type"] == "q40"
    first, last = found["tensors"][0], found["tensors"][-1]
    assert first == {
        "name": "embedding",
        "layer": None,
        "expert": None,
        "type": "f32",
        "shape": [320, 64],
        "offset": found["header_bytes"],
        "bytes": 81920,
        "row_bytes": 256,
    }
    assert last["offset"] + last["bytes"] == found["bytes"]
    run(moe, layer=0, json=True)
    assert {tensor["layer"] for tensor in json.loads(capsys.readouterr().out)["tensors"]} == {0}


def test_rope_scaling_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaled = small_spec(
        rope_type=RopeType.LLAMA3_1,
        rope_scaling_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_orig_max_seq_len=8192,
    )
    write_random_model(tmp_path / "a.m", scaled)
    run(tmp_path / "a.m")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rope_scaling_factor", "8"] in lines
    assert ["rope_orig_max_seq_len", "8192"] in lines


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(moe: Path, layer: int) -> None:
    with pytest.raises(ConfigError, match=f"has layers 0 to 1, not {layer}"):
        run(moe, layer=layer)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no file of this name"):
        run(tmp_path / "none.m")
