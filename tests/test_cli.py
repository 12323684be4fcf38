"""The command line as its users meet it: real processes, their output, their exit codes, their messages."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import dairllm
from tests.patience import PATIENCE

DATA = Path(__file__).parent / "data" / "dllama"
TINY = DATA / "tiny.t"
GZIPPED = DATA / "llama31_q40.wire.gz"
COMMANDS = (
    "demo", "worker", "health", "generate", "serve", "tokenize", "convert", "inspect", "plan", "prepare", "verify", "kernels", "bench",
)  # fmt: skip


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "dairllm", *map(str, words)]


def call(*words: object, stdin: bytes | None = None, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = subprocess.run(command(*words), input=stdin or b"", capture_output=True, env=os.environ | environment, timeout=PATIENCE)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def one_line(text: str) -> str:
    """The line that an error is to be."""
    assert text.startswith("dairllm: error: "), text
    assert text.endswith("\n"), text
    assert text.count("\n") == 1, text
    return text.removeprefix("dairllm: error: ").rstrip("\n")


def test_help_names_every_command() -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.startswith("  ")] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    code, out, err = call(name, "--help")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: ")


def test_help_is_quick() -> None:
    """Processor time, so that a busy machine does not matter; the quickest of three."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy() -> None:
    script = "import sys, dairllm.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"numpy", "numba", "uvloop", "asyncio", "pydantic", "structlog", "rich", "tokenizers"} & set(done.stdout.split())


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag: str) -> None:
    assert call(flag) == (0, f"dairllm {dairllm.__version__}\n", "")


def test_short_flags() -> None:
    assert call("-h") == call("--help")
    assert call("generate", "-h") == call("generate", "--help")
    code, _, err = call("generate", "-m", "nonesuch/a.m", "-p", "a")
    assert code == 1
    assert "nonesuch/a.m: " in one_line(err)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell: str) -> None:
    code, out, err = call("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (code, err) == (0, "")
    assert "DAIRLLM_COMPLETE" in out


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("tokenize", TINY, "on")])
def test_a_closed_stdout_is_one_line(words: tuple[object, ...]) -> None:
    """Whatever is opened next must not take stdout's place."""
    done = subprocess.run(command(*words), capture_output=True, preexec_fn=lambda: os.close(1), timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (1, b"")
    assert one_line(done.stderr.decode()) == "stdout is closed: there is nowhere to write to"


def test_closed_standard_streams_do_not_matter_where_they_are_not_used() -> None:
    def close() -> None:
        os.close(0)
        os.close(2)

    done = subprocess.run(command("tokenize", TINY, "on"), stdout=subprocess.PIPE, preexec_fn=close, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"262  'on'\n")


def test_a_stdout_of_another_encoding() -> None:
    code, out, err = call("tokenize", TINY, "日", "--json", PYTHONIOENCODING="latin-1")
    assert (code, err) == (0, "")
    assert json.loads(out)["ids"] == [0xE6, 0x97, 0xA5]


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("DAIRLLM_ENGINE_THREADS", "unknown; did you mean DAIRLLM_ENGINE__THREADS?"),
        ("DAIRLLM_MODLE", "unknown; did you mean DAIRLLM_MODEL?"),
        ("DAIRLLM_XYZ", "unknown; settings are DAIRLLM_<SECTION>__<KEY>, with two underscores between them"),
    ],
)
def test_an_unknown_variable_is_named(variable: str, message: str) -> None:
    code, _, err = call("generate", "--model", "a.m", "--prompt", "a", **{variable: "3"})
    assert code == 2
    assert one_line(err) == f"environment variable {variable}: {message}"


