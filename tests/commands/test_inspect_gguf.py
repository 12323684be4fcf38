import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from dairllm.commands import inspect
from dairllm.errors import ConfigError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("general.name", "A \x1b[2Jname")
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(100)])
    writer.add_array("few", [1, 2, 3])
    for layer in range(2):
        writer.add_tensor(f"blk.{layer}.attn_q.weight", np.zeros((4, 32), np.float32))
    raw = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("output.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "x.gguf"


def test_a_table_for_people(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run(source)
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith(f"{source}: a GGUF file of {source.stat().st_size} bytes (")
    assert "general.architecture llama" in lines
    assert "general.name A \\x1b[2Jname" in lines
    assert "tokenizer.ggml.tokens a list of 100" in lines
    assert "few [1, 2, 3]" in lines
    assert lines[-1].endswith("72 q4_0 2 x 64 output.weight")


def test_one_layer(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.run(source, layer=1, json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"length": 100}
    assert found["metadata"]["few"] == [1, 2, 3]
    (tensor,) = found["tensors"]
    assert {**tensor, "offset": 0} == {"name": "blk.1.attn_q.weight", "type": "f32", "shape": [4, 32], "offset": 0, "bytes": 512}
    with pytest.raises(ConfigError, match="has no layer 2"):
        inspect.run(source, layer=2)
