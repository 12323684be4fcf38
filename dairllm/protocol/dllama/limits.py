"""How much a peer may announce before we stop believing it."""

from dataclasses import dataclass

__all__ = ["DEFAULT_LIMITS", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on every number that the wire can announce. What a node may *allocate* is bounded elsewhere, by the memory it was given:
    these only keep counts and sizes within what any real model needs, so that what is parsed stays proportional to what was sent.
    """

    max_workers: int = 256
    max_string_bytes: int = 256
    """Of one host, name or name with its marker, its NUL included."""
    max_batches: int = 1024
    """Rows of one batch; a C++ root always says 32."""
    max_pipes: int = 64
    max_buffers: int = 16384
    """Real graphs have about 25, and two a layer."""
    max_segments: int = 4096
    max_syncs: int = 8
    """Of one segment."""
    max_ops: int = 32768
    """Of all segments together; real graphs have about 27 a layer."""
    max_spans: int = 1024
    """Of one weight's part: a model's heads, each lying by itself, at most."""
    max_values: int = 1 << 44
    """Of one pipe, buffer or weight."""
    max_weight_bytes: int = 1 << 44
    max_positions: int = 1 << 24
    """Positions travel through a pipe of float32, which counts no further."""


DEFAULT_LIMITS = Limits()
