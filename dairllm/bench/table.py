"""What was measured, for people: lines of text and a picture."""

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from dairllm.bench.results import Measured

__all__ = ["heading", "lines", "svg"]

_WIDTH, _ROW, _LABEL, _BAR = 900, 26, 300, 420
_OURS, _LIMIT, _TEXT = "#2a6fb0", "#c8c8c8", "#303030"
_PEERS = {"distributed-llama": "#d08a2e", "llama.cpp": "#7a7a7a"}
_OTHER = "#5a9a5a"


def heading(conditions: dict[str, Any]) -> str:
    """One line: when, on what, under which load."""
    load, busy = conditions["load"][0], conditions["busy"]
    beside = f" beside {busy} busy process{'es' * (busy > 1)}" if busy else ""
    return (
        f"{conditions['date']}, {conditions['model']}, {conditions['processor']}, {conditions['processors']} processors, "
        f"{conditions['threads']} threads, kernels {conditions['kernels']}, load {load}{beside}"
    )


def lines(found: Iterable[Measured]) -> list[str]:
    """A table: what, our median, the share of what the machine could do, and the ratio to each peer with the range of its pairs."""
    rows = [["", "dairllm", "of the limit", "against others"]]
    for each in found:
        share = "" if each.share_of_bound is None else f"{each.share_of_bound:.0%} of {_short(each.bound or 0.0)}"
        against = "; ".join(f"{ratio} x {name} ({_short(statistics.median(each.peers[name]))})" for name, ratio in each.ratios().items())
        rows.append([each.what, f"{_short(each.median)} {each.unit}", share, against])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in rows]


def svg(found: Sequence[Measured], conditions: dict[str, Any]) -> str:
    """Bars of speed for whatever was measured against others, or else against a limit; each group to its own scale, longer is faster."""
    groups = [each for each in found if each.peers] or [each for each in found if each.bound]
    parts: list[str] = []
    y = 44
    for each in groups:
        bars = _bars(each)
        longest = max(rate for _, rate, _, _ in bars)
        parts.append(_text(12, y + 4, each.what, bold=True))
        y += _ROW - 6
        for name, rate, colour, label in bars:
            length = max(2.0, _BAR * rate / longest)
            parts.append(_text(28, y + 13, name))
            parts.append(f'<rect x="{_LABEL - 90}" y="{y}" width="{length:.1f}" height="17" fill="{colour}"/>')
            parts.append(_text(_LABEL - 90 + length + 8, y + 13, label))
            y += _ROW - 4
        y += 12
    head = _text(12, 20, f"{heading(conditions)}; longer is faster")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{y + 8}" viewBox="0 0 {_WIDTH} {y + 8}" '
        f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join([head, *parts])
        + "\n</svg>\n"
    )


def _bars(each: Measured) -> list[tuple[str, float, str, str]]:
    """(who, rate, colour, what stands behind the bar), rates so that more is better."""

    def rate(value: float) -> float:
        return value if each.more_is_better else 1.0 / value

    bars = [("dairllm", rate(each.median), _OURS, f"{_short(each.median)} {each.unit}")]
    for name, ratio in each.ratios().items():
        value = statistics.median(each.peers[name])
        bars.append(
            (
                name,
                rate(value),
                _PEERS.get(name, _OTHER),
                f"{_short(value)} {each.unit}; dairllm is {ratio.median:.2f} x ({ratio.least:.2f} .. {ratio.most:.2f})",
            )
        )
    if each.bound:
        bars.append(("the machine's limit", rate(each.bound), _LIMIT, f"{_short(each.bound)} {each.unit}"))
    return bars


def _text(x: float, y: float, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" fill="{_TEXT}"{weight}>{escape(words)}</text>'


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
