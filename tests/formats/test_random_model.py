from pathlib import Path

import numpy as np
import pytest

from dairllm.errors import FormatError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
def test_weights_have_the_spread_of_their_shape(tmp_path: Path, arch: Architecture, weight_type: FloatType) -> None:
    spec = small_spec(arch, weight_type, dim=128)
    write_random_model(tmp_path / "a.m", spec, seed=4)
    with ModelFile.open(tmp_path / "a.m") as file:
        assert file.spec == spec
        for tensor in file.tensors:
            values = file.values(tensor)
            assert np.isfinite(values).all()
            if "norm" in tensor.name:
                assert abs(values.mean() - 1) < 0.1
            else:
                spread = 1 if tensor.name == "embedding" else 1.6 / np.sqrt(tensor.n_columns)
                assert abs(values.std() / spread - 1) < 0.15
                assert abs(values.mean()) < 0.15 * spread


def test_the_seed_decides(tmp_path: Path) -> None:
    files = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.m"
        write_random_model(path, small_spec(), seed)
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_q80_has_no_value_that_quantizing_never_gives(tmp_path: Path) -> None:
    write_random_model(tmp_path / "a.m", small_spec(weight_type=FloatType.Q80))
    with ModelFile.open(tmp_path / "a.m") as file:
        for tensor in file.tensors:
            if tensor.float_type == FloatType.Q80:
                assert file.array(tensor).reshape(-1, 34)[:, 2:].copy().view(np.int8).min() == -127


def test_a_small_spec_can_be_changed() -> None:
    assert small_spec(dim=256, n_heads=8).head_dim == 32
    assert small_spec(head_dim=64).head_dim == 64
    assert small_spec(Architecture.QWEN3).head_dim == 32
    assert small_spec(Architecture.QWEN3_MOE, n_experts=4).n_experts == 4


def test_a_contradiction_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        write_random_model(tmp_path / "a.m", small_spec(n_kv_heads=3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [259, 262, 320, 1000])
def test_a_vocabulary_of_bytes(tmp_path: Path, vocab_size: int) -> None:
    file = byte_vocabulary(vocab_size, "{{ x }}")
    assert len(file.pieces) == len(set(file.pieces)) == vocab_size
    assert [len(piece) for piece in file.pieces[:256]] == [1] * 256
    assert file.pieces[file.bos_id or 0] == b"<|begin|>"
    assert [file.pieces[token] for token in file.eos_ids] == [b"<|end|>"]
    file.write(tmp_path / "a.t")
    assert type(file).read(tmp_path / "a.t") == file


def test_a_vocabulary_too_small_for_all_bytes() -> None:
    with pytest.raises(ValueError, match="more than 258 tokens"):
        byte_vocabulary(258)
