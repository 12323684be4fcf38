"""A model that can be used at once, as a service sees it."""

from collections.abc import Sequence
from typing import Protocol

from dairllm.engine.kv_caches import KvCaches
from dairllm.paging.status import PagingStatus
from dairllm.runtime.node_status import NodeStatus
from dairllm.serving.scoring import ScoringModel

__all__ = ["OpenModel"]


class OpenModel(ScoringModel, Protocol):
    """A model that somebody opened."""

    @property
    def nodes(self) -> Sequence[NodeStatus]:
        """Who computes it, the root first."""
        ...

    @property
    def paging(self) -> PagingStatus | None:
        """Of this machine's weights; None where nothing is paged."""
        ...

    @property
    def kv_caches(self) -> KvCaches | None:
        """Its KV caches, where it has several: each holds another text."""
        ...

    @property
    def trouble(self) -> str | None:
        """Why it cannot be used any more, as far as that shows while nobody uses it; None while it can."""
        ...

    async def close(self) -> None: ...
