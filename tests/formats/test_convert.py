import shutil
import tracemalloc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from dairllm.errors import ConfigError, FormatError, LimitError
from dairllm.formats import convert
from dairllm.formats.convert import convert_gguf
from dairllm.formats.model_file import ModelFile
from dairllm.formats.quants import dequantize, quantize
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.graph.types import FloatType, row_bytes

MakeGguf = Callable[..., Path]
Usage = namedtuple("Usage", "total used free")

SOURCES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "final_matmul_logits": "output.weight",
    "block_matmul_q": "blk.{}.attn_q.weight",
    "block_matmul_k": "blk.{}.attn_k.weight",
    "block_matmul_v": "blk.{}.attn_v.weight",
    "block_matmul_wo": "blk.{}.attn_output.weight",
    "block_matmul_w1": "blk.{}.ffn_gate.weight",
    "block_matmul_w2": "blk.{}.ffn_down.weight",
    "block_matmul_w3": "blk.{}.ffn_up.weight",
    "block_norm_0": "blk.{}.attn_norm.weight",
    "block_norm_1": "blk.{}.ffn_norm.weight",
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "tiny.m"


@pytest.fixture
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_CHUNK_VALUES", 1000)


def files(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def stored(values: np.ndarray, weight: str) -> np.ndarray:
    """What a GGUF file holds of a tensor, as values."""
    kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else weight]
    return np.asarray(gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind), np.float32).reshape(values.shape)


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("weight", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
def test_every_tensor_goes_to_its_place(
    make_gguf: MakeGguf, gguf_values: dict[str, np.ndarray], target: Path, weight: str, weight_type: FloatType, few_rows_at_a_time: None
) -> None:
    result = convert_gguf(make_gguf(weight=weight), target, weight_type)
    assert files(target) == ["tiny.m", "tiny.t", "tokenizer.json"]
    assert result.files == {path: path.stat().st_size for path in target.parent.iterdir()}
    exact = weight in ("F32", "F16", "BF16", "Q4_0" if weight_type != FloatType.F32 else "", "Q8_0" if weight_type == FloatType.Q80 else "")
    assert len(result.warnings) == (0 if exact or weight_type == FloatType.F32 else 1)
    with ModelFile.open(target) as model:
        assert model.spec == result.spec
        for tensor in model.tensors:
            values = stored(gguf_values[SOURCES[tensor.name].format(tensor.layer)], weight)
            if tensor.float_type != FloatType.F32 and (weight, weight_type) != ("Q4_0", FloatType.Q80):
                values = dequantize(tensor.float_type, quantize(tensor.float_type, values))
            assert np.array_equal(model.values(tensor), values), tensor.label
    assert TokenizerFile.read(target.with_suffix(".t")).eos_ids == (2, 0)


@pytest.mark.parametrize(("weight", "weight_type"), [("Q4_0", FloatType.Q40), ("Q8_0", FloatType.Q80)])
def test_blocks_of_the_same_bytes_are_copied(make_gguf: MakeGguf, target: Path, weight: str, weight_type: FloatType) -> None:
    """Random blocks show it: quantizing would never give them, since none of their values needs to lie at the end of the scale."""
    block_bytes = row_bytes(weight_type, 32)
    blocks = np.frombuffer(np.random.default_rng(9).bytes(268 * 2 * block_bytes), np.uint8).reshape(-1, block_bytes).copy()
    blocks[:, :2] = np.array([1], "<f2").view(np.uint8)
    blocks = blocks.reshape(268, -1)
    assert not np.array_equal(quantize(weight_type, dequantize(weight_type, blocks)), blocks)
    convert_gguf(make_gguf(weight=weight, blocks={"output.weight": blocks}), target, weight_type)
    with ModelFile.open(target) as model:
        assert np.array_equal(model.array(model.tensor("final_matmul_logits")), blocks)


def test_how_much_was_copied(make_gguf: MakeGguf, target: Path) -> None:
    result = convert_gguf(make_gguf(weight="Q4_0"), target, FloatType.Q40)
    with ModelFile.open(target) as model:
        assert result.copied_bytes == sum(tensor.nbytes for tensor in model.tensors if tensor.float_type == FloatType.Q40)
        assert result.copied_bytes == sum(
            tensor.n_rows * tensor.n_columns // 32 * 18 for tensor in model.tensors if "matmul" in tensor.name
        )
    assert convert_gguf(make_gguf(weight="Q4_1"), target, FloatType.Q80).copied_bytes == 0


@pytest.mark.parametrize(
    ("weight", "weight_type"),
    [("Q4_0", FloatType.Q40), *((weight, FloatType.Q80) for weight in ("Q8_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16", "F32"))],
)
def test_the_type_that_keeps_the_weights(
    make_gguf: MakeGguf, gguf_values: dict[str, np.ndarray], target: Path, weight: str, weight_type: FloatType
) -> None:
    """By default. Q40 for anything but Q4_0 takes a model's perplexity from 9.9 to 16."""
    result = convert_gguf(make_gguf(weight=weight), target)
    assert result.spec.weight_type == weight_type
    with ModelFile.open(target) as model:
        for tensor in model.tensors:
            values = stored(gguf_values[SOURCES[tensor.name].format(tensor.layer)], weight)
            found = model.values(tensor)
            if weight in ("Q4_0", "Q8_0") or tensor.float_type == FloatType.F32:
                assert np.array_equal(found, values), tensor.label
            else:
                half_steps = np.abs(values.reshape(-1, 32)).max(axis=1, keepdims=True) / 254
                assert (np.abs(found - values).reshape(-1, 32) <= half_steps * 1.1).all(), tensor.label  # d is rounded to f16


def test_k_quants_by_default(make_gguf: MakeGguf, gguf_values: dict[str, np.ndarray], target: Path) -> None:
    """Random blocks of Q4_K; the values are those of llama.cpp's own library."""
    shapes = {name: tuple(256 if n in (64, 96) else n for n in values.shape) for name, values in gguf_values.items()}
    shapes |= {f"blk.{layer}.attn_{name}.weight": (128, 256) for layer in range(2) for name in ("k", "v")}
    random = np.random.default_rng(5)
    blocks = {}
    for name, shape in shapes.items():
        if len(shape) == 2:
            raw = np.frombuffer(random.bytes(shape[0] * 144), np.uint8).reshape(-1, 144).copy()
            raw[:, :4] = np.array([0.01, 0.02], "<f2").view(np.uint8)
            blocks[name] = raw
    metadata = {"llama.embedding_length": 256, "llama.feed_forward_length": 256, "llama.rope.dimension_count": 64}
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    result = convert_gguf(make_gguf(weight="Q4_K", metadata=metadata, tensors=tensors, blocks=blocks), target)
    assert result.spec.weight_type == FloatType.Q80
    (warning,) = result.warnings
    assert warning.startswith("weights of type Q4_K are rounded again, to Q80: that costs next to nothing")
    with ModelFile.open(target) as model:
        for tensor in model.tensors:
            if len(tensor.shape) == 2:
                raw = blocks[SOURCES[tensor.name].format(tensor.layer)]
                values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_K)
                expected = values if tensor.float_type == FloatType.F32 else dequantize(FloatType.Q80, quantize(FloatType.Q80, values))
                assert np.array_equal(model.values(tensor), expected), tensor.label


