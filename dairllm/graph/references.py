"""Weights that both sides have: said by name and part, in place of their bytes.

A worker that has the root's model on a disk of its own is told which part of which tensor each op's weight is.
"""

from dataclasses import dataclass

from dairllm.graph.model import ModelSpec
from dairllm.graph.slicing import Part, Share, weight_part
from dairllm.graph.types import NodeConfig

__all__ = ["IDENTITY_BYTES", "NO_MODEL", "WeightReference", "weight_references"]

IDENTITY_BYTES = 32
"""Of what a model is known by: a digest of all its bytes."""
NO_MODEL = bytes(IDENTITY_BYTES)
"""In the place of an identity, where there is no model."""


@dataclass(frozen=True, slots=True)
class WeightReference:
    """The weight of op `name` in layer `layer` is `part` of the tensor of that name, and where there are experts, of each."""

    name: str
    layer: int
    part: Part


def weight_references(spec: ModelSpec, share: Share, node: NodeConfig) -> tuple[WeightReference, ...]:
    """All weights of a node's graph, as parts of its model's tensors.

    Raises:
        GraphError: an op has a weight that no model has.
    """
    return tuple(
        WeightReference(op.name, op.index, weight_part(spec, share, op.name))
        for segment in node.segments
        for op in segment.ops
        if op.weight_size.length
    )
