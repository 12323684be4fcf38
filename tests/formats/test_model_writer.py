from pathlib import Path

import numpy as np
import pytest

from dairllm.errors import FormatError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_writer import ModelWriter
from dairllm.formats.quants import quantize
from dairllm.formats.random_model import small_spec
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
def test_values_and_bytes_in_pieces(tmp_path: Path, weight_type: FloatType) -> None:
    path = tmp_path / "model.m"
    random = np.random.default_rng(0)
    written = {}
    with ModelWriter(path, small_spec(Architecture.QWEN3_MOE, weight_type)) as model:
        for number, tensor in enumerate(model.tensors):
            values = random.standard_normal(tensor.shape, dtype=np.float32)
            raw = quantize(tensor.float_type, values.reshape(tensor.n_rows, -1))
            pieces = [values, [values[:5], values[5:]], raw, (raw[row : row + 7] for row in range(0, len(raw), 7))]
            model.write_tensor(tensor.name, pieces[0 if values.ndim == 1 else number % 4], tensor.layer, tensor.expert)
            written[tensor] = raw
    with ModelFile.open(path) as file:
        assert file.nbytes == model.nbytes
        for tensor in file.tensors:
            assert file.array(tensor).tobytes() == written[tensor].tobytes()


def test_a_file_that_was_made_before_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "model.m"
    path.write_bytes(b"old")

    def write_some() -> None:
        with ModelWriter(path, small_spec()) as model:
            model.write_header()
            model.write_tensor("embedding", np.zeros((320, 64), np.float32))

    with pytest.raises(ValueError, match="is not complete: block_matmul_q of layer 0 has not been written"):
        write_some()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), ModelWriter(tmp_path / "model.m", small_spec()):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_only_the_next_tensor_can_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"the next tensor of .* is embedding, not final_norm of layer 0, expert 0"),
        ModelWriter(tmp_path / "model.m", small_spec()) as model,
    ):
        model.write_tensor("final_norm", np.zeros(64, np.float32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((319, 64), np.float32), "has 320 rows, not 319"),
        ([np.zeros((300, 64), np.float32)] * 2, "has 320 rows, not 600"),
        (np.zeros((320, 32), np.float32), "64 float32 values or 256 bytes, not 32 of float32"),
        (np.zeros((320, 64), np.float64), "not 64 of float64"),
        (np.zeros((320, 64), np.uint8), "not 64 of uint8"),
    ],
)
def test_data_of_another_shape(tmp_path: Path, data: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message), ModelWriter(tmp_path / "model.m", small_spec()) as model:
        model.write_tensor("embedding", data)
    assert not list(tmp_path.iterdir())


def test_a_contradictory_spec_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="n_kv_heads that divides n_heads"):
        ModelWriter(tmp_path / "model.m", small_spec(n_kv_heads=3))


def test_outside_of_a_with_statement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with statement"):
        ModelWriter(tmp_path / "model.m", small_spec()).write_header()
