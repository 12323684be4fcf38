"""Who holds which part of a layer: shares, and the part of each weight that a share means.

A share is a value, not a division: equal shares are one way to deal. Query heads go with the KV heads that they read, so that a node's
attention needs nothing of its neighbours; its slice of the feed-forward block is a range of that block's width; its classifier rows are
its part of the logits.
"""

from dataclasses import dataclass
from enum import Enum

from dairllm.errors import GraphError
from dairllm.graph.model import ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType

__all__ = ["Axis", "Part", "Share", "Span", "equal_shares", "weight_part"]


@dataclass(frozen=True, slots=True)
class Span:
    """start .. stop - 1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def times(self, width: int) -> "Span":
        """The span of values, where each of ours has `width`."""
        return Span(self.start * width, self.stop * width)


@dataclass(frozen=True, slots=True)
class Share:
    """What one node computes of every layer, and of the logits."""

    heads: Span
    kv_heads: Span
    ffn: Span
    """Columns of the feed-forward block (of each expert)."""
    logits: Span
    """Rows of the classifier."""


class Axis(Enum):
    WHOLE = "whole"
    ROWS = "rows"
    """Outputs: rows of a [d, n] weight."""
    COLUMNS = "columns"
    """Inputs: columns of every row."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a weight, [d outputs, n inputs] as it lies in a file; `span` None is the whole of it."""

    axis: Axis
    span: Span | None


_WHOLE = Part(Axis.WHOLE, None)


def weight_part(spec: ModelSpec, share: Share, name: str) -> Part:
    """What a node with `share` holds of the weight of op `name`.

    The embedding is whole too, though only the root has it.

    Raises:
        GraphError: no op of that name has a weight.
    """
    match name:
        case "block_matmul_q":
            return Part(Axis.ROWS, share.heads.times(spec.head_dim))
        case "block_matmul_k" | "block_matmul_v":
            return Part(Axis.ROWS, share.kv_heads.times(spec.head_dim))
        case "block_matmul_wo":
            return Part(Axis.COLUMNS, share.heads.times(spec.head_dim))
        case "block_matmul_w1" | "block_matmul_w3":
            return Part(Axis.ROWS, share.ffn)
        case "block_matmul_w2":
            return Part(Axis.COLUMNS, share.ffn)
        case "final_matmul_logits":
            return Part(Axis.ROWS, share.logits)
        case "embedding" | "block_moe_gate" | "block_norm_q" | "block_norm_k" | "block_norm_0" | "block_norm_1" | "final_norm":
            return _WHOLE
    raise GraphError(f"op {name!r} has no weight")


def equal_shares(spec: ModelSpec, n_nodes: int) -> tuple[Share, ...]:
    """The shares of `n_nodes` nodes that hold the same amount each.

    Raises:
        GraphError: something does not divide; names all that does not, and the numbers of nodes that would do.
    """
    obstacles = _obstacles(spec, n_nodes)
    if obstacles:
        possible = [n for n in range(1, spec.n_kv_heads + 1) if not _obstacles(spec, n)]
        hint = f"; possible: {', '.join(map(str, possible))}" if possible else ""
        raise GraphError(f"{n_nodes} equal nodes cannot share this model: {', '.join(obstacles)}{hint}")
    return tuple(
        Share(*(_equal(whole, node, n_nodes) for whole in (spec.n_heads, spec.n_kv_heads, spec.ff_dim, spec.vocab_size)))
        for node in range(n_nodes)
    )


def _equal(whole: int, node: int, n_nodes: int) -> Span:
    each = whole // n_nodes
    return Span(node * each, (node + 1) * each)


def _obstacles(spec: ModelSpec, n_nodes: int) -> list[str]:
    """What keeps the model from being dealt equally, each with its number."""
    if n_nodes < 1:
        return ["there must be one at least"]
    counts = {
        "query heads": spec.n_heads,
        "KV heads": spec.n_kv_heads,
        "feed-forward columns": spec.ff_dim,
        "classifier rows": spec.vocab_size,
    }
    found = [f"{count} {what} do not divide by {n_nodes}" for what, count in counts.items() if count % n_nodes]
    if spec.weight_type in (FloatType.Q40, FloatType.Q80):
        widths = {"attention values": spec.q_dim, "feed-forward columns": spec.ff_dim}
        found += [
            f"{width // n_nodes} {what} a node are not whole blocks of {BLOCK_VALUES}"
            for what, width in widths.items()
            if width % n_nodes == 0 and width // n_nodes % BLOCK_VALUES
        ]
    return found
