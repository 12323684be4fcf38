"""What was exchanged with each worker over all models that were open one after the other."""

from collections.abc import Iterator, Sequence

from dairllm.runtime.node_status import NodeStatus
from dairllm.telemetry import LinkBytes

__all__ = ["LinkTotals"]


class LinkTotals:
    """Sums by worker; each model counts from 0."""

    def __init__(self) -> None:
        self._past: dict[tuple[int, str], LinkBytes] = {}

    def keep(self, nodes: Sequence[NodeStatus]) -> None:
        """A model is being closed; `nodes` are its last counts."""
        self._past = {(link.node, link.address): link for link in self.over(nodes)}

    def over(self, nodes: Sequence[NodeStatus]) -> Iterator[LinkBytes]:
        """All of it, where the model that is open now counts `nodes`."""
        links = dict(self._past)
        for one in nodes:
            if one.node > 0:
                key = one.node, one.address
                past = links.get(key, LinkBytes(*key, 0, 0, 0))
                sent, received = past.sent + one.bytes_sent, past.received + one.bytes_received
                links[key] = LinkBytes(*key, sent, received, past.weights + one.weight_bytes_sent)
        yield from links.values()
