"""What `dairllm generate` is asked to do: the settings of a root (`configs/root.yaml`) and one request of the command line, checked."""

from dataclasses import dataclass, field
from pathlib import Path

from dairllm.config import MAX_ID, RootSettings, Sampling
from dairllm.errors import ConfigError
from dairllm.formats.file_kind import check_is_model
from dairllm.graph.slicing import parse_shares

__all__ = ["GenerateOptions", "parse_prompt_ids", "read_prompt", "tokenizer_path"]

_MAX_PROMPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """One request.

    Attributes:
        model: the `.m` file.
        tokenizer: the `.t` file; None only where `prompt_ids` are given and none lies beside the model: then there is no text.
        prompt: the text, or None where `prompt_ids` take its place.
        prompt_ids: token ids, nothing added, or None.
        chat: whether the prompt goes through the model's chat template.
        sampling: how tokens are chosen, and how many at most.
        ignore_eos: go on after an end-of-text id.
        root: all that is not of this request: with what, with whom and within which limits it is computed.
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
    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    root: RootSettings = field(default_factory=RootSettings)
    json: bool = False
    logits: Path | None = None

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_ids is None:
            raise ConfigError("nothing to generate from: give a --prompt, a --prompt-file, or --prompt-ids")
        if self.prompt is not None and self.prompt_ids is not None:
            raise ConfigError("--prompt and --prompt-ids exclude each other")
        if self.prompt_ids is not None and self.chat:
            raise ConfigError("--chat is for a --prompt: nothing is added to --prompt-ids")
        if self.prompt is not None and self.tokenizer is None:
            raise ConfigError("a --prompt needs a --tokenizer")
        n_nodes, shares, context = len(self.root.cluster.workers) + 1, self.root.cluster.shares, self.root.model.max_seq_len
        if shares is not None and len(sizes := parse_shares(shares)) != n_nodes:
            raise ConfigError(f"shares for {len(sizes)} nodes, but there are {n_nodes}: this one, which comes first, and the --workers")
        if context is not None and self.prompt_ids is not None and len(self.prompt_ids) > context:
            raise ConfigError(f"{len(self.prompt_ids)} --prompt-ids do not fit into --max-seq-len {context}")

    @classmethod
    def of(
        cls,
        settings: RootSettings,
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
            tokenizer=tokenizer_path(model, settings.model.tokenizer, needed=prompt is not None),
            prompt=prompt,
            prompt_ids=ids,
            chat=chat,
            sampling=settings.sampling,
            ignore_eos=ignore_eos or ids is not None,
            root=settings,
            json=json,
            logits=logits,
        )


def read_prompt(text: str | None, file: Path | None) -> str | None:
    """The prompt of `--prompt` or `--prompt-file`; `-` is stdin. A text's own last line break is left out.

    Raises:
        ConfigError: both are given, a file cannot be read, or what is in it is not UTF-8 or is too large.
    """
    if text is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file exclude each other")
    if text != "-" and file is None:
        return text
    name = "stdin" if file is None or str(file) == "-" else str(file)
    try:
        with open(0 if name == "stdin" else name, "rb", closefd=name != "stdin") as source:
            content = bytes(source.read(_MAX_PROMPT_BYTES + 1))
    except OSError as error:
        raise ConfigError(f"the prompt in {name} cannot be read: {error.strerror or error}") from None
    if len(content) > _MAX_PROMPT_BYTES:
        raise ConfigError(f"the prompt in {name} is larger than {_MAX_PROMPT_BYTES >> 20} MiB")
    try:
        prompt = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt in {name} is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from None
    return prompt.removesuffix("\n").removesuffix("\r")


def parse_prompt_ids(text: str) -> tuple[int, ...]:
    """Token ids of ``"1,2,3"``; ConfigError for anything else."""
    ids = []
    for place, word in enumerate(text.split(","), 1):
        number = word.strip()
        if not (number.isascii() and number.isdecimal() and int(number[:11]) <= MAX_ID):
            raise ConfigError(f"--prompt-ids: expected token ids such as 1,2,3, found {number[:20]!r} in place {place}")
        ids.append(int(number))
    return tuple(ids)


def tokenizer_path(model: Path, given: str | None, *, needed: bool) -> Path | None:
    """The `.t` file that was named, or the one beside the model.

    Raises:
        ConfigError: one is needed, and there is none.
        FormatError: there is none because `model` is a file of another kind.
    """
    if given is not None:
        return Path(given)
    beside = model.with_suffix(".t")
    if beside.exists():
        return beside
    if needed and model.exists():  # a model that is not there, or is none, is the better complaint
        check_is_model(model)
        raise ConfigError(f"no tokenizer: there is no {beside} beside the model; name one with --tokenizer")
    return beside if needed else None
