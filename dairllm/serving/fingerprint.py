"""What the bits of an answer depend on beside its prompt, its sampling and its seed, in a word."""

from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from dairllm import __version__
from dairllm.graph.types import FloatType
from dairllm.runtime.node_status import NodeStatus

__all__ = ["ARITHMETIC", "Fingerprint"]

ARITHMETIC = 1
"""The version of docs/arithmetic.md. It grows with each change of what that page defines."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Of a model and the way in which it is computed; threads, memory, paging and processors are no part of it, since they change nothing.

    Attributes:
        model: a digest of it.
        sync: what crosses the wire between nodes.
        kv_cache: of the root; it does not know the workers'.
    """

    model: bytes
    sync: FloatType
    kv_cache: FloatType

    def of(self, nodes: Sequence[NodeStatus]) -> str:
        """``"dairllm-0.1.0-3f29..."``, where these nodes compute it: their number, shares and kinds."""
        shares = [f"{node.heads}/{node.kv_heads}/{node.ffn} {node.kind}" for node in nodes]
        parts = [f"arithmetic {ARITHMETIC}", self.model.hex(), f"sync {self.sync.name}", f"kv {self.kv_cache.name}", *shares]
        return f"dairllm-{__version__}-{blake3('; '.join(parts).encode()).hexdigest(6)}"
