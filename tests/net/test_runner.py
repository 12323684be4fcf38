"""A service ends in good order when it is told to, at once when it is told twice, and never hangs on what it no longer wants."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import structlog

from dairllm.errors import NetworkError
from dairllm.net.runner import Steps, in_thread, run, until_one_ends
from tests.patience import PATIENCE, until


def soon(call: Callable[[], object], seconds: float = 0.1) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def test_a_service_that_ends_by_itself() -> None:
    done: list[str] = []

    async def main() -> None:
        done.append(type(asyncio.get_running_loop()).__module__)

    run(main)
    assert done == ["uvloop"]


def test_an_error_of_the_service_is_raised() -> None:
    async def main() -> None:
        raise NetworkError("taken")

    with pytest.raises(NetworkError, match="taken"):
        run(main)


ENDING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_lets_the_service_end_in_good_order(signum: signal.Signals) -> None:
    order: list[str] = []

    async def main() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            order.append("cleaned")

    soon(lambda: os.kill(os.getpid(), signum))
    run(main)
    assert order == ["cleaned"]


def test_a_cancellation_that_no_signal_caused_is_raised() -> None:
    async def main() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        run(main)


@pytest.mark.parametrize("signum", ENDING)
def test_a_signal_cuts_a_command_short(signum: signal.Signals) -> None:
    order: list[str] = []

    async def main() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            order.append("cleaned")

    soon(lambda: os.kill(os.getpid(), signum))
    with pytest.raises(SystemExit) as ended:
        run(main, service=False)
    assert ended.value.code == 128 + signum
    assert order == ["cleaned"]


def test_a_command_that_ends_by_itself() -> None:
    async def main() -> None:
        await asyncio.sleep(0)

    run(main, service=False)


def test_handlers_of_signals_are_what_they_were() -> None:
    async def main() -> None:
        assert signal.getsignal(signal.SIGTERM) is not ours

    def ours(_signum: int, _frame: object) -> None:
        pass

    before = [signal.signal(signal.SIGTERM, ours), *map(signal.getsignal, ENDING[1:])]
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    try:
        run(main)
        assert list(map(signal.getsignal, ENDING)) == [ours, *before[1:]]
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    seen: list[object] = []

    async def main() -> None:
        seen.append(signal.getsignal(signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(main, service=False)
        assert seen == [signal.SIG_IGN]
    finally:
        signal.signal(signal.SIGHUP, before)


@contextlib.contextmanager
def process(body: str, how: str = "") -> Iterator["subprocess.Popen[str]"]:
    """A process that runs `body` as a service, unless told how, and has begun."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    head = "import asyncio, time\nfrom dairllm.net.runner import run, in_thread\nasync def main():\n    print('up', flush=True)"
    code = f"{head}\n{lines}\nrun(main, {how})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            wait_for(started, "up")
            yield started
        finally:
            started.kill()
            started.communicate()


def wait_for(process: "subprocess.Popen[str]", word: str) -> None:
    """Read the process' lines up to one."""
    assert process.stdout is not None
    for line in process.stdout:
        if line == word + "\n":
            return
    raise AssertionError(f"the process ended without saying {word}")


STUBBORN = """
while True:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        print('told', flush=True)
"""


def test_a_second_signal_ends_the_process_at_once() -> None:
    with process(STUBBORN) as stubborn:
        stubborn.send_signal(signal.SIGTERM)
        wait_for(stubborn, "told")
        stubborn.send_signal(signal.SIGTERM)  # part of the same telling
        time.sleep(0.7)
        assert stubborn.poll() is None
        stubborn.send_signal(signal.SIGTERM)
        assert stubborn.wait(PATIENCE) == -signal.SIGTERM


@pytest.mark.parametrize(("how", "code"), [("", 0), ("service=False", 143)])
def test_a_blocking_call_does_not_keep_the_process_alive(how: str, code: int) -> None:
    with process("await in_thread('slow', lambda: time.sleep(60))", how) as blocked:
        time.sleep(0.2)
        blocked.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert blocked.wait(PATIENCE) == code
        assert time.monotonic() - start < 30  # the call takes 60


SLEEP = "while True: ctypes.CDLL(None).sleep(600)"
"""Again and again: a signal cuts it short."""
HANGS = {
    "a task": "while True:\n    try:\n        await asyncio.sleep(600)\n    except asyncio.CancelledError: pass",
    "the loop": "while True: time.sleep(600)",
    "the loop, busy": "while True: pass",
    "the loop, in native code": f"import ctypes\n{SLEEP}",
    "the loop, in native code that keeps the interpreter": f"import ctypes; ctypes.PyDLL(None).sleep(2)\n{SLEEP}",
    "a thread of the loop's": "try:\n    await asyncio.to_thread(time.sleep, 600)\nfinally: pass",
    "a thread of the interpreter's": "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nawait asyncio.sleep(600)",
    "the log": "import structlog\nstructlog.configure(processors=[lambda *_: time.sleep(600)])\nawait asyncio.sleep(600)",
}


