"""`dairllm generate` as its users meet it: real processes over small random models, the ids those that the C++ program generated."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.kernels.forms import FORMS
from dairllm.text.tokenizer import Tokenizer
from tests.patience import PATIENCE

DATA = Path(__file__).parent.parent / "data" / "dllama"
MODEL, TINY = DATA / "llama_f32.m", DATA / "tiny.t"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
PROMPT = GOLDEN["prompt"]
PROMPT_IDS = GOLDEN["models"]["llama_f32"]["prompt_ids"]
IDS = GOLDEN["models"]["llama_f32"]["generated_ids_1_node"]


def command(*words: object, model: Path = MODEL, tokenizer: Path | None = TINY) -> list[str]:
    named = () if tokenizer is None else ("--tokenizer", tokenizer)
    return [sys.executable, "-m", "dairllm", "generate", *map(str, ("--model", model, *named, *words))]


def generate(*words: object, model: Path = MODEL, tokenizer: Path | None = TINY) -> tuple[int, str, str]:
    """Exit code, stdout, and stderr without the line about compiling, which the first test to need kernels gets."""
    done = subprocess.run(command(*words, model=model, tokenizer=tokenizer), capture_output=True, timeout=PATIENCE)
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("compiling the kernels")]
    return done.returncode, done.stdout.decode(), "\n".join(lines)


def report(*words: object) -> dict[str, Any]:
    code, out, err = generate("--json", *words)
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_the_ids_of_the_cpp_program() -> None:
    found = report("--prompt", PROMPT, "--steps", len(IDS), "--ignore-eos")
    assert (found["prompt_ids"], found["ids"]) == (PROMPT_IDS, IDS)
    assert found["text"] == Tokenizer.load(TINY).decode(IDS)
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    assert found["peak_rss_bytes"] > 1 << 20
    assert found["bytes_sent"] == found["bytes_received"] == found["weight_bytes_sent"] == 0
    (node,) = found["nodes"]
    assert (node["node"], node["address"], node["heads"], node["kv_heads"], node["ffn"]) == (0, "", 4, 2, 128)
    assert node["threads"] >= 1
    assert node["kernels"] in FORMS


def test_text_streams_to_stdout_and_nothing_else_does() -> None:
    code, out, err = generate("--prompt", PROMPT, "--steps", 8, "--ignore-eos")
    assert (code, out, err) == (0, Tokenizer.load(TINY).decode(IDS[:8]) + "\n", "")


def test_prompt_ids_take_the_place_of_a_prompt() -> None:
    assert report("--prompt-ids", ",".join(map(str, PROMPT_IDS)), "--steps", 5)["ids"] == IDS[:5]


def test_ids_alone_where_there_is_no_tokenizer() -> None:
    code, out, _ = generate("--prompt-ids", ",".join(map(str, PROMPT_IDS)), "--steps", 3, tokenizer=None)
    assert (code, out.split()) == (0, [str(token) for token in IDS[:3]])


def test_an_eos_id_ends_the_answer_unless_ignored(tmp_path: Path) -> None:
    file = TokenizerFile.read(TINY)
    ends = TokenizerFile(file.pieces, file.scores, file.bos_id, (IDS[3],), file.add_bos, None, file.max_token_length)
    ends.write(tmp_path / "ends.t")
    words = ("--json", "--prompt", PROMPT, "--steps", 8)
    stopped = json.loads(generate(*words, tokenizer=tmp_path / "ends.t")[1])
    assert (stopped["ids"], stopped["finish_reason"]) == (IDS[:4], "stop")
    assert stopped["text"] == Tokenizer.load(TINY).decode(IDS[:3]), "the end is no text"
    ignored = json.loads(generate(*words, "--ignore-eos", tokenizer=tmp_path / "ends.t")[1])
    assert (ignored["ids"], ignored["finish_reason"]) == (IDS[:8], "length")


def test_chat_puts_the_prompt_through_the_template(tmp_path: Path) -> None:
    file = TokenizerFile.read(TINY)
    template = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}<|turn|>"
    TokenizerFile(file.pieces, file.scores, file.bos_id, (), file.add_bos, template, file.max_token_length).write(tmp_path / "chat.t")
    code, out, _ = generate("--json", "--chat", "--prompt", "on", "--steps", 1, tokenizer=tmp_path / "chat.t")
    assert code == 0
    assert json.loads(out)["prompt_ids"] == Tokenizer.load(TINY).encode("<|begin|><|turn|>user: on<|turn|>")


def test_who_forgets_chat_and_gets_no_word_is_told(tmp_path: Path) -> None:
    file = TokenizerFile.read(TINY)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ends = TokenizerFile(file.pieces, file.scores, file.bos_id, (IDS[0],), file.add_bos, template, file.max_token_length)
    ends.write(tmp_path / "ends.t")
    code, out, err = generate("--prompt", PROMPT, tokenizer=tmp_path / "ends.t")
    assert (code, out, err) == (0, "\n", "[the model said nothing: it knows a chat format, which is asked for by --chat]")
    code, out, err = generate("--prompt", PROMPT, "--steps", 1, "--ignore-eos", tokenizer=tmp_path / "ends.t")
    assert (code, err) == (0, "")


def test_a_seed_repeats_an_answer() -> None:
    words = ("--prompt", PROMPT, "--steps", 12, "--temperature", 1.5, "--ignore-eos")
    first, again, other = (report(*words, "--seed", seed)["ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_seed_that_was_not_given_is_told() -> None:
    words = ("--prompt", PROMPT, "--steps", 12, "--temperature", 1.5, "--ignore-eos")
    found = report(*words)
    assert report(*words, "--seed", found["seed"])["ids"] == found["ids"]


def test_logits_are_what_led_to_each_id(tmp_path: Path) -> None:
    report("--prompt", PROMPT, "--steps", 6, "--ignore-eos", "--logits", tmp_path / "l.npy")
    logits = np.load(tmp_path / "l.npy")
    assert (logits.dtype, logits.shape) == (np.float32, (6, 320))
    assert logits.argmax(axis=1).tolist() == IDS[:6]
    expected = np.load(DATA / "llama_f32.logits-1-node.npy")[:6]
    assert np.linalg.norm(logits - expected) < 1e-4 * np.linalg.norm(expected)


def test_the_context_ends() -> None:
    found = report("--prompt-ids", "1,2", "--max-seq-len", 5, "--steps", 100)
    assert (len(found["ids"]), found["finish_reason"]) == (4, "length")


def test_an_answer_ends_with_the_context_where_nobody_said_how_long_it_may_be() -> None:
    """And it is said, where the model had not finished."""
    code, _, err = generate("--prompt", PROMPT, "--max-seq-len", 60)
    assert (code, err) == (0, f"[cut after {61 - len(PROMPT_IDS)} tokens: the context of 60 tokens is full, the prompt included]")
    code, _, err = generate("--prompt", PROMPT, "--steps", 3)
    assert (code, err) == (0, "[cut after 3 tokens: --steps]")


def test_penalties_and_filters_are_honoured() -> None:
    """The formula of the frequency penalty, over the model's own logits: no token twice where it is large enough."""
    words = ("--prompt", PROMPT, "--steps", 24, "--ignore-eos")
    ids = report(*words, "--frequency-penalty", 2, "--presence-penalty", 2)["ids"]
    assert len(set(ids)) > len(set(report(*words)["ids"]))
    hot = (*words, "--temperature", 5, "--seed", 1)
    plain = report(*words)["ids"]
    assert report(*hot)["ids"] != plain
    assert report(*hot, "--top-k", 1)["ids"] == report(*hot, "--min-p", 1)["ids"] == plain
    assert report(*words, "--repetition-penalty", 5)["ids"] != plain


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--prompt", "on", "--chat"), 2, "has no chat template"),
        (("--prompt-ids", "1,320"), 2, "token 1 of the prompt is 320; the model knows ids 0 to 319"),
        (("--prompt", PROMPT, "--max-seq-len", 5), 2, "the prompt has 39 tokens; the context has room for 5"),
        (("--prompt-ids", "1", "--logits", "/nonesuch/l.npy"), 2, "--logits /nonesuch/l.npy: No such file or directory"),
    ],
)
def test_mistakes_that_only_the_model_shows(words: tuple[object, ...], code: int, message: str) -> None:
    found, out, err = generate(*words)
    assert (found, out) == (code, "")
    assert err.startswith("dairllm: error: ")
    assert message in err
    assert "\n" not in err


