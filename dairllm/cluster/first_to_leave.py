"""Who is to blame when a cluster breaks: the worker that went first, since the others go because of it."""

import asyncio
import math
from collections.abc import Sequence

from dairllm.cluster.remote_worker import RemoteWorker

__all__ = ["first_to_leave"]

LAST_TO_LEAVE = 0.3
"""Seconds in which whoever leaves because of another one has done so, and the end of that one has come to us."""
_LOOK_SECONDS = 0.02


async def first_to_leave(workers: Sequence[RemoteWorker], awaited: int | None = None) -> RemoteWorker | None:
    """The worker whose connection ended first, once others have had a moment to end too; None where none has ended.

    One that was given up for its silence ended when it fell silent.

    Args:
        awaited: the node that something was awaited from, which decides between ends that were seen at the same moment.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + LAST_TO_LEAVE
    while loop.time() < until and any(worker.ended_at == math.inf for worker in workers):  # noqa: ASYNC110 - an end tells nobody
        await asyncio.sleep(_LOOK_SECONDS)
    gone = [worker for worker in workers if worker.ended_at < math.inf]
    return min(gone, key=lambda worker: (worker.ended_at, worker.node != awaited), default=None)