def test_what_rounding_again_costs_is_said(make_gguf: MakeGguf, target: Path) -> None:
    result = convert_gguf(make_gguf(weight="Q5_1"), target, FloatType.Q40)
    assert result.warnings == ("weights of type Q5_1 are rounded again, to Q40, which costs quality; --weights q80 keeps nearly all of it",)
    assert not convert_gguf(make_gguf(weight="Q5_1"), target, FloatType.F32).warnings
    assert not convert_gguf(make_gguf(weight="F16"), target, FloatType.Q40).warnings, "rounded once"


def test_a_classifier_of_more_bits_than_the_layers(make_gguf: MakeGguf, target: Path) -> None:
    """As llama.cpp makes them: a `.m` file has one type, and the classifier's is named."""
    finer = np.random.default_rng(1).standard_normal((268, 64), np.float32)
    raw = gguf.quants.quantize(finer, gguf.GGMLQuantizationType.Q8_0)
    source = make_gguf(weight="Q4_0", blocks={"output.weight": raw}, block_types={"output.weight": "Q8_0"})
    result = convert_gguf(source, target)
    assert result.spec.weight_type == FloatType.Q40
    (warning,) = result.warnings
    assert warning.startswith("the classifier's weights of type Q8_0 are rounded again, to Q40, which costs quality; --weights q80")
    assert convert_gguf(source, target, FloatType.Q80).warnings == ()
    with ModelFile.open(target) as model:
        assert np.array_equal(model.array(model.tensor("final_matmul_logits")), raw)


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q80])
def test_a_tied_classifier(make_gguf: MakeGguf, gguf_values: dict[str, np.ndarray], target: Path, weight_type: FloatType) -> None:
    convert_gguf(make_gguf(weight="Q8_0", tensors={"output.weight": None}), target, weight_type)
    with ModelFile.open(target) as model:
        embedding = model.values(model.tensor("embedding"))
        assert np.array_equal(embedding, stored(gguf_values["token_embd.weight"], "Q8_0"))
        assert np.array_equal(model.values(model.tensor("final_matmul_logits")), embedding)


