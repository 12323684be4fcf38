"""What `dairllm generate` can be told, and which of it does not go together."""

from pathlib import Path
from typing import Any

import pytest

from dairllm.commands.generate_options import GenerateOptions, parse_prompt_ids
from dairllm.config import RootSettings, load_settings
from dairllm.errors import ConfigError


def settings(**flags: object) -> RootSettings:
    """With `cluster__workers` for the key cluster.workers."""
    given = {key.replace("__", "."): (key, value) for key, value in {"model__file": "m.m", **flags}.items()}
    return load_settings(RootSettings, environment={}, flags=given)


def options(chosen: RootSettings | None = None, **request: Any) -> GenerateOptions:
    given: dict[str, Any] = {"prompt": None, "prompt_ids": None, "chat": False, "ignore_eos": False, "json": False, "logits": None}
    return GenerateOptions.of(chosen or settings(), **(given | request))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "nothing to generate from"),
        ({"prompt": "a", "prompt_ids": "1"}, "--prompt and --prompt-ids exclude each other"),
        ({"prompt_ids": "1", "chat": True}, "--chat is for a --prompt"),
        ({"prompt_ids": "1,x"}, "--prompt-ids: expected token ids such as 1,2,3, found 'x' in place 2"),
        ({"prompt_ids": ""}, "--prompt-ids: expected token ids such as 1,2,3, found '' in place 1"),
    ],
)
def test_what_does_not_go_together(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(**request_)


def test_no_model() -> None:
    with pytest.raises(ConfigError, match=r"no model: name its file with --model, or as model\.file"):
        options(RootSettings(), prompt="a")


def test_too_many_prompt_ids() -> None:
    with pytest.raises(ConfigError, match="3 --prompt-ids do not fit into --max-seq-len 2"):
        options(settings(model__max_seq_len=2), prompt_ids="1,2,3")


def test_prompt_ids_imply_ignore_eos_and_need_no_tokenizer() -> None:
    chosen = options(prompt_ids="1, 2,3")
    assert (chosen.prompt_ids, chosen.prompt, chosen.ignore_eos, chosen.tokenizer) == ((1, 2, 3), None, True, None)
    assert not options(prompt="a").ignore_eos


def test_the_tokenizer_lies_beside_the_model(tmp_path: Path) -> None:
    chosen = settings(model__file=str(tmp_path / "a.m"))
    assert options(chosen, prompt="a").tokenizer == tmp_path / "a.t", "neither is there: opening the model will say so"
    (tmp_path / "a.m").write_bytes(b"\xcd\xab\x00\x0a")  # what a model file begins with
    with pytest.raises(ConfigError, match=r"no tokenizer: there is no .*a\.t beside the model; name one with --tokenizer"):
        options(chosen, prompt="a")
    assert options(chosen, prompt_ids="1").tokenizer is None
    (tmp_path / "a.t").touch()
    assert options(chosen, prompt_ids="1").tokenizer == tmp_path / "a.t"


def test_defaults_are_those_of_the_settings() -> None:
    chosen = options(prompt="a")
    assert chosen == GenerateOptions(chosen.model, chosen.tokenizer, prompt="a", root=chosen.root)


@pytest.mark.parametrize(
    ("workers", "shares", "message"),
    [
        ("a,b", "2/64,1/32", "shares for 2 nodes, but there are 3: this one, which comes first, and the --workers"),
        ([], "2/64,1/32", "shares for 2 nodes, but there are 1: "),
        ("a", "2/64;1/32", "expected query heads/feed-forward columns of each node, as in 2/64,1/32"),
        ("a", "", "expected query heads/feed-forward columns of each node"),
    ],
)
def test_shares_that_are_none(workers: object, shares: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(settings(cluster__workers=workers, cluster__shares=shares), prompt="a")


@pytest.mark.parametrize("text", ["1,,2", "-1", "1.5", "1 2", "0x10", "٣", "99999999999", "1" * 5000])
def test_what_is_no_list_of_ids(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-ids: expected token ids") as failure:
        parse_prompt_ids(text)
    assert len(str(failure.value)) < 120
