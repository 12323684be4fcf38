"""A setting is said once: what a flag is, and what its help says of the default, is held to the settings' schema."""

import re
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from dairllm.cli import app, options
from dairllm.cli.options import root_flags
from dairllm.config import RootSettings, WorkerSettings

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined] # a group, as typer makes it


def default_of(schema: type[BaseModel], key: str) -> object:
    found: Any = schema()
    for name in key.split("."):
        found = getattr(found, name)
    return found


def test_a_parameter_that_is_no_setting_and_not_named_is_refused() -> None:
    assert root_flags({"threads": "2", "json": True}, others=("json",)) == {"engine.threads": ("--threads", 2)}
    with pytest.raises(ValueError, match=r"^parameters that are no settings and not named as others: slots$"):
        root_flags({"slots": 4, "threads": "2"})


@pytest.mark.parametrize("name", options._ROOT_KEYS)
def test_each_is_a_setting(name: str) -> None:
    default_of(RootSettings, options._ROOT_KEYS[name])


def told_defaults() -> list[tuple[str, str, str]]:
    """(command, parameter, the default that its help tells)."""
    return [
        (command, parameter.name, told[1])
        for command in ("generate", "serve", "plan")
        for parameter in COMMANDS[command].params
        if parameter.name in options._ROOT_KEYS and (told := re.search(r"\[default: ([^],]+)", parameter.help or ""))
    ]


@pytest.mark.parametrize(("command", "name", "told"), told_defaults())
def test_help_tells_the_default_that_there_is(command: str, name: str, told: str) -> None:
    found = default_of(RootSettings, options._ROOT_KEYS[name])
    none = {"nearly equal ones", "the model's", "none", "as many as there is room for", "another each time"}
    none |= {"the model's name with .t", "its file's name without .m"}
    if found is None or found == ():
        assert told in none
    else:
        assert told == (f"{found:g}" if isinstance(found, float) else str(found))


def test_help_tells_the_defaults_of_a_worker() -> None:
    told = {parameter.name: re.search(r"\[default: ([^],]+)", parameter.help or "") for parameter in COMMANDS["worker"].params}
    found = {name: match[1] for name, match in told.items() if match}
    worker = WorkerSettings()
    assert (found["host"], found["port"]) == (worker.worker.host, str(worker.worker.port))
    assert (found["kv_cache"], found["threads"], found["kernels"]) == ("f32", "auto", "auto")
    assert (found["memory_limit"], found["metrics_port"]) == (str(worker.limits.memory), worker.metrics.port)