def test_progress_goes_from_nothing_to_all(make_gguf: MakeGguf, target: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert_gguf(make_gguf(), target, FloatType.Q40, lambda *call: calls.append(call))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[0][0] == "embedding"
    assert calls[-1] == ("final_matmul_logits", target.stat().st_size, target.stat().st_size)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError])
def test_an_interrupted_conversion_leaves_nothing(make_gguf: MakeGguf, target: Path, error: type[BaseException]) -> None:
    target.write_bytes(b"old")

    def progress(tensor: str, _done: int, _total: int) -> None:
        if tensor == "block_matmul_w2 of layer 1":
            raise error

    with pytest.raises(error):
        convert_gguf(make_gguf(), target, FloatType.Q40, progress)
    assert files(target) == ["tiny.m"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_values_that_cannot_be_held_name_their_tensor(make_gguf: MakeGguf, target: Path, value: float) -> None:
    values = np.zeros((96, 64), np.float32)
    values[50, 3] = value
    source = make_gguf(tensors={"blk.1.ffn_up.weight": values})
    with pytest.raises(FormatError, match=r"values in tensor blk.1.ffn_up.weight that Q40 can hold"):
        convert_gguf(source, target, FloatType.Q40)
    assert not files(target)
    if value == 1e6:
        assert convert_gguf(source, target, FloatType.F32).spec.weight_type == FloatType.F32


def test_blocks_without_a_finite_scale_are_not_copied(make_gguf: MakeGguf, target: Path) -> None:
    source = make_gguf(weight="Q4_0")
    data = bytearray(source.read_bytes())
    reader = gguf.GGUFReader(source)
    offset = next(int(tensor.data_offset) for tensor in reader.tensors if tensor.name == "blk.0.attn_k.weight")
    data[offset + 18 : offset + 20] = b"\x00\x7c"  # infinity as f16
    del reader
    source.write_bytes(data)
    with pytest.raises(FormatError, match=r"finite scales in tensor blk.0.attn_k.weight"):
        convert_gguf(source, target, FloatType.Q40)


def test_the_tokenizer_of_another_model_is_not_overwritten(make_gguf: MakeGguf, target: Path) -> None:
    beside = target.with_name("tokenizer.json")
    beside.write_text("{}")
    with pytest.raises(ConfigError, match="has another vocabulary than this model; convert into a folder of its own"):
        convert_gguf(make_gguf(), target, FloatType.Q40)
    assert files(target) == ["tokenizer.json"]
    beside.unlink()
    convert_gguf(make_gguf(), target, FloatType.Q40)
    convert_gguf(make_gguf(), target.with_name("again.m"), FloatType.Q80)
    assert files(target) == ["again.m", "again.t", "tiny.m", "tiny.t", "tokenizer.json"]


def test_no_tokenizer_json(make_gguf: MakeGguf, target: Path) -> None:
    source = make_gguf(metadata={"tokenizer.ggml.pre": "tekken"})
    assert len(convert_gguf(source, target, FloatType.Q40).warnings) == 1
    assert files(target) == ["tiny.m", "tiny.t"]
    target.with_name("tokenizer.json").write_text("{}")
    assert "was there before" in convert_gguf(source, target, FloatType.Q40).warnings[1]
    assert target.with_name("tokenizer.json").read_text() == "{}"


def test_targets(make_gguf: MakeGguf, target: Path) -> None:
    with pytest.raises(ConfigError, match=r"whose name ends in \.m"):
        convert_gguf(make_gguf(), target.with_suffix(".t"), FloatType.Q40)
    (target.parent / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        convert_gguf(make_gguf(), target.parent / "file" / "x.m", FloatType.Q40)


def test_a_missing_folder_is_made(make_gguf: MakeGguf, target: Path) -> None:
    new = target.parent / "models" / "tiny" / "x.m"
    result = convert_gguf(make_gguf(), new, FloatType.Q40)
    assert files(new) == ["tokenizer.json", "x.m", "x.t"]
    assert result.files[new] == new.stat().st_size


@pytest.mark.parametrize("below", ["models", "models/tiny"])
def test_a_folder_that_was_made_for_nothing_goes_again(make_gguf: MakeGguf, target: Path, below: str) -> None:
    source = make_gguf(tensors={"blk.1.ffn_up.weight": np.full((96, 64), np.inf, np.float32)})
    with pytest.raises(FormatError):
        convert_gguf(source, target.parent / below / "x.m", FloatType.Q40)
    assert not files(target)
    (target.parent / "models").mkdir()
    with pytest.raises(FormatError):
        convert_gguf(source, target.parent / below / "x.m", FloatType.Q40)
    assert files(target) == ["models"], "what was there stays"
    assert not files(target.parent / "models" / "x")


def test_shapes_that_have_no_whole_blocks(make_gguf: MakeGguf, target: Path) -> None:
    wide = {f"blk.{layer}.ffn_{name}.weight": np.ones((100, 64), np.float32) for layer in range(2) for name in ("gate", "up")}
    wide |= {f"blk.{layer}.ffn_down.weight": np.ones((64, 100), np.float32) for layer in range(2)}
    source = make_gguf(metadata={"llama.feed_forward_length": 100}, tensors=wide)
    with pytest.raises(FormatError, match="hidden_dim that is a multiple of 32, the values of a Q40 block, found 100"):
        convert_gguf(source, target, FloatType.Q40)
    assert convert_gguf(source, target).spec.weight_type == FloatType.F32


def test_a_full_disk_is_noticed_first(make_gguf: MakeGguf, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**6, 10**6, 1000))
    with pytest.raises(LimitError, match="bytes, and there are 1000 free on its disk"):
        convert_gguf(make_gguf(), target, FloatType.Q40)
    assert not files(target)


def test_memory_does_not_grow_with_the_tensors(make_gguf: MakeGguf, target: Path) -> None:
    rows = 400_000  # 102 MB as float32
    source = make_gguf(weight="F16", tensors={"token_embd.weight": np.zeros((rows, 64), np.float32), "output.weight": None})
    tracemalloc.start()
    try:
        convert_gguf(source, target, FloatType.Q80)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20
