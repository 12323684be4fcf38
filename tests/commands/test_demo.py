"""`dairllm demo` with a small random model in place of the real one: the conversation, and the table at its end."""

import shutil
from pathlib import Path

import pytest

from dairllm.commands import demo
from dairllm.formats.tokenizer_file import TokenizerFile

DATA = Path(__file__).parent.parent / "data" / "dllama"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(DATA / "llama_q40.m", tmp_path / "small.m")
    file = TokenizerFile.read(DATA / "tiny.t")
    template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}<|turn|>"
    TokenizerFile(file.pieces, file.scores, file.bos_id, (), False, template, file.max_token_length).write(tmp_path / "small.t")
    monkeypatch.setattr(demo, "demo_model", lambda: tmp_path / "small.m")
    return tmp_path


@pytest.mark.usefixtures("model")
def test_a_question_an_answer_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(threads=1, kernels="auto")
    out = capsys.readouterr().out
    assert "> What is the capital of Japan?\n" in out
    table = out[out.rindex("┌") :]
    for row in ("memory, at most", "model file", "start", "prompt, ", "generation, ", "kernels"):
        assert f"│ {row}" in table
    assert "MiB" in table
    assert "tokens/s" in table
    assert ", 1 threads" not in table
