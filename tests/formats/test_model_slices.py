"""Outgoing weights are the slices of the whole arrays, whatever the share, however many rows are read at once. That they are the C++ root's
bytes is tested with its recordings (``tests/protocol/dllama/test_recorded_graphs.py``)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import OutgoingWeight, outgoing_weights
from dairllm.formats.quants import dequantize
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_network, build_node
from dairllm.graph.model import Architecture
from dairllm.graph.slicing import Share, Span, deal_shares, nearly_equal_sizes, parse_shares
from dairllm.graph.types import FloatType

TYPES = [FloatType.F32, FloatType.Q40, FloatType.Q80]
SHAPE = {"n_heads": 9, "n_kv_heads": 3, "head_dim": 32, "hidden_dim": 224, "moe_hidden_dim": 224, "vocab_size": 203}
SHARES = ["9/224", "5/96,4/128", "4/32,5/192", "2/32,1/32,2/32,1/64,3/64", "3/64,3/64,3/96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def opened(folder: Path, arch: Architecture, weight_type: FloatType) -> ModelFile:
    path = folder / f"{arch.name}-{weight_type.name}.m"
    if not path.exists():
        shape = SHAPE if arch == Architecture.QWEN3_MOE else SHAPE | {"moe_hidden_dim": 0}
        write_random_model(path, small_spec(arch, weight_type, **shape))
    return ModelFile.open(path)


def read(weight: OutgoingWeight, step: int = 0) -> bytes:
    """All rows, `step` at a time."""
    out = memoryview(bytearray(b"\xaa" * weight.nbytes))
    step = step or weight.n_rows
    for first in range(0, weight.n_rows, step):
        rows = min(step, weight.n_rows - first)
        weight.read(first, rows, out[first * weight.row_bytes : (first + rows) * weight.row_bytes])
    return bytes(out)


def indexes(spans: tuple[Span, ...], width: int = 1) -> list[int]:
    return [value for span in spans for value in range(span.start * width, span.stop * width)]


def expected(model: ModelFile, share: Share, name: str, layer: int, expert: int, logits_rows: int) -> np.ndarray:
    """A node's part by plain indexing of the dequantized whole."""
    spec, values = model.spec, model.values(model.tensor(name, layer, expert))
    match name.removeprefix("block_matmul_"):
        case "q":
            return values[indexes(share.heads, spec.head_dim)]
        case "k" | "v":
            return values[indexes(share.kv_heads, spec.head_dim)]
        case "wo":
            return values[:, indexes(share.heads, spec.head_dim)]
        case "w1" | "w3":
            return values[indexes((share.ffn,))]
        case "w2":
            return values[:, indexes((share.ffn,))]
        case "final_matmul_logits":
            rows = np.zeros((logits_rows, spec.dim), np.float32)
            rows[: share.logits.size] = values[indexes((share.logits,))]
            return rows
    return values


@pytest.mark.parametrize("weight_type", TYPES)
@pytest.mark.parametrize("arch", list(Architecture))
@pytest.mark.parametrize("sizes", SHARES)
def test_slices_of_the_dequantized_whole(sizes: str, arch: Architecture, weight_type: FloatType, folder: Path) -> None:
    with opened(folder, arch, weight_type) as model:
        shares = deal_shares(model.spec, parse_shares(sizes))
        logits_rows = -(-model.spec.vocab_size // len(shares))
        for share in shares:
            weights = list(outgoing_weights(model, share, logits_rows))
            tensors = [tensor for tensor in model.tensors if tensor.name != "embedding"]
            assert [(weight.name, weight.layer) for weight in weights] == [(tensor.name, tensor.layer) for tensor in tensors]
            for weight, tensor in zip(weights, tensors, strict=True):
                want = expected(model, share, weight.name, weight.layer, tensor.expert, logits_rows)
                raw = np.frombuffer(read(weight), np.uint8).reshape(weight.n_rows, weight.row_bytes)
                np.testing.assert_array_equal(dequantize(tensor.float_type, raw.copy()).reshape(want.shape), want, str(weight))
                assert weight.offset == tensor.expert * weight.nbytes


@pytest.mark.parametrize("arch", list(Architecture))
def test_they_fill_the_weights_of_the_graph(arch: Architecture, folder: Path) -> None:
    """Each op's weight to the last byte, experts one after the other."""
    with opened(folder, arch, FloatType.Q40) as model:
        shares = deal_shares(model.spec, nearly_equal_sizes(model.spec, 4))
        network = build_network(model.spec, shares, FloatType.Q80)
        for number, share in enumerate(shares):
            node = build_node(model.spec, network, number, share)
            announced = {(op.name, op.index): op.weight_size.nbytes for segment in node.segments for op in segment.ops}
            filled: dict[tuple[str, int], int] = {}
            for weight in outgoing_weights(model, share, -(-model.spec.vocab_size // 4)):
                assert weight.offset == filled.get((weight.name, weight.layer), 0)
                filled[weight.name, weight.layer] = weight.offset + weight.nbytes
            assert filled == {key: nbytes for key, nbytes in announced.items() if nbytes and key != ("embedding", 0)}


@settings(deadline=None)
@given(data=st.data(), weight_type=st.sampled_from(TYPES), sizes=st.sampled_from(SHARES), step=st.integers(1, 70))
def test_a_few_rows_at_a_time(data: st.DataObject, weight_type: FloatType, sizes: str, step: int, folder: Path) -> None:
    with opened(folder, Architecture.LLAMA, weight_type) as model:
        shares = deal_shares(model.spec, parse_shares(sizes))
        share = data.draw(st.sampled_from(shares))
        weights = list(outgoing_weights(model, share, data.draw(st.sampled_from([-(-203 // len(shares)), 203]))))
        weight = data.draw(st.sampled_from(weights))
        assert read(weight, step) == read(weight)


def test_a_node_without_classifier_rows_gets_zeros(folder: Path) -> None:
    with opened(folder, Architecture.LLAMA, FloatType.Q40) as model:
        *_, last = deal_shares(model.spec, parse_shares("9/224"))
        nothing = Share(last.heads, last.kv_heads, last.ffn, Span(203, 203))
        *_, classifier = outgoing_weights(model, nothing, 29)
        assert (classifier.name, classifier.n_rows, classifier.row_bytes) == ("final_matmul_logits", 29, 36)
        assert read(classifier, 7) == bytes(29 * 36)


def test_rows_that_are_not_there(folder: Path) -> None:
    with opened(folder, Architecture.LLAMA, FloatType.F32) as model:
        (share,) = deal_shares(model.spec, parse_shares("9/224"))
        q = next(outgoing_weights(model, share, 203))
        for first, rows in ((-1, 2), (0, 289), (288, 1), (3, -1)):
            with pytest.raises(ValueError, match="of <OutgoingWeight block_matmul_q of layer 0: 288 rows of 256 bytes at 0>"):
                q.read(first, rows, memoryview(bytearray(256 * max(rows, 0))))
        with pytest.raises(ValueError, match="reshape"):
            q.read(0, 2, memoryview(bytearray(256)))


def test_they_outlive_the_file(folder: Path) -> None:
    """Closing gives up the map; what is being sent is still read from it."""
    with opened(folder, Architecture.LLAMA, FloatType.F32) as model:
        (share,) = deal_shares(model.spec, parse_shares("9/224"))
        q = next(outgoing_weights(model, share, 203))
        before = read(q)
    assert read(q) == before
    with pytest.raises(ValueError, match="has been closed"):
        next(outgoing_weights(model, share, 203))