def test_the_installed_script_is_the_module() -> None:
    script = Path(sys.executable).with_name("dairllm")
    if script.exists():  # it is where the package was installed rather than put on the path
        done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"dairllm {dairllm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Usage: "),
        (("nonesuch",), "No such command 'nonesuch'"),
        (("generate", "--nonesuch"), "No such option: --nonesuch"),
        (("generate", "--steps", "many"), "Invalid value for '--steps'"),
        (("tokenize",), "Missing argument"),
        (("inspect", "a.m", "--layer", "-1"), "Invalid value for '--layer'"),
    ],
)
def test_wrong_usage_is_2(words: tuple[str, ...], message: str) -> None:
    code, out, err = call(*words)
    assert code == 2
    assert message in (err or out)
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate",), 2, "no model: name its file with --model"),
        (("generate", "--model", "a.m"), 2, "nothing to generate from: give a --prompt, a --prompt-file, or --prompt-ids"),
        (("generate", "--model", "a.m", "--prompt", "a", "--prompt-file", "b"), 2, "--prompt and --prompt-file exclude each other"),
        (("generate", "--model", "a.m", "--prompt-file", "nonesuch"), 2, "the prompt in nonesuch cannot be read: No such file"),
        (("generate", "--model", "a.m", "--prompt-file", GZIPPED), 2, "is not UTF-8: byte 1 is 0x8b"),
        (("generate", "--workers", "a", "b:x"), 2, "cluster.workers: expected a port from 1 to 65535 after b:, found 'x'"),
        (("serve", "--workers", "a", "b,c", "a"), 2, "flag --workers: cluster.workers: a:9990 is named twice"),
        (("generate", "--workers", "http://a:1"), 2, "expected a worker's host:port without a scheme, such as 10.0.0.2:9990"),
        (("chat",), 2, "there is no command chat: dairllm generate --chat --prompt TEXT answers once"),
        (("help",), 2, "there is no command help: dairllm --help lists the commands"),
        (
            ("generate", "--model", "a.m", "--prompt", "a", "--threads", "0"),
            2,
            "flag --threads: engine.threads: expected auto or a whole number",
        ),
        (
            ("generate", "--model", "a.m", "--prompt", "a", "--kernels", "sse"),
            2,
            "flag --kernels: engine.kernels: expected 'auto', 'portable'",
        ),
        (("generate", "--model", "nonesuch/a.m", "--prompt", "a"), 1, "nonesuch/a.m: "),
        (("generate", "--workers", "a:1,b:x"), 2, "flag --workers: cluster.workers: expected a port from 1 to 65535 after b:, found 'x'"),
        (("generate", "--workers", "a", "--workers", "b,a"), 2, "flag --workers: cluster.workers: a:9990 is named twice"),
        (("generate", "--mode", "layers"), 2, "flag --mode: cluster.mode: layers is still to come; tensor is the only mode there is"),
        (("generate", "--model", "a.m", "--prompt", "a", "--workers", "b", "--shares", "1"), 2, 'shares "1": expected query heads/'),
        (("generate", "--model", "a.m", "--prompt", "a", "--shares", "1/1,1/1"), 2, "shares for 2 nodes, but there are 1"),
        (("serve",), 2, "no model: name its file with --model"),
        (("serve", "--port", "70000"), 2, "flag --port: server.port: expected "),
        (("serve", "--queue", "-1"), 2, "flag --queue: server.queue: expected "),
        (("serve", "--model-name", ""), 2, "flag --model-name: model.name: "),
        (("serve", "--mode", "layers"), 2, "flag --mode: cluster.mode: layers is still to come"),
        (("generate", "--config", "nonesuch.yaml"), 2, "nonesuch.yaml: cannot be read: No such file or directory"),
        (("demo", "--threads", "0"), 2, "flag --threads: engine.threads: expected auto or a whole number"),
        (("worker", "--port", "70000"), 2, "flag --port: worker.port: expected "),
        (("worker", "--memory-limit", "2"), 2, "flag --memory-limit: limits.memory: expected a size such as 2GiB"),
        (("health", "--config", "nonesuch.yaml"), 2, "nonesuch.yaml: cannot be read"),
        (("tokenize", "nonesuch.t", "a"), 1, "nonesuch.t: expected a readable .t tokenizer file, found no file of this name"),
        (("tokenize", DATA / "golden.json", "a"), 1, "golden.json: expected a .t tokenizer file, found a JSON file"),
        (("tokenize", DATA, "a"), 1, "expected a .t tokenizer file, found a folder"),
        (("inspect", "nonesuch.m"), 1, "nonesuch.m: "),
        (("convert", "nonesuch.gguf", "a.m"), 1, "nonesuch.gguf: "),
        (("convert", "a.gguf", "a.m", "--weights", "q4"), 2, "--weights is one of auto, q40, q80, f32, not 'q4'"),
    ],
    ids=lambda value: " ".join(map(str, value))[-40:] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(words: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = call(*words)
    assert message in one_line(err)
    assert (found, out) == (code, "")


@pytest.mark.parametrize(
    "words",
    [
        *(("generate", "--prompt", "a", "--model"), ("generate", "--prompt-ids", "1", "--model")),
        *(("serve", "--model"), ("plan",), ("verify",), ("prepare", "--nodes", "2"), ("bench",)),
    ],
    ids=lambda words: " ".join(words),
)
def test_a_gguf_file_is_named_as_one_by_every_command(tmp_path: Path, words: tuple[str, ...]) -> None:
    """The likeliest mistake of all; its missing tokenizer is no part of it."""
    file = tmp_path / "some-model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    code, out, err = call(*words, file)
    assert (code, out) == (1, "")
    expected = f"{file}: expected a .m model file, found a GGUF file: dairllm convert {file} {file.with_suffix('.m')}"
    assert expected in one_line(err)


def test_an_error_in_a_file_of_settings_names_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("engine:\n  threads: 2\nsampling:\n  temprature: 1\n")
    code, _, err = call("generate", "--config", file, "--model", "a.m", "--prompt", "a")
    assert code == 2
    assert one_line(err) == f"{file}, line 4: sampling.temprature: unknown key; did you mean temperature?"


def test_tokenize() -> None:
    assert call("tokenize", TINY, "the on", "--json") == (0, '{"ids": [256, 101, 32, 262], "pieces": ["th", "e", " ", "on"]}\n', "")
    assert call("tokenize", TINY, "the<|end|>") == (0, "256  'th'\n101  'e'\n318  '<|end|>'\n", "")
    assert call("tokenize", TINY, "", "--json") == (0, '{"ids": [], "pieces": []}\n', "")
    assert call("tokenize", TINY, "--json", "--", "-on") == (0, '{"ids": [45, 262], "pieces": ["-", "on"]}\n', "")


@pytest.mark.parametrize("words", [("-",), ()])
def test_tokenize_reads_stdin_as_it_is(words: tuple[str, ...]) -> None:
    code, out, _ = call("tokenize", TINY, *words, "--json", stdin=b"\r\non\xff\n")
    assert code == 0
    assert json.loads(out) == {"ids": [13, 10, 262, 255, 10], "pieces": ["\r", "\n", "on", "�", "\n"]}


def test_tokenize_takes_bytes_that_are_no_text() -> None:
    done = subprocess.run([*map(os.fsencode, command("tokenize", TINY, "--json")), b"a\xffb"], capture_output=True, check=True)
    assert json.loads(done.stdout)["ids"] == [97, 255, 98]


def test_another_tokenizer_json_is_a_warning_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "tiny.t").write_bytes(TINY.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    code, out, err = call("tokenize", tmp_path / "tiny.t", "on", "--json")
    assert (code, json.loads(out)["ids"]) == (0, [262])
    warning = json.loads(err)
    assert (warning["level"], warning["event"]) == ("warning", "tokenizer.json is not used")


def test_a_reader_that_has_gone_is_no_error() -> None:
    with subprocess.Popen(command("tokenize", TINY, "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"a" * 500_000)
        process.stdin.close()
        assert process.stdout.readline() == b" 97  'a'\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGPIPE


def test_help_to_a_reader_that_has_gone_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command("--help"), stdout=write, stderr=subprocess.PIPE, timeout=PATIENCE)
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_work_that_is_cut_short(number: signal.Signals, code: int) -> None:
    """While it waits for its input."""
    with subprocess.Popen(command("tokenize", TINY, "-"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        _wait_until_it_reads(process.pid)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == code
        assert process.stderr.read() == b""


def _wait_until_it_reads(pid: int) -> None:
    """The process has nothing left to do but to wait for its standard input."""
    for _ in range(600):
        waits_for = Path(f"/proc/{pid}/wchan").read_text()
        if "pipe" in waits_for:
            return
        time.sleep(0.05)
    pytest.fail(f"still not reading: {waits_for}")
