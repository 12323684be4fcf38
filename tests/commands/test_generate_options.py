"""What `dairllm generate` can be told, and which of it does not go together."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dairllm.commands.generate_options import GenerateOptions, GenerateSettings, parse_prompt_ids
from dairllm.errors import ConfigError

EXAMPLE = Path(__file__).parent.parent.parent / "configs" / "generate.yaml"


def leaves(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return found


def options(settings: GenerateSettings | None = None, **request: Any) -> GenerateOptions:
    given: dict[str, Any] = {"prompt": None, "prompt_ids": None, "chat": False, "ignore_eos": False, "json": False, "logits": None}
    return GenerateOptions.of(settings or GenerateSettings.load(None, {"model.file": ("--model", "m.m")}), **(given | request))


def test_the_documented_file_has_every_key_with_its_default() -> None:
    written = yaml.safe_load(EXAMPLE.read_text())
    assert {f"{section}.{key}" for section, keys in written.items() for key in keys} == set(leaves(GenerateSettings()))
    assert GenerateSettings.load(EXAMPLE, {}) == GenerateSettings()


def test_every_key_of_the_documented_file_has_a_comment() -> None:
    for line in EXAMPLE.read_text().splitlines():
        if re.match(r" +\w+:", line):
            assert "# " in line, line


def test_a_workers_variables_are_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAIRLLM_WORKER__PORT", "9990")
    monkeypatch.setenv("DAIRLLM_ENGINE__THREADS", "3")
    assert GenerateSettings.load(None, {}).engine.threads == 3
    monkeypatch.setenv("DAIRLLM_ENGINE__THREAD", "3")
    with pytest.raises(ConfigError, match=r"DAIRLLM_ENGINE__THREAD: engine\.thread: unknown key; did you mean threads\?"):
        GenerateSettings.load(None, {})


@pytest.mark.parametrize(
    ("key", "flag", "value"),
    [
        ("engine.threads", "--threads", 0),
        ("engine.threads", "--threads", "many"),
        ("engine.kernels", "--kernels", "sse"),
        ("engine.sync", "--sync", "f16"),
        ("sampling.steps", "--steps", 0),
        ("sampling.temperature", "--temperature", -0.1),
        ("sampling.temperature", "--temperature", float("nan")),
        ("sampling.top_p", "--top-p", 0.0),
        ("sampling.top_p", "--top-p", 1.1),
        ("sampling.seed", "--seed", -1),
        ("sampling.seed", "--seed", 2**64),
        ("model.max_seq_len", "--max-seq-len", 0),
        ("log.level", "--log-level", "loud"),
    ],
)
def test_values_out_of_range_name_their_flag(key: str, flag: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^flag {flag}: {key}: expected .*, found ") as failure:
        GenerateSettings.load(None, {key: (flag, value)})
    assert failure.value.exit_code == 2


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
        options(GenerateSettings(), prompt="a")


def test_too_many_prompt_ids() -> None:
    with pytest.raises(ConfigError, match="3 --prompt-ids do not fit into --max-seq-len 2"):
        options(GenerateSettings.load(None, {"model.file": ("", "m.m"), "model.max_seq_len": ("", 2)}), prompt_ids="1,2,3")


def test_prompt_ids_imply_ignore_eos_and_need_no_tokenizer() -> None:
    chosen = options(prompt_ids="1, 2,3")
    assert (chosen.prompt_ids, chosen.prompt, chosen.ignore_eos, chosen.tokenizer) == ((1, 2, 3), None, True, None)
    assert not options(prompt="a").ignore_eos


def test_the_tokenizer_lies_beside_the_model(tmp_path: Path) -> None:
    settings = GenerateSettings.load(None, {"model.file": ("--model", str(tmp_path / "a.m"))})
    assert options(settings, prompt="a").tokenizer == tmp_path / "a.t", "neither is there: opening the model will say so"
    (tmp_path / "a.m").touch()
    with pytest.raises(ConfigError, match=r"no tokenizer: there is no .*a\.t beside the model; name one with --tokenizer"):
        options(settings, prompt="a")
    assert options(settings, prompt_ids="1").tokenizer is None
    (tmp_path / "a.t").touch()
    assert options(settings, prompt_ids="1").tokenizer == tmp_path / "a.t"


def test_defaults_are_those_of_the_settings() -> None:
    chosen = options(prompt="a")
    plain = GenerateOptions(chosen.model, chosen.tokenizer, prompt="a", threads=chosen.threads)
    assert chosen == plain
    assert chosen.threads >= 1


@pytest.mark.parametrize("text", ["1,,2", "-1", "1.5", "1 2", "0x10", "٣", "99999999999", "1" * 5000])
def test_what_is_no_list_of_ids(text: str) -> None:
    with pytest.raises(ConfigError, match="--prompt-ids: expected token ids") as failure:
        parse_prompt_ids(text)
    assert len(str(failure.value)) < 120
