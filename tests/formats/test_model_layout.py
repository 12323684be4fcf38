import pytest

from dairllm.errors import GraphError
from dairllm.formats.model_layout import Slice, column_slice, layout_bytes, node_slice, row_slice, tensor_layout, whole
from dairllm.formats.random_model import small_spec
from dairllm.graph.model import Architecture
from dairllm.graph.types import FloatType


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
def test_tensors_follow_one_another_to_the_end(arch: Architecture, weight_type: FloatType) -> None:
    spec = small_spec(arch, weight_type, n_layers=3)
    tensors = tensor_layout(spec, 144)
    at = 144
    for tensor in tensors:
        assert tensor.offset == at
        assert tensor.nbytes == tensor.n_rows * tensor.row_bytes
        at += tensor.nbytes
    assert layout_bytes(spec, 144) == at
    assert len({(tensor.name, tensor.layer, tensor.expert) for tensor in tensors}) == len(tensors)


def test_a_dense_layout_by_hand() -> None:
    tensors = tensor_layout(small_spec(n_layers=1), 100)
    # dim 64, hidden 128, q_dim 64, kv_dim 32, vocab 320; a Q40 row of 64 values has 36 bytes, one of 128 has 72.
    assert [(t.name, t.float_type.name, t.shape, t.offset, t.nbytes) for t in tensors] == [
        ("embedding", "F32", (320, 64), 100, 81920),
        ("block_matmul_q", "Q40", (64, 64), 82020, 2304),
        ("block_matmul_k", "Q40", (32, 64), 84324, 1152),
        ("block_matmul_v", "Q40", (32, 64), 85476, 1152),
        ("block_matmul_wo", "Q40", (64, 64), 86628, 2304),
        ("block_matmul_w1", "Q40", (128, 64), 88932, 4608),
        ("block_matmul_w2", "Q40", (64, 128), 93540, 4608),
        ("block_matmul_w3", "Q40", (128, 64), 98148, 4608),
        ("block_norm_0", "F32", (64,), 102756, 256),
        ("block_norm_1", "F32", (64,), 103012, 256),
        ("final_norm", "F32", (64,), 103268, 256),
        ("final_matmul_logits", "Q40", (320, 64), 103524, 11520),
    ]


def test_a_layer_with_experts() -> None:
    tensors = [t for t in tensor_layout(small_spec(Architecture.QWEN3_MOE, n_experts=2), 0) if t.layer == 1]
    assert [(t.name.removeprefix("block_"), t.expert) for t in tensors] == [
        ("matmul_q", 0),
        ("matmul_k", 0),
        ("matmul_v", 0),
        ("matmul_wo", 0),
        ("moe_gate", 0),
        ("matmul_w1", 0),
        ("matmul_w2", 0),
        ("matmul_w3", 0),
        ("matmul_w1", 1),
        ("matmul_w2", 1),
        ("matmul_w3", 1),
        ("norm_q", 0),
        ("norm_k", 0),
        ("norm_0", 0),
        ("norm_1", 0),
    ]


def test_labels() -> None:
    tensors = tensor_layout(small_spec(Architecture.QWEN3_MOE), 0)
    assert tensors[0].label == "embedding"
    assert next(t for t in tensors if t.expert == 3 and t.layer == 1).label == "block_matmul_w1 of layer 1, expert 3"


@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("arch", list(Architecture))
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_slices_of_all_nodes_are_the_tensor(arch: Architecture, weight_type: FloatType, n_nodes: int) -> None:
    spec = small_spec(arch, weight_type)
    for tensor in tensor_layout(spec, 144):
        slices = [node_slice(tensor, spec, node, n_nodes) for node in range(n_nodes)]
        if tensor.name == "embedding" or "norm" in tensor.name or "gate" in tensor.name:
            assert slices == [whole(tensor)] * n_nodes
            continue
        covered = sorted((piece.offset + row * piece.stride, piece.slice_row_bytes) for piece in slices for row in range(piece.n_rows))
        at = tensor.offset
        for offset, nbytes in covered:
            assert offset == at
            at += nbytes
        assert at == tensor.offset + tensor.nbytes


def test_a_row_slice_is_contiguous_and_a_column_slice_strided() -> None:
    spec = small_spec()
    w1, w2 = (next(t for t in tensor_layout(spec, 0) if t.name == f"block_matmul_{name}") for name in ("w1", "w2"))
    rows, columns = node_slice(w1, spec, 1, 2), node_slice(w2, spec, 1, 2)
    assert rows == Slice(w1.offset + 64 * 36, 36, 64, 36)
    # Of each of 64 rows of 72 bytes the second half.
    assert columns == Slice(w2.offset + 36, 72, 64, 36)
    assert rows.nbytes == columns.nbytes == 2304


def test_shares_need_not_be_equal() -> None:
    w2 = next(t for t in tensor_layout(small_spec(), 0) if t.name == "block_matmul_w2")
    assert column_slice(w2, 96, 32) == Slice(w2.offset + 54, 72, 64, 18)
    assert row_slice(w2, 63, 1) == Slice(w2.offset + 63 * 72, 72, 1, 72)


def test_what_cannot_be_divided_is_refused() -> None:
    spec = small_spec()
    by_name = {t.name: t for t in tensor_layout(spec, 0) if not t.layer}
    with pytest.raises(GraphError, match=r"4 equal nodes cannot share this model: .*2 KV heads do not divide by 4"):
        node_slice(by_name["block_matmul_k"], spec, 0, 4)
    with pytest.raises(GraphError, match=r"3 equal nodes cannot share this model: .*128 feed-forward columns do not divide by 3"):
        node_slice(by_name["block_matmul_w1"], spec, 0, 3)
    with pytest.raises(GraphError, match="cut a block"):
        column_slice(by_name["block_matmul_w2"], 16, 32)
    with pytest.raises(GraphError, match="no node 2 among 2"):
        node_slice(by_name["block_matmul_w1"], spec, 2, 2)
    with pytest.raises(GraphError, match="rows 100 to 129 are not among them"):
        row_slice(by_name["block_matmul_w1"], 100, 29)
    with pytest.raises(GraphError, match="columns -32 to 0 are not among them"):
        column_slice(by_name["block_matmul_w2"], -32, 32)
