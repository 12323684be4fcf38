"""Every source of settings is checked, and every mistake is named with the place where it was made."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dairllm.config import SHORT_NAMES, MemoryAmount, RootSettings, WorkerAddress, WorkerSettings, load_settings
from dairllm.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
DOCUMENTED = pytest.mark.parametrize(
    ("schema", "example"), [(WorkerSettings, CONFIGS / "worker.yaml"), (RootSettings, CONFIGS / "root.yaml")], ids=["worker", "root"]
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "w.yaml"


def load(
    file: Path | None = None, text: str | None = None, environment: dict[str, str] | None = None, **flags: tuple[str, object]
) -> WorkerSettings:
    if text is not None and file is not None:
        file.write_text(text)
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(WorkerSettings, file, environment=environment or {}, flags=keys)


def leaves(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name: value}
    return found


def root(environment: dict[str, str] | None = None, **flags: tuple[str, object]) -> RootSettings:
    keys = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(RootSettings, environment=environment or {}, flags=keys)


@DOCUMENTED
def test_the_documented_file_has_every_key_with_its_default(schema: type[BaseModel], example: Path) -> None:
    written = yaml.safe_load(example.read_text())
    assert {f"{section}.{key}" for section, keys in written.items() for key in keys} == set(leaves(schema()))
    assert load_settings(schema, example, environment={}) == schema()


@DOCUMENTED
def test_every_key_of_the_documented_file_has_a_comment(schema: type[BaseModel], example: Path) -> None:
    lines = [line for line in example.read_text().splitlines() if re.match(r" +\w+:", line)]
    assert len(lines) == len(leaves(schema()))
    for line in lines:
        assert "# " in line, line


def test_precedence_is_flag_environment_file_default(file: Path) -> None:
    text = "worker: {port: 1}\n"
    assert load().worker.port == 9990
    assert load(file, text).worker.port == 1
    assert load(file, text, {"DAIRLLM_WORKER__PORT": "2"}).worker.port == 2
    assert load(file, text, {"DAIRLLM_WORKER__PORT": "2"}, worker__port=("--port", 3)).worker.port == 3
    assert load(file, text, {"DAIRLLM_WORKER__PORT": ""}, worker__port=("--port", None)).worker.port == 1


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().worker.port = 5


def test_sections_may_be_empty_and_files_too(file: Path) -> None:
    assert load(file, "") == load(file, "# nothing\n") == load(file, "worker:\nlog: ~\n") == WorkerSettings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("worker:\n  host: a\n  prot: 5\n", r"w\.yaml, line 3: worker\.prot: unknown key; did you mean port\?"),
        ("wroker:\n  port: 5\n", r"w\.yaml, line 1: wroker: unknown key; did you mean worker\?"),
        ("threads: 5\n", r"line 1: threads: unknown key; did you mean worker\.threads\?"),
        ("zzz: 5\n", r"line 1: zzz: unknown key; there are worker, limits, paging, deadlines, keepalive, metrics, log"),
        (
            "log:\n  level: info\nmodel:\n  file: x\n",
            r"line 3: model: unknown key; this seems to be a file for a root \(`dairllm generate`",
        ),
        ("worker:\n  port: abc\n", r"line 2: worker\.port: expected a valid integer, found 'abc'"),
        ("worker:\n  port: '80'\n", r"line 2: worker\.port: expected a valid integer, found '80'"),
        ("worker:\n  port: true\n", r"line 2: worker\.port: expected a valid integer, found True"),
        ("worker:\n  port:\n", r"line 2: worker\.port: expected a valid integer, found None"),
        ("worker:\n  port: [1]\n", r"line 2: worker\.port: expected a valid integer, found \[1\]"),
        ("worker:\n  port: 65536\n", r"line 2: worker\.port: expected less than or equal to 65535, found 65536"),
        ("worker:\n  host: ''\n", r"line 2: worker\.host: .*at least 1 character"),
        ("worker:\n\n  threads: 0\n", r"line 3: worker\.threads: expected auto or a whole number from 1 to 1024, found 0"),
        ("worker: {kernels: sse9}\n", r"line 1: worker\.kernels: expected 'auto', 'portable', .*, found 'sse9'"),
        ("limits:\n  memory: 7\n", r"line 2: limits\.memory: expected a size such as 2GiB, or a share from 0% to 100%, found 7"),
        ("limits:\n  memory: 101%\n", r"line 2: limits\.memory: expected a size .*found '101%'"),
        ("limits:\n  memory: 0B\n", r"line 2: limits\.memory: expected more than nothing"),
        ("deadlines:\n  mesh: 5\n", r"line 2: deadlines\.mesh: expected a time such as 5s .*found 5"),
        ("deadlines:\n  mesh: 1ms\n", r"line 2: deadlines\.mesh: expected a time from 10ms to 24h, found 1ms"),
        ("worker: 5\n", r"line 1: worker: expected keys \(host, port, model, threads, kernels, kv_cache, overlap\), found '5'"),
        ("- worker\n", r"line 1: the file: expected keys \(worker, .*\), found a list"),
        ("worker:\n  port: 1\n  host: a\n  port: 2\n", r"line 4: worker\.port: given twice, first in line 2"),
        ("worker:\n  ? [a]\n  : 1\n", r"line 2: worker\.a list: unknown key"),
        ("worker:\n\tport: 1\n", r"line 2: not YAML: found character '\\t'"),
        ("worker: {port: 1\n", r"line \d: not YAML: "),
        ("a: 1\n---\nb: 2\n", r"line 2: not YAML: but found another document"),
        ("worker:\n  port: !!python/object:os.system 5\n", r"line 2: worker\.port: could not determine a constructor"),
        ("worker:\n  port: !!timestamp x\n", r"line 2: worker\.port: 'x' cannot be read: "),
        ("worker:\n  port: !!bool x\n", r"line 2: worker\.port: 'x' cannot be read: "),
        ("worker:\n  port: !!int ''\n", r"line 2: worker\.port: '' cannot be read: "),
        ("worker:\n  port: 2026-99-99\n", r"line 2: worker\.port: '2026-99-99' cannot be read: "),
        ("worker:\n  port: .inf\n", r"line 2: worker\.port: expected a valid integer, found inf|finite number"),
        ("worker:\n  port: " + "9" * 5000 + "\n", r"line 2: worker\.port: '9{199}\.\.\. cannot be read: "),
        ('worker:\n  "\\e[2J\\a": 1\n', r"line 2: worker\.\\x1b\[2J\\x07: unknown key"),
        ("worker:\n  port: \x02\n", r"w\.yaml: not YAML: unacceptable character #x0002"),
        ("[" * 100_000, r"line 1: expected at most 10000 values, nested at most 100 deep, found more"),
        ("worker:\n  host: " + "{a: " * 5000, r"line 2: expected at most 10000 values, nested at most 100 deep, found more"),
        ("- 1\n" * 10_001, r"line \d+: expected at most 10000 values"),
        ("worker: {host: &a [*a]}\n", r"line 1: a value that contains itself"),
        ("worker:\n  host: " + "x" * (1 << 20), r"w\.yaml: expected settings of at most 1 MiB, found more"),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_a_mistake_in_the_file_names_file_line_and_key(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(file, text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("first", "link"), [("[x, x]", "[*a{0}, *a{0}]"), ("{x: x}", "{{x: *a{0}, y: *a{0}}}"), ("{x: x}", "{{<<: [*a{0}, *a{0}]}}")]
)
def test_few_lines_that_stand_for_a_great_deal(file: Path, first: str, link: str) -> None:
    """Thirty lines: 2^29 values, which a message with the value in it would write out."""
    lines = [f"a0: &a0 {first}", *(f"a{n}: &a{n} {link.format(n - 1)}" for n in range(1, 30)), "worker: {port: *a29}"]
    with pytest.raises(ConfigError, match=r"line \d+: expected at most 10000 values"):
        load(file, "\n".join(lines))
    file.write_text("worker: {host: &h localhost}\nmetrics: {host: *h}\n")
    assert load(file).metrics.host == "localhost", "an alias by itself is no harm"


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match=r"environment variable DAIRLLM_LOG__LEVEL: log\.level: expected 'debug'.*found 'loud'"):
        load(environment={"DAIRLLM_LOG__LEVEL": "loud"})
    with pytest.raises(ConfigError, match=r"DAIRLLM_WORKER__PRT: worker\.prt: unknown key; did you mean port\?"):
        load(environment={"DAIRLLM_WORKER__PRT": "5"})
    with pytest.raises(ConfigError, match=r"DAIRLLM_LOG__LEVEL__X: log\.level\.x: unknown key"):
        load(environment={"DAIRLLM_LOG__LEVEL__X": "5"})


def test_a_mistake_in_a_flag_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"flag --memory-limit: limits\.memory: expected a size"):
        load(limits__memory=("--memory-limit", "much"))


def test_variables_of_other_kinds_are_left_alone() -> None:
    assert (
        load(
            environment={
                "DAIRLLM_TEST_DLLAMA": "x",
                "DAIRLLM_MODELS": "m",
                "DAIRLLM_EMPTY": "",
                "PATH": "y",
                "OTHER__WORKER": "z",
                "dairllm_worker__port": "5",
            }
        )
        == WorkerSettings()
    )


@pytest.mark.parametrize(("variable", "text", "key", "value"), [
    ("WORKER__HOST", "::", "worker.host", "::"),
    ("WORKER__THREADS", "3", "worker.threads", 3),
    ("METRICS__ENABLED", "false", "metrics.enabled", False),
    ("METRICS__PORT", "auto", "metrics.port", "auto"),
    ("LIMITS__MEMORY", "1GiB", "limits.memory", MemoryAmount("1GiB", nbytes=2**30)),
    ("LIMITS__MEMORY", "50%", "limits.memory", MemoryAmount("50%", share=0.5)),
    ("DEADLINES__WEIGHTS", "5m", "deadlines.weights", 300.0),
])  # fmt: skip
def test_the_environment_speaks_like_the_file(variable: str, text: str, key: str, value: object) -> None:
    assert leaves(load(environment={f"DAIRLLM_{variable}": text}))[key] == value


def test_short_names_of_variables() -> None:
    given = {"DAIRLLM_MODEL": "a.m", "DAIRLLM_THREADS": "3", "DAIRLLM_MEMORY_LIMIT": "1GiB", "DAIRLLM_WORKERS": "a,b"}
    worker, server = load(environment=given), root(given)
    assert (worker.worker.model, worker.worker.threads, worker.limits.memory.nbytes) == ("a.m", 3, 2**30)
    assert (server.model.file, server.engine.threads, server.limits.memory.nbytes) == ("a.m", 3, 2**30)
    assert server.cluster.workers == (WorkerAddress("a"), WorkerAddress("b"))


def test_the_long_name_of_a_variable_comes_before_its_short_one() -> None:
    names = {"DAIRLLM_THREADS": "3", "DAIRLLM_ENGINE__THREADS": "2"}
    for order in (names, dict(reversed(names.items()))):
        assert root(order).engine.threads == 2


def test_short_names_are_settings() -> None:
    for schema, names in SHORT_NAMES.items():
        assert set(names.values()) <= set(leaves(schema()))


@pytest.mark.parametrize("missing", ["nowhere.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match=r": cannot be read: "):
        load(tmp_path / missing)


def test_a_file_that_is_not_text(file: Path) -> None:
    file.write_bytes("log:\n".encode("utf-16"))  # as PowerShell's > writes it
    with pytest.raises(ConfigError, match=r"w\.yaml: expected text in UTF-8, found UTF-16$"):
        load(file)
    file.write_bytes(b"log:\xff")
    with pytest.raises(ConfigError, match=r"w\.yaml: expected text in UTF-8, found 0xff in byte 4$"):
        load(file)


def test_memory_is_an_amount_or_a_share_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.machine.memory_bytes", lambda: 1000)
    assert MemoryAmount.parse("12.5%").resolve() == 125
    assert MemoryAmount.parse("2KiB").resolve() == 2048
    assert str(MemoryAmount.parse("12.5%")) == "12.5%"


def test_threads_are_those_of_the_machine_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dairllm.machine.processors", lambda: 7)
    assert load().worker.n_threads == 7
    assert load(worker__threads=("--threads", 3)).worker.n_threads == 3


@pytest.mark.parametrize(("port", "metrics", "expected"), [(9990, "auto", 10990), (65000, "auto", 64000), (0, "auto", 0), (9990, 7, 7)])
def test_the_port_of_metrics_follows_the_workers(port: int, metrics: int | str, expected: int) -> None:
    assert load(worker__port=("--port", port), metrics__port=("--metrics-port", metrics)).metrics_port == expected


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("10.0.0.2:9998", "10.0.0.2", 9998, "10.0.0.2:9998"),
        ("Kitchen.local", "kitchen.local", 9990, "kitchen.local:9990"),
        (" a:1 ", "a", 1, "a:1"),
        ("[::1]:9998", "::1", 9998, "[::1]:9998"),
        ("[FD00:0::2]", "fd00::2", 9990, "[fd00::2]:9990"),
        ("[fe80::1%eth0]:1", "fe80::1%eth0", 1, "[fe80::1%eth0]:1"),
    ],
)
def test_the_address_of_a_worker(text: str, host: str, port: int, written: str) -> None:
    address = WorkerAddress.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, written)
    assert WorkerAddress.parse(written) == address


@pytest.mark.parametrize("text", ["a:1,b", ["a:1", "b"], ["a:1,b"], "a:1, b", [WorkerAddress("a", 1), WorkerAddress("b")]])
def test_workers_are_a_list_or_one_text(text: object) -> None:
    expected = (WorkerAddress("a", 1), WorkerAddress("b", 9990))
    assert root(cluster__workers=("--workers", text)).cluster.workers == expected
    if isinstance(text, str):
        assert root({"DAIRLLM_CLUSTER__WORKERS": text}).cluster.workers == expected


@pytest.mark.parametrize("text", ["[a:1, b]", "a:1,b", '"a:1, b"', "\n    - a:1\n    - b"])
def test_workers_in_a_file(file: Path, text: str) -> None:
    file.write_text(f"cluster:\n  workers: {text}\n")
    assert load_settings(RootSettings, file, environment={}).cluster.workers == (WorkerAddress("a", 1), WorkerAddress("b", 9990))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("cluster.workers", "", "expected a worker's host:port, such as 10.0.0.2:9990, found ''"),
        ("cluster.workers", "a,,b", "expected a worker's host:port, such as 10.0.0.2:9990, found ''"),
        ("cluster.workers", "a b", "expected a worker's host:port, such as 10.0.0.2:9990, found 'a b'"),
        ("cluster.workers", ":9990", "expected a worker's host:port, such as 10.0.0.2:9990, found ':9990'"),
        ("cluster.workers", "a:", "expected a port from 1 to 65535 after a:, found ''"),
        ("cluster.workers", "a:0", "expected a port from 1 to 65535 after a:, found '0'"),
        ("cluster.workers", "a:65536", "expected a port from 1 to 65535 after a:, found '65536'"),
        ("cluster.workers", "a:9٣", "expected a port from 1 to 65535 after a:, found '9٣'"),
        ("cluster.workers", "::1", "expected an IPv6 address in brackets, such as [::1]:9990, found '::1'"),
        ("cluster.workers", "fd00::2:9990", "expected an IPv6 address in brackets, such as [::1]:9990, found 'fd00::2:9990'"),
        ("cluster.workers", "[a]:1", "expected an IPv6 address in brackets, found '[a]:1'"),
        ("cluster.workers", "a,b,A:9990", "a:9990 is named twice; a worker is one node"),
        ("cluster.workers", ["[::1]", "[0::1]:9990"], "[::1]:9990 is named twice; a worker is one node"),
        ("cluster.workers", 9990, "expected a list of host:port, or one text with commas between them, found 9990"),
        ("cluster.workers", ["a", 1], "expected a list of host:port, or one text with commas between them, found ['a', 1]"),
        ("cluster.mode", "layers", "layers is still to come; tensor is the only mode there is"),
        ("cluster.mode", "tensr", "expected 'tensor', found 'tensr'"),
        ("cluster.shares", 5, "expected a valid string, found 5"),
        ("model.max_seq_len", 0, "expected greater than or equal to 1, found 0"),
        ("model.name", "", "String should have at least 1 character"),
        ("engine.threads", 0, "expected auto or a whole number from 1 to 1024, found 0"),
        ("engine.threads", "many", "expected auto or a whole number from 1 to 1024, found 'many'"),
        ("engine.kernels", "sse", "expected 'auto', 'portable', 'avx2', 'avxvnni' or 'avx512vnni', found 'sse'"),
        ("engine.sync", "f16", "expected 'auto', 'q80' or 'f32', found 'f16'"),
        ("sampling.steps", 0, "expected greater than or equal to 1, found 0"),
        ("sampling.temperature", -0.1, "expected greater than or equal to 0, found -0.1"),
        ("sampling.temperature", float("nan"), "expected a finite number, found nan"),
        ("sampling.top_p", 0.0, "expected greater than 0, found 0.0"),
        ("sampling.top_p", 1.1, "expected less than or equal to 1, found 1.1"),
        ("sampling.seed", -1, "expected greater than or equal to 0, found -1"),
        ("sampling.seed", 2**64, "expected less than 18446744073709551616, found 18446744073709551616"),
        ("server.port", -1, "expected greater than or equal to 0, found -1"),
        ("server.queue", -1, "expected greater than or equal to 0, found -1"),
        ("server.request_bytes", "1B", "expected a size from 1KiB to 1GiB, found 1B"),
        ("server.request_bytes", 5, "expected a size such as 2GiB or 512MiB"),
        ("server.conversations", 0, "expected auto or a whole number from 1 to 64, found 0"),
        ("deadlines.connect", 5, "expected a time such as 5s"),
        ("server.cors_origins", "chat.example", "expected an origin such as https://chat.example or http://localhost:3000, or *, found"),
        ("server.cors_origins", ["https://a.example/chat"], "expected an origin"),
        ("server.cors_origins", ["null"], "expected an origin"),
        ("server.cors_origins", 5, "expected a list of origins, or one text with commas between them, found 5"),
        ("server.hosts", "ai.example:443", "expected a host's name without a port, such as ai.example, found 'ai.example:443'"),
        ("server.hosts", ["https://ai.example"], "expected a host's name"),
        ("deadlines.reconnect", "25h", "expected a time from 10ms to 24h, found 25h"),
        ("log.level", "loud", "expected 'auto', 'debug', 'info', 'warning' or 'error', found 'loud'"),
    ],
)
def test_each_value_of_a_root_is_checked(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^flag --some: {key}: {re.escape(message)}"):
        load_settings(RootSettings, environment={}, flags={key: ("--some", value)})


def test_a_root_and_a_worker_may_share_an_environment() -> None:
    """As containers that are described together do; each takes what is its own, and a variable that nobody knows is a mistake."""
    shared = {"DAIRLLM_WORKER__PORT": "1", "DAIRLLM_DEADLINES__MESH": "5s", "DAIRLLM_SERVER__PORT": "2", "DAIRLLM_LOG__LEVEL": "error"}
    assert root(shared).server.port == 2
    assert root(shared).log.level == "error"
    assert load(environment=shared).worker.port == 1
    assert load(environment=shared).deadlines.mesh == 5.0
    with pytest.raises(ConfigError, match=r"DAIRLLM_ENGINE__THREAD: engine\.thread: unknown key; did you mean threads\?"):
        root({"DAIRLLM_ENGINE__THREAD": "3"})
    with pytest.raises(ConfigError, match=r"DAIRLLM_ENGINE__THREAD: engine: unknown key"):
        load(environment={"DAIRLLM_ENGINE__THREAD": "3"})


def test_a_variable_of_the_other_program_is_no_file_of_ours(file: Path) -> None:
    file.write_text("worker: {port: 1}\n")
    with pytest.raises(ConfigError, match=r"line 1: worker: unknown key"):
        load_settings(RootSettings, file, environment={})


def test_the_level_of_logs_follows_who_asks() -> None:
    assert root().log.level_of(service=True) == "info"
    assert root().log.level_of(service=False) == "warning"
    debug = root(log__level=("--log-level", "debug")).log
    assert debug.level_of(service=True) == debug.level_of(service=False) == "debug"


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["auto", "5s", "2GiB", "80%"])
_keys = (
    st.sampled_from([*WorkerSettings.model_fields, *RootSettings.model_fields])
    | st.sampled_from(["port", "host", "memory", "mesh", "level", "workers", "shares", "request_bytes"])
    | st.text(max_size=5)
)
_trees = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4), max_leaves=8)


@given(_trees)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@pytest.mark.parametrize("schema", [WorkerSettings, RootSettings])
def test_any_tree_gives_settings_or_one_clear_error(file: Path, schema: type[BaseModel], tree: object) -> None:
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        assert isinstance(load_settings(schema, file, environment={}), schema)
    except ConfigError as error:
        assert str(file) in str(error)  # noqa: PT017 - both outcomes are right


@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
def test_any_bytes_give_settings_or_one_clear_error(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        assert isinstance(load(file), WorkerSettings)
    except ConfigError as error:
        assert str(file) in str(error)  # noqa: PT017 - both outcomes are right


@pytest.mark.parametrize("text", ["https://A.example/, http://[::1]:3000,*", ["https://a.example", "http://[::1]:3000", "*"]])
def test_origins_are_a_list_or_one_text(text: object) -> None:
    assert root(server__cors_origins=("file", text)).server.cors_origins == ("https://a.example", "http://[::1]:3000", "*")
    if isinstance(text, str):
        found = root({"DAIRLLM_SERVER__CORS_ORIGINS": text, "DAIRLLM_SERVER__HOSTS": "AI.example., b"}).server
        assert found.cors_origins == ("https://a.example", "http://[::1]:3000", "*")
        assert found.hosts == ("ai.example", "b")
