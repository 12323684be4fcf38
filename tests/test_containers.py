"""Image, composition and example files, as far as they can be checked where there are no containers: what they name exists, what they set
are settings, and what they promise about privileges is written down."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dairllm.cli import app
from dairllm.config import RootSettings, WorkerAddress, WorkerSettings, load_settings
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.slicing import deal_shares, parse_shares
from dairllm.graph.types import FloatType
from dairllm.kernels.objects.cache import shipped_folder
from dairllm.units import parse_duration

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
GIVEN = {"DAIRLLM_MODELS": "/srv/models", "DAIRLLM_MODEL": "some-model.m"}


def interpolated(text: str, variables: dict[str, str]) -> str:
    """What compose makes of ${NAME:-default} and ${NAME:?what to do}."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if not variables.get(name) and kind == "?":
            raise LookupError(rest)
        return variables.get(name) or rest

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)


def composed(**variables: str) -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load(interpolated(COMPOSE.read_text(), GIVEN | variables))["services"]
    return services


def environment_of(service: dict[str, Any]) -> dict[str, str]:
    return {key: "" if value is None else str(value) for key, value in service["environment"].items()}


def instructions() -> list[tuple[str, str]]:
    """Name and rest of the Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


def instruction(name: str) -> str:
    """The last one of that name: the one of the image that is run."""
    return [rest for found, rest in instructions() if found == name][-1]


SERVICES = ("root", "worker-1", "worker-2")


def test_a_root_and_two_workers() -> None:
    assert tuple(composed()) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_has_more_rights_than_it_needs(name: str) -> None:
    service = composed()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "noexec" in service["tmpfs"][0]
    assert not {"privileged", "cap_add", "user", "pid", "network_mode"} & set(service)
    assert service["restart"] == "unless-stopped"
    assert service["mem_limit"] == "4g"


@pytest.mark.parametrize("name", SERVICES)
def test_each_has_the_images_own_health_check_and_the_time_to_stop(name: str) -> None:
    service = composed()[name]
    test = service["healthcheck"]["test"]
    assert test[0] == "CMD"
    assert instruction("HEALTHCHECK").endswith(f"CMD {json.dumps(test[1:])}")
    shutdown = {"root": RootSettings().deadlines.shutdown}.get(name, WorkerSettings().deadlines.shutdown)
    assert parse_duration(service["stop_grace_period"]) > shutdown + 2


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_sets_are_settings(name: str) -> None:
    services = composed(DAIRLLM_THREADS="3", DAIRLLM_SHARES="4/64,3/32,2/32", DAIRLLM_MAX_SEQ_LEN="1024")
    environment = environment_of(services[name])
    if name == "root":
        root = load_settings(RootSettings, environment=environment)
        assert root.cluster.workers == (WorkerAddress("worker-1"), WorkerAddress("worker-2"))
        assert {worker.host for worker in root.cluster.workers} == set(services) - {"root"}
        assert root.cluster.shares is not None
        assert len(parse_shares(root.cluster.shares)) == len(services)
        assert (root.engine.n_threads, root.model.max_seq_len, root.server.port) == (3, 1024, 8000)
    else:
        worker = load_settings(WorkerSettings, environment=environment)
        assert (worker.worker.n_threads, worker.worker.port, worker.metrics_port) == (3, 9990, 10990)


def test_what_is_not_given_is_as_if_it_were_not_there() -> None:
    root = load_settings(RootSettings, environment=environment_of(composed()["root"]))
    assert (root.cluster.shares, root.model.max_seq_len, root.engine.n_threads) == (None, None, 1)


@pytest.mark.parametrize("name", SERVICES)
def test_what_it_runs_is_a_command(name: str) -> None:
    commands = typer.main.get_command(app)
    word, *options = composed()[name]["command"]
    context = typer.Context(commands)
    command = commands.get_command(context, word)  # type: ignore[attr-defined] # a group of commands has it
    assert command is not None
    command.make_context(word, list(options), resilient_parsing=False)


def test_the_root_alone_can_be_reached_and_from_this_machine_alone() -> None:
    text = yaml.safe_load(interpolated(COMPOSE.read_text(), GIVEN))
    assert text["networks"]["cluster"] == {"internal": True}
    assert text["services"]["root"]["ports"] == ["127.0.0.1:8000:8000"]
    for name in ("worker-1", "worker-2"):
        assert "ports" not in text["services"][name]
        assert text["services"][name]["networks"] == ["cluster"]


def test_the_root_starts_without_its_workers() -> None:
    """With conditions it would stay away as long as one of them is broken."""
    assert composed()["root"]["depends_on"] == ["worker-1", "worker-2"]


def test_the_model_is_read_only_and_where_the_command_says() -> None:
    root = composed()["root"]
    (model,) = [volume for volume in root["volumes"] if isinstance(volume, dict)]
    assert model == {"type": "bind", "source": "/srv/models", "target": "/models", "read_only": True}
    assert root["command"] == ["serve", "--model", "/models/some-model.m"]


@pytest.mark.parametrize("missing", GIVEN)
def test_what_must_be_given_is_asked_for(missing: str) -> None:
    with pytest.raises(LookupError, match=f"^set {missing} to "):
        composed(**{missing: ""})


def test_every_variable_is_explained() -> None:
    text = COMPOSE.read_text()
    explained = set(re.findall(r"^#   (DAIRLLM_\w+) ", text, re.MULTILINE))
    assert explained - {"DAIRLLM_MODELS=/srv/models"} == set(re.findall(r"\$\{(\w+):", text))


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_docker_compose_takes_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DAIRLLM_")}

    def config(**variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["docker-compose", "--file", str(COMPOSE), "config"],  # noqa: S607 - wherever it is installed
            capture_output=True,
            text=True,
            env=environment | variables,
            cwd=tmp_path,
            check=False,
        )

    told = config(**GIVEN)
    assert told.returncode == 0, told.stderr
    assert set(yaml.safe_load(told.stdout)["services"]) == set(SERVICES)
    refused = config()
    assert refused.returncode != 0
    assert "set DAIRLLM_MODEL" in refused.stderr


def test_what_goes_into_the_image_exists_and_is_not_left_out() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and "--from" not in rest]
    for source in (Path(word) for words in copied for word in words):
        assert (ROOT / source).exists(), source
        assert source.parts[0] in let_in
    assert {Path(word).parts[0] for words in copied for word in words} == let_in
    assert all((ROOT / name).exists() for name in let_in)


def test_the_image_runs_without_a_shell_and_without_root() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["dairllm"]
    assert json.loads(instruction("CMD")) == ["--help"]
    assert instruction("USER") == "10001:10001"
    assert instruction("STOPSIGNAL") == "SIGTERM"
    (made,) = [rest for name, rest in instructions() if name == "RUN" and "useradd" in rest]
    assert {"10001", "/usr/sbin/nologin"} <= set(shlex.split(made))
    assert not any(word in (ROOT / "Dockerfile").read_text() for word in ("apt-get", "curl ", "ADD "))


def test_the_image_has_kernels_where_a_start_looks_for_them() -> None:
    (made,) = [line for name, rest in instructions() if name == "RUN" for line in rest.split(" && ") if "kernels" in line]
    program, *words = shlex.split(made)
    installed = Path(program).parent.parent
    assert words == ["kernels", "--compile", "--form", "all", "--to", str(installed / shipped_folder().relative_to(sys.prefix))]
    assert f"--from=build {installed} {installed}" in [rest for name, rest in instructions() if name == "COPY"]


def test_kernels_compiled_at_a_start_have_a_place_of_their_own() -> None:
    environment = dict(word.split("=", 1) for word in instruction("ENV").split())
    cache = f"{environment['XDG_CACHE_HOME']}/dairllm"
    assert any("install" in rest and rest.endswith(cache) for name, rest in instructions() if name == "RUN")
    for service in composed().values():
        assert f"kernels:{cache}" in service["volumes"]


def test_the_ports_are_those_of_the_defaults() -> None:
    worker, root = WorkerSettings(), RootSettings()
    assert instruction("EXPOSE").split() == [str(port) for port in (worker.worker.port, worker.metrics_port, root.server.port)]


def test_the_examples_of_a_cluster_are_settings() -> None:
    folder = ROOT / "configs" / "cluster"
    worker = load_settings(WorkerSettings, folder / "worker.yaml", environment={})
    root = load_settings(RootSettings, folder / "root.yaml", environment={})
    assert WorkerAddress(worker.worker.host, worker.worker.port) in root.cluster.workers
    assert worker.limits.nodes == len(root.cluster.workers) + 1


def test_the_examples_shares_divide_the_model_that_they_name() -> None:
    root = load_settings(RootSettings, ROOT / "configs" / "cluster" / "root.yaml", environment={})
    assert root.cluster.shares is not None
    assert root.model.max_seq_len is not None
    spec = ModelSpec(
        arch=Architecture.LLAMA, dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
        vocab_size=128256, seq_len=root.model.max_seq_len, weight_type=FloatType.Q40,
    )  # fmt: skip
    shares = deal_shares(spec, parse_shares(root.cluster.shares))
    assert [share.n_kv_heads for share in shares] == [3, 3, 2]
    assert 2 * spec.n_layers * spec.kv_dim * spec.seq_len * 4 == 4 * 2**30
