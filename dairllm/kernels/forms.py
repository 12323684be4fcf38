"""Which form of the kernels this process runs.

All forms compute the same bits (docs/arithmetic.md); they differ in the instructions that multiply bytes:

    portable     plain vector IR, no instruction of a particular processor: runs anywhere
    avx2         vpmaddubsw, vpmaddwd; half-precision conversions by F16C
    avxvnni      vpdpbusd on 256 bits, VEX encoded
    avx512vnni   vpdpbusd on 512 bits

The form is a property of the process: it is chosen once, before the kernels are loaded, since an instruction that the processor lacks
ends the process.
"""

from dairllm.errors import ConfigError
from dairllm.kernels import processor

__all__ = ["FORMS", "available", "current", "needs", "select"]

FORMS = ("avx512vnni", "avxvnni", "avx2", "portable")
"""Best first."""

_NEEDS = {
    "avx512vnni": {"avx512vnni", "avx512vl", "avx512bw", "avx512f", "avx2", "fma", "f16c"},
    "avxvnni": {"avxvnni", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}

_selected: str | None = None


def needs(form: str) -> frozenset[str]:
    """What a processor must have to run a form, by LLVM's names."""
    return frozenset(_NEEDS[form])


def available() -> tuple[str, ...]:
    """The forms that this processor can run, best first."""
    features = processor.features()
    return tuple(form for form in FORMS if _NEEDS[form] <= features)


def select(name: str = "auto") -> str:
    """Choose the form of this process; returns its name.

    Raises:
        ConfigError: no such form, this processor cannot run it, or the process already runs another.
    """
    global _selected
    can = available()
    if name == "auto":
        name = _selected or can[0]
    if name not in FORMS:
        raise ConfigError(f"kernels: no form is called {name!r}; there are auto, {', '.join(FORMS)}")
    if name not in can:
        missing = ", ".join(sorted(_NEEDS[name] - processor.features()))
        raise ConfigError(f"kernels: this processor cannot run {name} (it lacks {missing}); it can run {', '.join(can)}")
    if _selected not in (None, name):
        raise ConfigError(f"kernels: this process already runs {_selected} and cannot change to {name}")
    _selected = name
    return name


def current() -> str:
    """The chosen form; chooses the best where nobody has chosen."""
    return _selected or select()