def test_no_model() -> None:
    code, _, err = generate("--prompt", "a", model=DATA / "nonesuch.m")
    assert code == 1
    assert err.startswith(f"dairllm: error: {DATA / 'nonesuch.m'}: ")


def test_a_model_that_is_none() -> None:
    code, _, err = generate("--prompt", "a", model=DATA / "golden.json")
    assert code == 1
    assert "golden.json: expected a .m model file, found a JSON file" in err


@pytest.fixture
def wordy(tmp_path: Path) -> Path:
    """A tokenizer whose every token is a kilobyte: an answer of 200 does not fit into a pipe that nobody reads."""
    TokenizerFile([b"%04d " % token * 200 for token in range(320)], [0.0] * 320, None, (), False, None, 1000).write(tmp_path / "wordy.t")
    return tmp_path / "wordy.t"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_an_answer_that_is_cut_short(number: signal.Signals, code: int, wordy: Path, tmp_path: Path) -> None:
    """Though nobody reads on: what has been said so far has been said, the logits of it are kept, and nothing else is."""
    words = command("--prompt-ids", "1,2", "--steps", 200, "--logits", tmp_path / "l.npy", tokenizer=wordy)
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert os.read(process.stdout.fileno(), 1)
        process.send_signal(number)
        assert process.wait(timeout=PATIENCE) == code
        rest = process.stdout.read()
        assert rest is not None
        n_said = -(-len(rest) // 1000)
        assert 0 < n_said < 200
        assert [line for line in process.stderr.read().splitlines() if not line.startswith(b"compiling")] == []
    logits = np.load(tmp_path / "l.npy")
    assert logits.shape[1] == 320
    assert n_said <= len(logits) <= n_said + 1, "the last one may not have been said"


def test_a_slow_reader_gets_all_of_it(wordy: Path) -> None:
    with subprocess.Popen(command("--prompt-ids", "1,2", "--steps", 200, tokenizer=wordy), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        time.sleep(0.5)  # to let the pipe fill, if it will; nothing hangs on it
        out = process.stdout.read()
        assert process.wait(timeout=PATIENCE) == 0
    assert len(out) == 200 * 1000 + 1


def test_the_answer_may_go_into_a_file(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        done = subprocess.run(command("--prompt-ids", "1,2", "--steps", 3, tokenizer=None), stdout=file, timeout=PATIENCE)
    assert done.returncode == 0
    assert len((tmp_path / "out").read_text().split()) == 3


def test_a_reader_that_has_gone_is_no_error() -> None:
    with subprocess.Popen(command("--prompt-ids", "1,2", "--steps", 200), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read().decode()
        assert [line for line in err.splitlines() if not line.startswith("compiling")] == []
        assert process.wait(timeout=PATIENCE) == 128 + signal.SIGPIPE


def test_a_prompt_from_stdin_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(f"{PROMPT}\n", encoding="utf-8")
    words = ("--json", "--steps", 1)
    given = subprocess.run(command("-p", "-", *words), input=f"{PROMPT}\n".encode(), capture_output=True, timeout=PATIENCE, check=True)
    for out in (given.stdout.decode(), generate("--prompt-file", file, *words)[1]):
        assert json.loads(out)["prompt_ids"] == PROMPT_IDS


def test_a_context_that_the_model_has_not_is_told() -> None:
    code, _, err = generate("--prompt", PROMPT, "--steps", 1, "--max-seq-len", 100_000)
    told = json.loads(err.splitlines()[0])
    assert (code, told["event"], told["asked"]) == (0, "the model has a shorter context than was asked for", 100_000)


def test_the_speed_is_told_at_a_terminal() -> None:
    main, other = os.openpty()
    done = subprocess.run(command("--prompt", PROMPT, "--steps", 3, "--ignore-eos"), stdout=subprocess.PIPE, stderr=other, timeout=PATIENCE)
    os.close(other)
    with open(main, "rb", buffering=0) as terminal:
        said = terminal.read(65536).decode()
    assert done.returncode == 0
    assert re.search(rf"\[{len(PROMPT_IDS)} tokens of prompt at [\d.]+ tokens/s, 3 generated at [\d.]+ tokens/s\]\r\n$", said)
