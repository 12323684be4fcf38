"""What is to be seen of a node that pages."""

from typing import NamedTuple

from dairllm.paging.needs import PagingMetrics
from dairllm.paging.read_mode import ReadMode
from dairllm.paging.thread_configuration import ThreadConfiguration

__all__ = ["PagingStatus"]


class PagingStatus(NamedTuple):
    """Attributes:
    metrics: what has been read and waited for.
    read_mode: how blocks are read, as measured at the start.
    configuration: how many threads compute and read for a token, by now.
    """

    metrics: PagingMetrics
    read_mode: ReadMode
    configuration: ThreadConfiguration
