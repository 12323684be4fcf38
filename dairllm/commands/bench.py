"""`dairllm bench`: how fast this machine is with a model, against what memory and disk could do, and against other programs."""

import json as json_format
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dairllm import machine
from dairllm.bench.conditions import conditions
from dairllm.bench.gguf_twin import gguf_twin
from dairllm.bench.programs import Dairllm, Dllama, LlamaCpp
from dairllm.bench.results import Measured
from dairllm.bench.suites import BENCHES, Bench
from dairllm.bench.table import heading, lines, svg
from dairllm.commands.progress import waiting
from dairllm.errors import ConfigError
from dairllm.formats.model_file import ModelFile
from dairllm.kernels import forms
from dairllm.paging.needs import Policy

__all__ = ["run"]


def run(
    benches: Sequence[str],
    model: Path,
    *,
    threads: int | None,
    kernels: str,
    rounds: int,
    positions: Sequence[int],
    prompt: int,
    percents: Sequence[int],
    nodes: int,
    policy: Policy,
    in_group: bool,
    patience: float,
    busy: int,
    dllama: Path | None,
    turbo: bool,
    llamacpp_python: Path | None,
    without_flash: bool,
    picture: Path | None,
    json: bool,
) -> None:
    """Measure, and print a table of each bench as it is done, or one JSON object at the end.

    Args:
        benches: names of dairllm.bench.suites.BENCHES; all where there are none.
        threads: of a program; one a processor if None.
        dllama: distributed-llama's program, or None.
        turbo: whether its nodes poll.
        llamacpp_python: an interpreter that has xllamacpp, or None.
        without_flash: measure llama.cpp with flash attention off as well.
        picture: an SVG file to write, or None.

    The other arguments are as in `Bench`.

    Raises:
        ConfigError: a bench that there is not, a model without a tokenizer, or `without_flash` without llama.cpp.
        ProgramError: a program that is measured fails.
        FormatError: `model` is no `.m` file.
    """
    unknown = [name for name in benches if name not in BENCHES]
    if unknown:
        raise ConfigError(f"no bench is called {unknown[0]}; there are {', '.join(BENCHES)}")
    if without_flash and llamacpp_python is None:
        raise ConfigError(
            "--without-flash is about llama.cpp, which is not measured: name an interpreter that has it, --llamacpp-python PATH"
        )
    with ModelFile.open(model):
        pass  # a mistake is told before anything is measured
    if not model.with_suffix(".t").exists():
        raise ConfigError(f"no tokenizer: there is no {model.with_suffix('.t')} beside the model")
    forms.select(kernels)
    with ExitStack() as stack:
        llama_cpp = plainer = None
        if llamacpp_python is not None:
            twin = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=model.parent, prefix=".bench-"))) / "twin.gguf"
            with waiting("writing the same weights for llama.cpp"):
                gguf_twin(model, twin)
            llama_cpp = LlamaCpp(llamacpp_python, twin)
            plainer = LlamaCpp(llamacpp_python, twin, flash=False) if without_flash else None
        bench = Bench(
            model,
            Dairllm(kernels),
            machine.processors() if threads is None else threads,
            kernels,
            None if dllama is None else Dllama(dllama, turbo=turbo),
            llama_cpp,
            plainer,
            rounds=rounds,
            positions=tuple(positions),
            prompt=prompt,
            percents=tuple(percents),
            nodes=nodes,
            policy=policy,
            in_group=in_group,
            patience=patience,
            busy=busy,
        )
        found: list[Measured] = []
        told = conditions(model, kernels, bench.threads, busy)
        if not json:
            sys.stdout.write(f"{heading(told)}\n")
        for name in benches or BENCHES:
            with waiting(f"measuring {name}"):
                new = list(BENCHES[name](bench))
            found += new
            if not json:
                sys.stdout.writelines(f"{line}\n" for line in ("", name, *lines(new)))
                sys.stdout.flush()
    if picture is not None:
        picture.write_text(svg(found, told), encoding="utf-8")
    if json:
        json_format.dump({"conditions": told, "results": [each.as_json() for each in found]}, sys.stdout, indent=1)
        sys.stdout.write("\n")
