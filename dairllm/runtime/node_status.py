"""What a root knows of each node: who it is, what it computes, what crossed the wire."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["NodeStatus"]


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node, seen by the root.

    Attributes:
        node: its number; 0 is the root.
        address: where it listens; empty for the root.
        kind: whose program it runs.
        heads: query heads of its share; kv_heads: KV heads; ffn: columns of the feed-forward block.
        bytes_sent: what the root sent to it so far, weights apart. Of the root: to all.
        bytes_received: what the root received from it. Of the root: from all.
        weight_bytes_sent: weights that the root sent to it. Of the root: to all.
    """

    node: int
    address: str
    kind: Literal["dairllm", "dllama"]
    heads: int
    kv_heads: int
    ffn: int
    bytes_sent: int = 0
    bytes_received: int = 0
    weight_bytes_sent: int = 0
