"""Builder, slices and codec against the C++ root: the graphs that it sent are those that we build, the weights those that we would send."""

from pathlib import Path
from typing import Any

import pytest

from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_slices import outgoing_weights
from dairllm.graph.build import build_graph
from dairllm.graph.slicing import equal_shares
from dairllm.graph.types import FloatType, RopeType
from dairllm.protocol.dllama.codec import ACK, WeightHeader, decode_network, decode_node, encode_network, encode_node

DATA = Path(__file__).parents[2] / "data" / "dllama"


def sync_of(name: str) -> FloatType:
    return FloatType.F32 if name.endswith("f32") else FloatType.Q80


def test_the_graph_of_two_nodes_byte_for_byte(recording: Any) -> None:
    with ModelFile.open(DATA / f"{recording.name}.m") as model:
        spec = model.spec
    network, nodes = build_graph(spec, 2, sync_of(recording.name))
    sent_network, sent_node = recording.root[1].removeprefix(ACK), recording.root[2]
    if spec.rope_type == RopeType.FALCON:  # some of its fields are memory that C++ never wrote: decoding leaves them out
        sent_node = encode_node(decode_node(sent_node))
    assert encode_network(network) == sent_network
    assert encode_node(nodes[1]) == sent_node
    assert decode_network(sent_network) == (network, b"")
    assert decode_node(sent_node) == nodes[1]


def test_the_root_of_our_graph_survives_the_wire_as_well(recording: Any) -> None:
    with ModelFile.open(DATA / f"{recording.name}.m") as model:
        _, nodes = build_graph(model.spec, 2, sync_of(recording.name))
    assert decode_node(encode_node(nodes[0])) == nodes[0]


def test_the_weights_of_node_one_byte_for_byte(recording: Any, new_owner: Any) -> None:
    """Also their order, their names, and where experts go."""
    owner = new_owner()
    owner.hear_all([recording.from_root])
    headers = [event for event in owner.events if isinstance(event, WeightHeader)]
    offset = 0
    with ModelFile.open(DATA / f"{recording.name}.m") as model:
        share = equal_shares(model.spec, 2)[1]
        weights = list(outgoing_weights(model, share, share.logits.size))
        assert [WeightHeader(weight.name, weight.layer, weight.offset, weight.nbytes) for weight in weights] == headers
        for weight in weights:
            found = memoryview(bytearray(weight.nbytes))
            weight.read(0, weight.n_rows, found)
            assert found == owner.payload[offset : offset + weight.nbytes], weight
            offset += weight.nbytes


@pytest.mark.parametrize("n_nodes", [1, 2])
def test_every_weight_that_the_graph_has_is_in_the_file(recording: Any, n_nodes: int) -> None:
    with ModelFile.open(DATA / f"{recording.name}.m") as model:
        in_file = {(tensor.name, tensor.layer) for tensor in model.tensors}
        _, nodes = build_graph(model.spec, n_nodes, sync_of(recording.name))
    for node in nodes:
        in_graph = {(op.name, op.index) for segment in node.segments for op in segment.ops if op.weight_size.nbytes}
        assert in_graph == (in_file if node.node == 0 else in_file - {("embedding", 0)})
