"""What was asked for and cannot be had, said where another value is used in its place."""

import structlog

from dairllm import machine
from dairllm.graph.model import ModelSpec

__all__ = ["tell_context", "tell_threads"]

log = structlog.get_logger()

_THREADS_A_PROCESSOR = 2
"""Compute threads that share a processor wait for each other at every op; so many may still be a trial."""


def tell_context(asked: int | None, spec: ModelSpec) -> None:
    """Warn where the context that was asked for is longer than the model's own, which is used."""
    if asked is not None and asked > spec.seq_len:
        log.warning("the model has a shorter context than was asked for", asked=asked, context=spec.seq_len)


def tell_threads(asked: int) -> None:
    """Warn where there are far more compute threads than processors for them."""
    processors = machine.processors()
    if asked > _THREADS_A_PROCESSOR * processors:
        log.warning("more compute threads than processors: each waits for the others", threads=asked, processors=processors)
