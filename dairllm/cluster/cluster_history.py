"""What a root knows of a cluster from earlier openings, so that a worker that is away costs the others nothing."""

from collections.abc import Iterable
from pathlib import Path

from dairllm.config import WorkerAddress

__all__ = ["ClusterHistory"]


class ClusterHistory:
    """Of one cluster, over all its openings.

    Attributes:
        told: by file, what the log was told of a prepared share last.
    """

    def __init__(self) -> None:
        self._absent: set[WorkerAddress] = set()
        self.told: dict[Path, str] = {}

    @property
    def absent(self) -> frozenset[WorkerAddress]:
        """Workers that were missing the last time. They are called first, and the others only when these have answered."""
        return frozenset(self._absent)

    def missed(self, addresses: Iterable[WorkerAddress]) -> None:
        """These were not there, or went."""
        self._absent = set(addresses)

    def complete(self) -> None:
        """All were there."""
        self._absent.clear()
