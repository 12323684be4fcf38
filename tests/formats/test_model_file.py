import gc
import mmap
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.errors import FormatError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_header import HeaderKey, encode_header
from dairllm.formats.quants import dequantize_q40
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType

DLLAMA = Path(__file__).parents[1] / "data" / "dllama"
FIXTURES = ("llama_f32", "llama_q40", "llama31_q40", "qwen3_q40", "qwen3_moe_q40")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.m"
    write_random_model(path, small_spec(), seed=1)
    return path


def refusal(path: Path) -> FormatError:
    with pytest.raises(FormatError) as caught:
        ModelFile.open(path)
    assert caught.value.path == path
    return caught.value


@pytest.mark.parametrize("name", FIXTURES)
def test_files_that_the_cpp_program_reads(name: str) -> None:
    with ModelFile.open(DLLAMA / f"{name}.m") as file:
        last = file.tensors[-1]
        assert last.offset + last.nbytes == file.nbytes == (DLLAMA / f"{name}.m").stat().st_size
        assert (file.spec.weight_type == FloatType.F32) == name.endswith("f32")
        assert file.spec.seq_len == file.file_seq_len
        norm = file.array(file.tensor("final_norm"))
        assert abs(norm.mean() - 1) < 0.1  # as it was made; bytes from elsewhere would not be near 1
        assert np.isfinite(file.values(file.tensor("block_matmul_w2", file.spec.n_layers - 1))).all()


def test_views_are_of_the_file_itself(model: Path) -> None:
    data = np.frombuffer(model.read_bytes(), np.uint8)
    with ModelFile.open(model) as file:
        assert np.array_equal(file.raw, data)
        for tensor in file.tensors:
            array = file.array(tensor)
            assert array.tobytes() == data[tensor.offset : tensor.offset + tensor.nbytes].tobytes()
            assert array.base is not None
            assert not array.flags.writeable
            assert not array.flags.owndata
            expected = tensor.shape if tensor.float_type == FloatType.F32 else (tensor.n_rows, tensor.row_bytes)
            assert array.shape == expected
        q = file.tensor("block_matmul_q", 1)
        assert np.array_equal(file.values(q), dequantize_q40(file.array(q)))
        assert np.array_equal(file.values(file.tensor("embedding")), file.array(file.tensor("embedding")))
        del array


def test_a_tensor_that_is_not_there(model: Path) -> None:
    with ModelFile.open(model) as file, pytest.raises(KeyError, match="block_moe_gate"):
        file.tensor("block_moe_gate")


def test_a_shorter_context(model: Path) -> None:
    with ModelFile.open(model, max_seq_len=100) as file:
        assert (file.spec.seq_len, file.file_seq_len) == (100, 256)
    with ModelFile.open(model, max_seq_len=1000) as file:
        assert file.spec.seq_len == 256
    with pytest.raises(ValueError, match="a context of 0 positions"):
        ModelFile.open(model, max_seq_len=0)


def test_closing_unmaps(model: Path) -> None:
    file = ModelFile.open(model)
    mapped = file._map
    assert mapped is not None
    assert "mapped" in repr(file)
    file.close()
    file.close()
    assert mapped.closed
    assert "closed" in repr(file)
    with pytest.raises(ValueError, match="has been closed"):
        file.raw  # noqa: B018 - the property raises


def test_a_view_outlives_closing(model: Path) -> None:
    file = ModelFile.open(model)
    view = file.array(file.tensor("final_norm"))
    before = view.copy()
    file.close()
    gc.collect()
    assert np.array_equal(view, before)


def test_no_descriptor_is_kept(model: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ModelFile.open(model).close()
    with pytest.raises(FormatError):
        ModelFile.open(model.parent / "none.m")
    assert len(os.listdir("/proc/self/fd")) == before


def test_truncation_names_the_tensor(model: Path) -> None:
    data = model.read_bytes()
    with ModelFile.open(model) as file:
        tensors = file.tensors
    for tensor in tensors:
        for length in (tensor.offset, tensor.offset + 1, tensor.offset + tensor.nbytes - 1):
            model.write_bytes(data[:length])
            error = refusal(model)
            assert error.offset == length
            assert error.expected == f"{tensor.nbytes} bytes of {tensor.label} from byte {tensor.offset} on"
            assert f"after {length - tensor.offset} of them" in error.found
            assert f"{len(data) - length} of its {len(data)} bytes are missing" in error.found


@pytest.mark.parametrize("extra", [1, 4096])
def test_an_overlong_file(model: Path, extra: int) -> None:
    nbytes = model.stat().st_size
    with model.open("ab") as file:
        file.write(bytes(extra))
    error = refusal(model)
    assert error.offset == nbytes
    assert error.found == f"{extra} more bytes"
    assert str(model) in str(error)


def test_truncation_within_the_header(model: Path) -> None:
    data = model.read_bytes()
    for length in range(0, 144, 4):
        model.write_bytes(data[:length])
        assert refusal(model).offset in (0, length)


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.m").found == "no file of this name"
    assert refusal(tmp_path).found == "a folder"
    os.mkfifo(tmp_path / "pipe.m")
    assert refusal(tmp_path / "pipe.m").found == "no plain file"


def test_a_header_of_an_enormous_model_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "large.m"
    spec = small_spec(
        Architecture.QWEN3_MOE, n_layers=1024, n_experts=128, vocab_size=2**24, dim=2**20, head_dim=2**8, n_heads=2**14, n_kv_heads=2**14
    )
    path.write_bytes(encode_header(path, spec) + bytes(1000))
    tracemalloc.start()
    try:
        error = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "bytes of embedding from byte 152 on" in error.expected
    assert peak < 1 << 20


HEADER = [(key, value) for key, value in zip(*[iter(struct.unpack("<34i", encode_header("x.m", small_spec())[8:]))] * 2, strict=True)]


@given(st.dictionaries(st.integers(0, 16), st.one_of(st.integers(0, 300), st.integers(-(2**31), 2**31 - 1)), max_size=3), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_is_another_model_or_a_format_error(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], data: st.DataObject
) -> None:
    """The file is sparse and as long as a small model: whatever the header says, nothing large may come of it."""
    pairs = [(key, changes.get(number, value)) for number, (key, value) in enumerate(HEADER)]
    if data.draw(st.booleans()):
        pairs[data.draw(st.integers(0, 16))] = (data.draw(st.integers(-1, 23)), data.draw(st.integers(-1, 100)))
    body = b"".join(struct.pack("<ii", *pair) for pair in pairs)
    path = tmp_path_factory.mktemp("damaged") / "model.m"
    with path.open("wb") as out:
        out.write(struct.pack("<ii", 0x0A00ABCD, 8 + len(body)) + body)
        out.truncate(data.draw(st.sampled_from([144, 123456, 10**7])))
    tracemalloc.start()
    try:
        ModelFile.open(path).close()
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_the_map_is_read_only(model: Path) -> None:
    with ModelFile.open(model) as file:
        assert isinstance(file._map, mmap.mmap)
        with pytest.raises(ValueError, match="read-only"):
            file.raw[0] = 1


def test_header_keys_of_the_example() -> None:
    assert [HeaderKey(key) for key, _ in HEADER][:2] == [HeaderKey.VERSION, HeaderKey.ARCH]
