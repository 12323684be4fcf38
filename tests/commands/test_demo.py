"""`dairllm demo` with a small random model in place of the real one: the conversation, the tables at its end, and that nothing is left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dairllm.commands import demo
from dairllm.formats.tokenizer_file import TokenizerFile
from tests.patience import PATIENCE

DATA = Path(__file__).parent.parent / "data" / "dllama"

ELSEWHERE = """
import sys
from pathlib import Path
from dairllm.commands import demo
demo.demo_model = lambda: Path(sys.argv[1])
demo.run(threads=1, kernels="auto")
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(DATA / "llama_f32.m", tmp_path / "small.m")
    file = TokenizerFile.read(DATA / "tiny.t")
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}<|turn|>"
    TokenizerFile(file.pieces, file.scores, file.bos_id, (), False, template, file.max_token_length).write(tmp_path / "small.t")
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path / "small.m")
    return tmp_path / "small.m"


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        if parent == process:
            found.append(int(stat.parent.name))
    return found


def is_alive(process: int) -> bool:
    """Whether it is more than an entry that its parent has yet to collect."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.usefixtures("model")
def test_a_question_an_answer_and_figures(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAIRLLM_CONFIG", "nowhere.yaml")  # settings of ours are none of its workers'
    monkeypatch.setenv("DAIRLLM_WORKER__PORT", "x")
    demo.run(threads=1, kernels="auto")
    out = capfd.readouterr().out
    assert "> What is the capital of Japan?\n" in out
    nodes, others = out[out.rindex("┏") :].split("┌")
    assert [line.split("│")[1].strip() for line in nodes.splitlines() if line.startswith("│")] == ["root", "worker 1", "worker 2"]
    for line in nodes.splitlines():
        if line.startswith("│"):
            memory, *sent = (float(cell.strip().removesuffix("MiB")) for cell in line.split("│")[5:9])
            assert memory > 50
            assert min(sent) > 0
    assert max(map(len, (nodes + others).splitlines())) <= 80
    for row in ("start", "prompt, ", "generation, ", "kernels"):
        assert f"│ {row}" in others
    assert "tokens/s" in others
    assert ", 1 thread a node" in others
    assert children(os.getpid()) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_its_workers_end_with_it(model: Path, signum: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", ELSEWHERE, str(model)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        deadline = time.monotonic() + PATIENCE
        while len(workers := children(process.pid)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signum)
        code = process.wait(PATIENCE)
        assert code == (-signum if signum is signal.SIGKILL else 128 + signum)
        while any(is_alive(worker) for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
