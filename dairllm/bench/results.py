"""What was measured: medians, and ratios of pairs with their range, as a table and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Measured", "Ratio", "ratio"]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours to another, pair by pair: two runs, one after the other."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} .. {self.most:.2f})"


def ratio(ours: Sequence[float], theirs: Sequence[float], *, more_is_better: bool) -> Ratio:
    """How many times as fast ours is.

    Args:
        ours, theirs: of the same rounds.
        more_is_better: rates rather than times.
    """
    found = sorted(a / b if more_is_better else b / a for a, b in zip(ours, theirs, strict=True))
    return Ratio(statistics.median(found), found[0], found[-1])


@dataclass(slots=True)
class Measured:
    """One figure, of every program that was asked for it.

    Attributes:
        bench: kernels, tokens, prompt, cluster or paging.
        what: "generation at 128".
        unit: "tokens/s", "ms", "GB/s".
        samples: ours, round by round.
        peers: theirs, in the same rounds.
        bound: what the machine could do at best in the same run, in `unit`; None where nothing bounds it that was measured.
        more: whatever else is worth keeping.
    """

    bench: str
    what: str
    unit: str
    samples: list[float] = field(default_factory=list)
    peers: dict[str, list[float]] = field(default_factory=dict)
    bound: float | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith("/s")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def share_of_bound(self) -> float | None:
        """1: as fast as the machine can be."""
        if not self.bound:
            return None
        return self.median / self.bound if self.more_is_better else self.bound / self.median

    def ratios(self) -> Mapping[str, Ratio]:
        """Ours to each peer."""
        return {name: ratio(self.samples, theirs, more_is_better=self.more_is_better) for name, theirs in self.peers.items() if theirs}

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "what": self.what,
            "unit": self.unit,
            "dairllm": _figures(self.samples),
            "bound": None if self.bound is None else {self.unit: _round(self.bound), "share": _round(self.share_of_bound or 0.0)},
            "peers": {
                name: _figures(self.peers[name]) | {"ratio": {"median": _round(r.median), "least": _round(r.least), "most": _round(r.most)}}
                for name, r in self.ratios().items()
            },
            **self.more,
        }


def _figures(samples: Sequence[float]) -> dict[str, Any]:
    return {"median": _round(statistics.median(samples)), "samples": [_round(value) for value in samples]}


def _round(value: float) -> float:
    return float(f"{value:.4g}")
