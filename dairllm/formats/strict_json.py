"""JSON of files that somebody else may have written: what cannot be a document of ours is a
ValueError, whatever the parser makes of it."""

import json
import math
from typing import Any, NoReturn

__all__ = ["read_json", "whole_number"]


def read_json(text: bytes | str) -> Any:
    """The document.

    Raises:
        ValueError: it is no JSON, no UTF-8, nests too deep for the parser, or has a number that is
            not finite (1e400, NaN).
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("values nested too deep") from None


def whole_number(value: object) -> int:
    """`value`, which is an integer that is not negative.

    Raises:
        ValueError: it is anything else, true and 1.0 included.
    """
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a whole number, found {value!r}")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number that is not finite: {text}")
    return value


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"a number that is not finite: {text}")
