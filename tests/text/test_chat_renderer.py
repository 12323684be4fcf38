"""Chat templates in their process: bounded in time and memory whatever they do, and the next conversation is served all the same."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dairllm import machine
from dairllm.errors import DairllmError
from dairllm.text.chat_child import MEMORY_BYTES
from dairllm.text.chat_renderer import PROCESS_BYTES, ChatRenderer, ChatTemplateError
from tests.patience import PATIENCE, comes

HELLO = [{"role": "user", "content": "hello"}]
BAD = [{"role": "user", "content": "bad"}]


def when_bad(template: str) -> str:
    """A template that is as good as any until the content is "bad"; what it does then stands in line 2."""
    return "{% if messages[0].content == 'bad' %}\n" + template + "{% endif %}{{ messages[0].content }}!"


TAKES_MEMORY = {
    "indent": "{{ ('a\\n' * 10000000) | indent(1000) }}",
    "a long text, indented": "{% set x = 'a\\n' * 100000 %}{{ x | indent(1000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "strftime": "{{ strftime_now('%c' * 10000000) }}",
    "repeat": "{{ 'a' * 10 ** 9 }}",
    "double": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "format": "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "tojson": "{{ messages | tojson(indent=10 ** 9) }}",
    "many small things": "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = [ns.l, 'a' * 1000 ~ i] %}{% endfor %}",
}


@pytest.mark.parametrize("template", TAKES_MEMORY.values(), ids=TAKES_MEMORY.keys())
def test_memory_has_a_bound(template: str) -> None:
    with ChatRenderer(when_bad(template)) as renderer:
        assert renderer.render(HELLO) == "hello!"
        pid = renderer.pid
        assert pid is not None
        before = machine.peak_rss_bytes(pid)
        with pytest.raises(ChatTemplateError, match=r"^the chat template fails \(line 2\): it takes more than 64 MiB of memory$"):
            renderer.render(BAD)
        if renderer.pid == pid:
            assert machine.peak_rss_bytes(pid) < before + MEMORY_BYTES + (8 << 20)
        assert renderer.render(HELLO) == "hello!"
        assert renderer.pid is not None
        assert machine.rss_bytes(renderer.pid) < PROCESS_BYTES


TAKES_TIME = {
    "loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "sum of lists": "{{ ([[1]] * 1000000) | sum(start=[]) | length }}",
}


@pytest.mark.parametrize("template", TAKES_TIME.values(), ids=TAKES_TIME.keys())
def test_time_has_a_bound(template: str) -> None:
    with ChatRenderer(when_bad(template)) as renderer:
        assert renderer.render(HELLO) == "hello!"
        pid = renderer.pid
        with pytest.raises(ChatTemplateError, match=r"^the chat template fails \(line 2\): it takes more than 2s$"):
            renderer.render(BAD)
        assert renderer.render(HELLO) == "hello!"
        assert renderer.pid not in (None, pid)


def test_much_output_has_a_bound() -> None:
    line = "a" * 1000
    with ChatRenderer(when_bad("{% for i in range(90000) %}" + line + "{% endfor %}")) as renderer:
        with pytest.raises(ChatTemplateError, match="longer than 16 MiB"):
            renderer.render(BAD)
        assert renderer.render(HELLO) == "hello!"


def test_a_template_that_never_compiles() -> None:
    with ChatRenderer("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}") as renderer:
        for _ in range(2):
            with pytest.raises(ChatTemplateError, match=r"^the chat template fails: RecursionError"):
                renderer.render(HELLO)


def test_a_process_is_kept_for_the_next_conversation() -> None:
    with ChatRenderer("{{ bos_token }}{{ messages[0].content }}{{ x }}", bos="<s>") as renderer:
        renderer.start()
        pid = renderer.pid
        assert pid is not None
        assert renderer.render(HELLO) == "<s>hello"
        assert renderer.render(HELLO, variables={"x": "!"}) == "<s>hello!"
        with pytest.raises(ChatTemplateError, match="list object has no element 0"):
            renderer.render([])
        assert renderer.render(HELLO) == "<s>hello"
        assert renderer.pid == pid


def test_a_long_conversation_is_none_of_that() -> None:
    for word in ("word ", "日本 ", "😀 "):
        text = word * (6_000_000 // len(word.encode()))
        with ChatRenderer("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '\\n' }}{% endfor %}") as renderer:
            assert renderer.render([{"role": "user", "content": text}]) == f"<|user|>{text.strip()}\n"


def test_any_text_arrives_as_it_was() -> None:
    text = "\x00\x1b\u2028\ud83d\U0001f600é"
    with ChatRenderer("{{ messages[0].content }}") as renderer:
        assert renderer.render([{"role": "user", "content": text}]) == text


def test_what_json_cannot_say() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with ChatRenderer("{{ messages[0].content }}") as renderer:
        for content in (deep, 10**5000, object()):
            with pytest.raises(ChatTemplateError, match="cannot be told"):
                renderer.render([{"role": "user", "content": content}])
        assert renderer.render(HELLO) == "hello"


@pytest.mark.parametrize("template", [None, ""])
def test_without_a_template(template: str | None) -> None:
    with ChatRenderer(template) as renderer:
        renderer.start()
        assert renderer.pid is None
        with pytest.raises(ChatTemplateError, match="the model has no chat template"):
            renderer.render(HELLO)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_was_ended_has_a_successor(signum: signal.Signals) -> None:
    with ChatRenderer("{{ messages[0].content }}") as renderer:
        assert renderer.render(HELLO) == "hello"
        pid = renderer.pid
        assert pid is not None
        os.kill(pid, signum)
        assert comes(lambda: renderer.pid is None)
        assert renderer.render(HELLO) == "hello"


def test_several_at_once_wait_for_each_other() -> None:
    with ChatRenderer(when_bad(TAKES_TIME["loops"])) as renderer:
        said: list[str] = []

        def ask(messages: list[dict[str, str]]) -> None:
            try:
                said.append(renderer.render(messages))
            except ChatTemplateError as error:
                said.append(str(error))

        threads = [threading.Thread(target=ask, args=(messages,)) for messages in (BAD, HELLO, HELLO)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(said) == ["hello!", "hello!", "the chat template fails (line 2): it takes more than 2s"]


def test_closing_ends_what_is_being_rendered() -> None:
    """And what waits for it."""
    renderer = ChatRenderer(when_bad(TAKES_TIME["loops"]))
    told: list[DairllmError] = []

    def ask() -> None:
        with pytest.raises(DairllmError, match="shutting down") as error:
            renderer.render(BAD)
        told.append(error.value)

    assert renderer.render(HELLO) == "hello!"
    pid = renderer.pid
    assert pid is not None
    begun = cpu_seconds(pid)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert comes(lambda: cpu_seconds(pid) > begun + 0.1)
    renderer.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(told) == 3
    assert not Path(f"/proc/{pid}").exists()
    renderer.close()


def test_a_process_ends_with_who_started_it() -> None:
    program = (
        "import sys, time\nfrom dairllm.text.chat_renderer import ChatRenderer\n"
        "renderer = ChatRenderer('x')\nrenderer.start()\nprint(renderer.pid, flush=True)\ntime.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        owner.kill()
        assert comes(lambda: not is_running(pid))


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    with ChatRenderer("x") as renderer, pytest.raises(DairllmError, match="cannot be started: No such file"):
        renderer.render(HELLO)


def test_jinja_stays_out_of_who_asks() -> None:
    """40 ms of a start, and a template's errors would be this process'."""
    program = "import sys, dairllm.commands.serve, dairllm.commands.generate; print(json.dumps('jinja2' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import json; {program}"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert json.loads(done.stdout) is False


def test_nothing_is_left_open() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before, threads = descriptors(), threading.active_count()
    with ChatRenderer(when_bad("{{ messages[99].x.y }}")) as renderer:
        for _ in range(8):
            renderer.render(HELLO)
            pid = renderer.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert comes(lambda: renderer.pid is None)
    assert (descriptors(), threading.active_count()) == (before, threads)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int) -> bool:
    """A zombie that nobody has waited for does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
