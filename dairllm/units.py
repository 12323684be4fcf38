"""Sizes and times as people write them in files, flags and output: ``2GiB``, ``512MiB``, ``5s``, ``250ms``.

A number without a unit is refused: nobody remembers whether a bare 60 is seconds or milliseconds.
"""

import re

__all__ = ["format_duration", "format_size", "parse_duration", "parse_size"]

_SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_DURATIONS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]+)", re.ASCII)


def parse_size(text: object) -> int:
    """Bytes of ``"2GiB"``; units B, KiB, MiB, GiB, TiB (powers of 1024) and kB, MB, GB, TB (powers of 1000).

    Raises:
        ValueError: not a size.
    """
    number, factor = _split(text, _SIZES, "a size such as 2GiB or 512MiB")
    return int(number * factor)


def format_size(nbytes: float) -> str:
    """``"2GiB"``, ``"1.5MiB"``, ``"17B"``: in the largest unit that gives at least 1."""
    name, factor = next(((n, f) for n, f in reversed(_SIZES.items()) if n.endswith("iB") and abs(nbytes) >= f), ("B", 1))
    return f"{_short(nbytes / factor)}{name}"


def parse_duration(text: object) -> float:
    """Seconds of ``"5s"``; units us, ms, s, m (minutes), h.

    Raises:
        ValueError: not a time.
    """
    number, factor = _split(text, _DURATIONS, "a time such as 5s or 250ms")
    return number * factor


def format_duration(seconds: float) -> str:
    """``"5s"``, ``"250ms"``, ``"1.5m"``: in the largest unit that gives at least 1."""
    name, factor = next(((n, f) for n, f in reversed(_DURATIONS.items()) if abs(seconds) >= f), ("s", 1.0))
    return f"{_short(seconds / factor)}{name}"


def _split(text: object, units: dict[str, float] | dict[str, int], what: str) -> tuple[float, float]:
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None or match[2] not in units:
        raise ValueError(f"expected {what} (units: {', '.join(units)}), found {text!r}")
    return float(match[1]), units[match[2]]


def _short(number: float) -> str:
    return f"{number:.2f}".rstrip("0").rstrip(".")
