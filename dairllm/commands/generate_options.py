"""What `dairllm generate` is asked to do: settings that a file or the environment may hold, and one request of the command line.

`GenerateSettings` is the part that stays (which model, how many threads), described in `configs/generate.yaml`; `GenerateOptions` is
all of it together, checked, as the command's body takes it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dairllm.config import Kernels, Log, Threads, WorkerSettings, load_settings, thread_count
from dairllm.errors import ConfigError

__all__ = ["GenerateOptions", "GenerateSettings", "parse_prompt_ids"]

MAX_ID = 2**31 - 1
"""Token ids are 32 bits wide in every file and message."""

Count = Annotated[int, Field(ge=1, le=MAX_ID)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Model(_Section):
    """Which files. `tokenizer` is the model's name with .t where it is not given."""

    file: str | None = None
    tokenizer: str | None = None
    max_seq_len: Count | None = None


class Engine(_Section):
    """With what to compute."""

    threads: Threads = "auto"
    kernels: Kernels = "auto"
    sync: Literal["auto", "q80", "f32"] = "auto"


class Sampling(_Section):
    """How the next token is chosen, and of how many an answer may be made."""

    steps: Count = 256
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    top_p: float = Field(0.9, gt=0, le=1, allow_inf_nan=False)
    seed: Annotated[int, Field(ge=0, lt=2**64)] | None = None


class GenerateSettings(_Section):
    """All that a file or the environment can tell `dairllm generate`."""

    model: Model = Model()
    engine: Engine = Engine()
    sampling: Sampling = Sampling()
    log: Log = Log(level="warning")

    @classmethod
    def load(cls, file: Path | None, flags: Mapping[str, tuple[str, object]]) -> "GenerateSettings":
        """From all their sources; ConfigError names the source, the line and the key."""
        # A container of a worker has variables that mean nothing here. Those of our own sections are checked.
        foreign = {f"DAIRLLM_{section.upper()}__" for section in WorkerSettings.model_fields if section not in cls.model_fields}
        environment = {name: value for name, value in os.environ.items() if not name.startswith(tuple(foreign))}
        return load_settings(cls, file, environment=environment, flags=flags)


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """One request.

    Attributes:
        model: the `.m` file.
        tokenizer: the `.t` file; None only where `prompt_ids` are given and none lies beside the model: then there is no text.
        prompt: the text, or None where `prompt_ids` take its place.
        prompt_ids: token ids, nothing added, or None.
        chat: whether the prompt goes through the model's chat template.
        steps: most tokens to generate.
        temperature: 0 for the likeliest token always.
        top_p: sample among the likeliest tokens that have this share together; 1 for all.
        seed: of the sampling; None for another one each time.
        ignore_eos: go on after an end-of-text id.
        threads: compute threads.
        kernels: form of the kernels, or "auto".
        max_seq_len: context length; None for the model's.
        sync: what would cross the wire; None for f32 with F32 weights, else q80.
        json: print one JSON object in place of the text.
        logits: where to write the logits [steps, vocabulary], or None.

    Raises:
        ConfigError: options that contradict each other.
    """

    model: Path
    tokenizer: Path | None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    chat: bool = False
    steps: int = 256
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int | None = None
    ignore_eos: bool = False
    threads: int = 1
    kernels: str = "auto"
    max_seq_len: int | None = None
    sync: Literal["q80", "f32"] | None = None
    json: bool = False
    logits: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_ids is None:
            raise ConfigError("nothing to generate from: give a --prompt, or --prompt-ids")
        if self.prompt is not None and self.prompt_ids is not None:
            raise ConfigError("--prompt and --prompt-ids exclude each other")
        if self.prompt_ids is not None and self.chat:
            raise ConfigError("--chat is for a --prompt: nothing is added to --prompt-ids")
        if self.prompt is not None and self.tokenizer is None:
            raise ConfigError("a --prompt needs a --tokenizer")
        if self.max_seq_len is not None and self.prompt_ids is not None and len(self.prompt_ids) > self.max_seq_len:
            raise ConfigError(f"{len(self.prompt_ids)} --prompt-ids do not fit into --max-seq-len {self.max_seq_len}")

    @classmethod
    def of(
        cls,
        settings: GenerateSettings,
        *,
        prompt: str | None,
        prompt_ids: str | None,
        chat: bool,
        ignore_eos: bool,
        json: bool,
        logits: Path | None,
    ) -> "GenerateOptions":
        """Settings and the command line's request together.

        Raises:
            ConfigError: something needed is missing, or options contradict each other.
        """
        if settings.model.file is None:
            raise ConfigError("no model: name its file with --model, or as model.file in the configuration")
        model = Path(settings.model.file)
        ids = None if prompt_ids is None else parse_prompt_ids(prompt_ids)
        return cls(
            model=model,
            tokenizer=_tokenizer(model, settings.model.tokenizer, needed=prompt is not None),
            prompt=prompt,
            prompt_ids=ids,
            chat=chat,
            steps=settings.sampling.steps,
            temperature=settings.sampling.temperature,
            top_p=settings.sampling.top_p,
            seed=settings.sampling.seed,
            ignore_eos=ignore_eos or ids is not None,
            threads=thread_count(settings.engine.threads),
            kernels=settings.engine.kernels,
            max_seq_len=settings.model.max_seq_len,
            sync=None if settings.engine.sync == "auto" else settings.engine.sync,
            json=json,
            logits=logits,
        )


def parse_prompt_ids(text: str) -> tuple[int, ...]:
    """Token ids of ``"1,2,3"``; ConfigError for anything else."""
    ids = []
    for place, word in enumerate(text.split(","), 1):
        number = word.strip()
        if not (number.isascii() and number.isdecimal() and int(number[:11]) <= MAX_ID):
            raise ConfigError(f"--prompt-ids: expected token ids such as 1,2,3, found {number[:20]!r} in place {place}")
        ids.append(int(number))
    return tuple(ids)


def _tokenizer(model: Path, given: str | None, *, needed: bool) -> Path | None:
    if given is not None:
        return Path(given)
    beside = model.with_suffix(".t")
    if beside.exists():
        return beside
    if needed and model.exists():  # a model that is not there is the better complaint
        raise ConfigError(f"no tokenizer: there is no {beside} beside the model; name one with --tokenizer")
    return beside if needed else None
