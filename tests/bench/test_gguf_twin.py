from pathlib import Path

import pytest

from dairllm.bench.gguf_twin import gguf_twin
from dairllm.errors import ConfigError
from dairllm.formats.gguf import GgufFile
from dairllm.formats.gguf_llama import llama_spec, tensor_sources
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
def test_the_same_bytes_under_names_that_a_converter_finds(tmp_path: Path, weight_type: FloatType) -> None:
    source, target = tmp_path / "a.m", tmp_path / "a.gguf"
    write_random_model(source, small_spec(weight_type=weight_type))
    gguf_twin(source, target)
    with ModelFile.open(source) as model, GgufFile.open(target) as twin:
        assert llama_spec(twin, weight_type) == model.spec
        find = tensor_sources(twin, model.tensors)
        assert len(twin.tensors) == len(model.tensors)
        for tensor in model.tensors:
            found = find(tensor)
            assert twin.raw_rows(found, 0, found.n_rows).tobytes() == model.raw[tensor.offset : tensor.offset + tensor.nbytes].tobytes()


def test_no_twin_of_another_architecture(tmp_path: Path) -> None:
    source = tmp_path / "a.m"
    write_random_model(source, small_spec(Architecture.QWEN3))
    with pytest.raises(ConfigError, match="models of the Llama architecture"):
        gguf_twin(source, tmp_path / "a.gguf")