@pytest.mark.parametrize("body", HANGS.values(), ids=HANGS)
def test_whatever_hangs_a_signal_ends_the_process(body: str) -> None:
    """Where it was is the last that it says."""
    with process(body, "shutdown=-3") as hung:  # and the four seconds beyond
        hung.send_signal(signal.SIGTERM)
        assert hung.wait(60) == 1
        assert hung.stderr is not None
        assert "(most recent call first)" in hung.stderr.read()


def test_a_signal_ends_a_process_whose_last_words_nobody_reads() -> None:
    """The pipe is full, so that saying where it hangs would hang too."""
    fill = "import os, fcntl\nos.set_blocking(2, False)\ntry:\n    while True: os.write(2, bytes(4096))\n"
    with process(
        f"{fill}except BlockingIOError: os.set_blocking(2, True)\nprint('full', flush=True)\ntime.sleep(600)", "shutdown=-3"
    ) as mute:
        wait_for(mute, "full")
        mute.send_signal(signal.SIGTERM)
        assert mute.wait(60) == -signal.SIGALRM


def test_a_failing_log_does_not_swallow_a_signal() -> None:
    body = "import structlog\ndef fail(*_): raise OSError(28, 'full')\nstructlog.configure(processors=[fail])\nawait asyncio.sleep(600)"
    with process(body) as told:
        told.send_signal(signal.SIGTERM)
        assert told.wait(60) == 0


async def test_the_first_part_that_ends_ends_the_others() -> None:
    order: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            order.append("ended")

    async def fail() -> None:
        raise NetworkError("taken")

    await until_one_ends(endless(), asyncio.sleep(0))
    with pytest.raises(NetworkError, match="taken"):
        await until_one_ends(endless(), fail(), endless())
    waiting = asyncio.ensure_future(until_one_ends(endless(), endless()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert order == ["ended"] * 5


def test_what_a_callback_raises_is_logged_without_its_text() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_soon([].index, "my prompt")
        await asyncio.sleep(0)

    with structlog.testing.capture_logs() as logged:
        run(main)
    (entry,) = logged
    assert entry["event"] == "unexpected error in the event loop"
    assert "my prompt" not in str(entry["what"])
    assert isinstance(entry["exc_info"], ValueError)


async def test_a_call_in_a_thread_gives_its_result_or_its_error() -> None:
    def fail() -> None:
        raise NetworkError("no")

    assert await in_thread("name", lambda: threading.current_thread().name) == "name"
    assert await in_thread("none", lambda: None) is None
    with pytest.raises(NetworkError, match="no"):
        await in_thread("fail", fail)


async def test_a_call_that_nobody_waits_for_is_abandoned() -> None:
    release = threading.Event()
    waiting = asyncio.create_task(in_thread("slow", release.wait))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert any(thread.name == "abandoned slow" for thread in threading.enumerate())
    release.set()


async def test_what_an_abandoned_call_returns_is_dropped() -> None:
    release, dropped = threading.Event(), threading.Event()
    assert await in_thread("waited for", lambda: 1, lambda _: dropped.set()) == 1
    waiting = asyncio.create_task(in_thread("slow", release.wait, lambda _: dropped.set()))
    await asyncio.sleep(0.02)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not dropped.is_set()
    release.set()
    await until(dropped.is_set)


def test_what_a_call_returns_to_a_loop_that_is_closed_is_dropped() -> None:
    release, dropped = threading.Event(), threading.Event()

    async def main() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await in_thread("slow", release.wait, lambda _: dropped.set())

    asyncio.run(main())
    release.set()
    assert dropped.wait(PATIENCE)


def recorder(order: list[str], name: str, error: Exception | None = None) -> Callable[[], Awaitable[Any]]:
    async def step() -> str:
        order.append(name)
        if error is not None:
            raise error
        return name

    return step


async def test_steps_are_undone_in_reverse() -> None:
    order: list[str] = []
    async with Steps(1) as steps:
        for name in ("first", "second"):
            assert await steps.start(name, recorder(order, f"start {name}"), recorder(order, f"stop {name}")) == f"start {name}"
    assert order == ["start first", "start second", "stop second", "stop first"]


async def test_a_start_that_fails_undoes_what_was_begun() -> None:
    order: list[str] = []

    async def service() -> None:
        async with Steps(1) as steps:
            await steps.start("first", recorder(order, "start first"), recorder(order, "stop first"))
            await steps.start("second", recorder(order, "start second", NetworkError("taken")), recorder(order, "stop second"))

    with pytest.raises(NetworkError):
        await service()
    assert order == ["start first", "start second", "stop second", "stop first"]


async def test_a_stop_that_hangs_or_fails_does_not_keep_the_others_from_stopping() -> None:
    order: list[str] = []

    async def hang() -> None:
        await asyncio.sleep(60)

    with structlog.testing.capture_logs() as logged:
        async with Steps(0.05) as steps:
            await steps.start("first", recorder(order, "start"), recorder(order, "stop"))
            await steps.start("hangs", recorder(order, "start"), hang)
            await steps.start("fails", recorder(order, "start"), recorder(order, "fail", ValueError("x")))
    assert order == ["start", "start", "start", "fail", "stop"]
    assert [(entry["event"], entry["step"]) for entry in logged if entry["log_level"] != "debug"] == [
        ("stopping failed", "fails"),
        ("stopping took too long", "hangs"),
    ]
