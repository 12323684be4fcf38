"""`dairllm generate --workers` with real workers: the same answer, who did what, and what is said when something is in the way."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dairllm.formats.model_file import ModelFile
from dairllm.formats.tokenizer_file import TokenizerFile
from tests.commands.node_process import WorkerProcess
from tests.patience import PATIENCE

DATA = Path(__file__).parent.parent / "data" / "dllama"
MODEL = DATA / "llama_f32.m"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))["models"]["llama_f32"]
PROMPT_IDS = ",".join(map(str, GOLDEN["prompt_ids"]))
IDS = GOLDEN["generated_ids_1_node"]
Workers = list[WorkerProcess]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """Two, for all tests: whatever a root does, the next one is served."""
    folder = tmp_path_factory.mktemp("workers")
    made = [WorkerProcess(folder / f"{number}.log") for number in range(2)]
    try:
        yield made
        for worker in made:
            assert worker.stop()[0] == 0
    finally:
        for worker in made:
            worker.process.kill()
            worker.process.wait(PATIENCE)


def address(worker: WorkerProcess) -> str:
    return f"127.0.0.1:{worker.port}"


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "dairllm", "generate", *map(str, ("--model", MODEL, "--threads", 1, *words))]


def generate(*words: object, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr without the lines about what takes long."""
    done = subprocess.run(command(*words), capture_output=True, timeout=PATIENCE, env=os.environ | environment)
    lines = [line for line in done.stderr.decode().splitlines() if not line.endswith(" ...")]
    return done.returncode, done.stdout.decode(), "\n".join(lines)


def report(*words: object, **environment: str) -> dict[str, Any]:
    code, out, err = generate("--json", "--prompt-ids", PROMPT_IDS, "--steps", len(IDS), *words, **environment)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def one_line(err: str) -> str:
    assert err.startswith("dairllm: error: "), err
    assert "\n" not in err, err
    return err.removeprefix("dairllm: error: ")


def test_two_nodes_give_one_nodes_ids_and_tell_what_crossed_the_wire(workers: Workers) -> None:
    found = report("--workers", address(workers[0]))
    assert found["ids"] == IDS
    own, other = found["nodes"]
    assert (own["node"], own["address"], own["kind"], own["threads"]) == (0, "", "dairllm", 1)
    assert (other["node"], other["address"], other["kind"]) == (1, address(workers[0]), "dairllm")
    assert [(node["heads"], node["kv_heads"], node["ffn"]) for node in found["nodes"]] == [(2, 1, 64), (2, 1, 64)]
    for name in ("bytes_sent", "bytes_received", "weight_bytes_sent"):
        assert found[name] == own[name] == other[name] > 0
    with ModelFile.open(MODEL) as model:
        sums_of_a_row = 2 * model.spec.n_layers * model.spec.dim * 4  # two a layer, in F32
    assert found["bytes_sent"] >= (len(GOLDEN["prompt_ids"]) + len(IDS) - 1) * sums_of_a_row


def test_workers_from_a_file_or_the_environment_and_in_several_flags(workers: Workers, tmp_path: Path) -> None:
    first, second = map(address, workers)
    (tmp_path / "root.yaml").write_text(f"cluster:\n  workers: [{first}, {second}]\n  shares: 2/64,1/32,1/32\n")
    expected = [("", 2, 64), (first, 1, 32), (second, 1, 32)]

    def nodes(found: dict[str, Any]) -> list[tuple[str, int, int]]:
        assert found["ids"] == IDS
        return [(node["address"], node["heads"], node["ffn"]) for node in found["nodes"]]

    assert nodes(report("--config", tmp_path / "root.yaml")) == expected
    assert nodes(report(DAIRLLM_CLUSTER__WORKERS=f"{first},{second}", DAIRLLM_CLUSTER__SHARES="2/64,1/32,1/32")) == expected
    assert nodes(report("--workers", first, "--workers", second, "--shares", "2/64,1/32,1/32")) == expected


def test_what_can_be_checked_is_checked_before_anybody_is_dialled(workers: Workers, tmp_path: Path) -> None:
    workers[0].wait_for("listening")
    before = workers[0].text()
    (tmp_path / "empty.t").write_bytes(b"")
    mistakes: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "layers is still to come", ("--prompt-ids", "1", "--mode", "layers")),
        (2, "shares for 3 nodes, but there are 2", ("--prompt-ids", "1", "--shares", "2/64,1/32,1/32")),
        (2, "the nearest that can be dealt: 2/64,2/64", ("--prompt-ids", "1", "--shares", "3/64,3/64")),
        (2, "token 0 of the prompt is 999", ("--prompt-ids", "999")),
        (2, "the context has room for 2", ("--prompt", "the on", "--tokenizer", DATA / "tiny.t", "--max-seq-len", 2)),
        (1, "empty.t", ("--prompt", "a", "--tokenizer", tmp_path / "empty.t")),
        (2, "--logits /nonesuch/l.npy", ("--prompt-ids", "1", "--logits", "/nonesuch/l.npy")),
    ]
    for code, message, words in mistakes:
        found, out, err = generate("--workers", address(workers[0]), *words, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert message in one_line(err)
        assert (found, out) == (code, "")
    assert workers[0].text() == before
    assert not (tmp_path / "cache").exists(), "and before kernels are looked for"


def test_a_worker_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    code, out, err = generate("--prompt-ids", "1", "--workers", nobody)
    assert nobody in one_line(err)
    assert (code, out) == (1, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_root_that_is_cut_short_says_goodbye(workers: Workers, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """In the middle of an answer that nobody reads: the worker's session has an end like any other."""
    finished = workers[0].text().count('"session finished"')
    TokenizerFile([b"%04d " % token * 200 for token in range(320)], [0.0] * 320, None, (), False, None, 1000).write(tmp_path / "wordy.t")
    words = command("--prompt-ids", "1,2", "--steps", 200, "--tokenizer", tmp_path / "wordy.t", "--workers", address(workers[0]))
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == code
        assert [line for line in process.stderr.read().splitlines() if not line.endswith(b" ...")] == []
    assert report("--workers", address(workers[0]))["ids"] == IDS
    ended = [line for line in workers[0].lines() if line["event"].startswith("session")]
    assert len(ended) >= 2
    assert [line["event"] for line in ended[-2:]] == ["session finished", "session finished"]
    assert workers[0].text().count('"session finished"') == finished + 2


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    mortal = WorkerProcess(tmp_path / "mortal.log")
    try:
        TokenizerFile([b"%04d " % token * 200 for token in range(320)], [0.0] * 320, None, (), False, None, 1000).write(tmp_path / "w.t")
        words = command("--prompt-ids", "1,2", "--steps", 200, "--tokenizer", tmp_path / "w.t", "--workers", address(mortal))
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert os.read(process.stdout.fileno(), 1)
            mortal.process.kill()
            process.stdout.read()
            assert process.wait(timeout=PATIENCE) == 1
            err = process.stderr.read().decode()
        assert address(mortal) in one_line("\n".join(line for line in err.splitlines() if not line.endswith(" ...")))
    finally:
        mortal.process.kill()
        mortal.process.wait(PATIENCE)
