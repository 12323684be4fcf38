"""Lists of names in settings: one text with commas between them, as the environment has it, or a list."""

import re

__all__ = ["host_names", "origins"]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/:?#@\[\]]+)(:\d{1,5})?")
_HOST = re.compile(r"[^\s/:,@\[\]]+")


def origins(value: object) -> tuple[str, ...]:
    """Of web pages, ``"https://chat.example"`` or ``"*"`` for all; ValueError otherwise."""
    found = tuple(name.lower().removesuffix("/") for name in _names(value, "origins"))
    for name in found:
        if name != "*" and not _ORIGIN.fullmatch(name):
            raise ValueError(f"expected an origin such as https://chat.example or http://localhost:3000, or *, found {name!r}")
    return found


def host_names(value: object) -> tuple[str, ...]:
    """Without ports, ``"ai.example"``; ValueError otherwise."""
    found = tuple(name.lower().removesuffix(".") for name in _names(value, "host names"))
    for name in found:
        if not _HOST.fullmatch(name):
            raise ValueError(f"expected a host's name without a port, such as ai.example, found {name!r}")
    return found


def _names(value: object, what: str) -> list[str]:
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"expected a list of {what}, or one text with commas between them, found {value!r}")
    return [name.strip() for name in given]
