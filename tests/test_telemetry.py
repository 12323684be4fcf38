"""Logs are lines that people and programs can read; metrics are numbers that Prometheus can scrape."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dairllm.errors import DairllmError
from dairllm.telemetry import Histogram, LinkBytes, PagingTotals, ServiceMetrics, WorkerMetrics, configure_logging, registry


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging as it was before, for the tests that follow."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_one_line_an_event_with_what_matters_first() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    structlog.get_logger().info("listening", port=9990, host="::")
    structlog.get_logger().warning("two\nlines")
    first, second = out.getvalue().splitlines()
    assert list(json.loads(first)) == ["timestamp", "level", "event", "port", "host"]
    assert json.loads(first)["port"] == 9990
    assert json.loads(second) | {"timestamp": ""} == {"timestamp": "", "level": "warning", "event": "two\nlines"}


def test_what_is_below_the_level_is_left_out() -> None:
    out = io.StringIO()
    configure_logging("json", "warning", out)
    structlog.get_logger().info("quiet")
    structlog.get_logger().error("loud")
    assert [json.loads(line)["event"] for line in out.getvalue().splitlines()] == ["loud"]


def test_auto_is_json_where_there_is_no_terminal_and_console_where_there_is() -> None:
    out, terminal = io.StringIO(), Terminal()
    configure_logging("auto", "info", out)
    structlog.get_logger().info("hello")
    assert out.getvalue().startswith("{")
    configure_logging("auto", "info", terminal)
    structlog.get_logger().info("hello", port=5)
    assert "hello" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")


def test_colours_need_a_terminal_and_no_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain, colourful, objected = io.StringIO(), Terminal(), Terminal()
    configure_logging("console", "info", plain)
    structlog.get_logger().info("hello")
    configure_logging("console", "info", colourful)
    structlog.get_logger().info("hello")
    monkeypatch.setenv("NO_COLOR", "1")
    configure_logging("console", "info", objected)
    structlog.get_logger().info("hello")
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in colourful.getvalue()
    assert "\x1b[" not in objected.getvalue()


PROMPT = "mein Kolibri"


def failing(prompt: str) -> None:
    words = prompt.split()
    raise LookupError(f"no token for {words[-1]}")


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_an_exception_is_part_of_its_event_without_what_a_request_said(form: Any, level: Any) -> None:
    """No local variables, no source but ours, and not its text, which may quote a prompt."""
    out = io.StringIO()
    configure_logging(form, level, out)
    try:
        try:
            failing(PROMPT)
        except LookupError as error:
            raise DairllmError("the answer failed") from error
    except DairllmError:
        structlog.get_logger().exception("request failed", peer="10.0.0.2")
    told = out.getvalue()
    assert "Kolibri" not in told
    assert "LookupError" in told
    assert "the answer failed" in told
    assert "failing" in told, "where it happened"
    assert told.endswith("\n")
    if form == "json":
        (line,) = told.splitlines()
        last, first = json.loads(line)["exception"]
        assert (last["exc_type"], last["exc_value"]) == ("DairllmError", "the answer failed")
        assert first["exc_type"] == "LookupError"
        assert set(first["frames"][0]) == {"filename", "lineno", "name"}


def test_a_library_that_logs_an_exception_tells_no_more() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    try:
        failing(PROMPT)
    except LookupError:
        logging.getLogger("uvicorn.error").exception("Exception in ASGI application")
    (line,) = out.getvalue().splitlines()
    assert "Kolibri" not in line
    assert json.loads(line)["exception"][0]["frames"][-1]["name"] == "failing"


def test_who_asks_for_all_details_is_told_what_an_exception_says() -> None:
    out = io.StringIO()
    configure_logging("json", "debug", out)
    try:
        failing(PROMPT)
    except LookupError:
        structlog.get_logger().exception("failed")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "no token for Kolibri"
    assert line.count("Kolibri") == 1


def test_exceptions_of_a_group_and_of_a_circle_are_told_once() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    first, second = OSError(28, "No space left on device"), DairllmError("second")
    first.__context__, second.__context__ = second, first
    structlog.get_logger().error("failed", exc_info=ExceptionGroup("two", [first, second]))
    (line,) = out.getvalue().splitlines()
    told = [(one["exc_type"], one["exc_value"]) for one in json.loads(line)["exception"]]
    assert told[1:] == [("OSError", "[Errno 28] No space left on device"), ("DairllmError", "second")]


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError("no")

    __str__ = __repr__


class UnshowableError(DairllmError):
    __str__ = Unshowable.__repr__


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_log_call_raises(form: Any) -> None:
    out = io.StringIO()
    configure_logging(form, "debug", out)
    log = structlog.get_logger()
    endless: list[object] = []
    endless.append(endless)
    log.info("a value", value=Unshowable(), peer="10.0.0.2")
    log.info("within others", values=[{"x": (1, Unshowable())}, {Unshowable(): 2}])
    log.info("a circle", values=endless)
    log.info("too many digits", value=10**5000)
    log.info(Unshowable())
    log.info("half a letter", value="\ud800")
    log.error("an exception", exc_info=UnshowableError("x"))
    log.exception("none is being handled")
    logging.getLogger("asyncio").error("%d arguments of %s", 1)
    logging.getLogger("asyncio").error("%s", Unshowable())
    lines = out.getvalue().splitlines()
    if form == "json":
        assert len([json.loads(line) for line in lines]) == 10
        assert json.loads(lines[0])["value"] == "<Unshowable that cannot be shown>"
        assert json.loads(lines[0])["peer"] == "10.0.0.2"
        assert json.loads(lines[3])["of"] == "too many digits"
    else:
        assert "<Unshowable that cannot be shown>" in lines[0]


def test_a_terminal_obeys_nothing_of_a_value() -> None:
    terminal = Terminal()
    configure_logging("console", "info", terminal)
    structlog.get_logger().info("refused", name="\x1b]0;owned\x07\r\n[info] ready")
    (line,) = terminal.getvalue().splitlines()
    assert "\x1b]0" not in line
    assert "x1b]0;owned" in line


def test_libraries_speak_in_the_same_form_and_only_of_trouble() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    logging.getLogger("asyncio").info("details")
    logging.getLogger("asyncio").error("trouble with %s", "a task")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["event"] == "trouble with a task"
    assert json.loads(line)["level"] == "error"


def scrape(metrics: WorkerMetrics | ServiceMetrics) -> dict[str, float]:
    text = generate_latest(registry(metrics)).decode()
    return {
        sample.name + "".join(f"[{key}={value}]" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_meters_are_scraped_as_they_stand() -> None:
    metrics = WorkerMetrics(kernel_form="avx2")
    before = scrape(metrics)
    assert before["dairllm_rows_computed_total"] == before["dairllm_passes_total"] == 0
    metrics.rows, metrics.passes, metrics.weight_bytes, metrics.sessions_running = 33, 2, 1000, 1
    metrics.sessions.update(["finished", "finished", "NetworkError"])
    metrics.refused["busy"] += 1
    metrics.sent["peer"] += 7
    metrics.received["root"] += 9
    metrics.seconds["compute"] += 0.25
    metrics.pass_seconds.observe(0.003)
    metrics.pass_seconds.observe(99)
    after = scrape(metrics)
    assert after["dairllm_rows_computed_total"] == 33
    assert after["dairllm_passes_total"] == 2
    assert after["dairllm_weight_bytes_total"] == 1000
    assert after["dairllm_sessions_running"] == 1
    assert after["dairllm_sessions_total[outcome=finished]"] == 2
    assert after["dairllm_sessions_total[outcome=NetworkError]"] == 1
    assert after["dairllm_connections_refused_total[reason=busy]"] == 1
    assert after["dairllm_link_bytes_total[direction=sent][kind=peer]"] == 7
    assert after["dairllm_link_bytes_total[direction=received][kind=root]"] == 9
    assert after["dairllm_activity_seconds_total[activity=compute]"] == 0.25
    assert after["dairllm_activity_seconds_total[activity=exchange]"] == 0
    assert after["dairllm_pass_seconds_bucket[le=0.0025]"] == 0
    assert after["dairllm_pass_seconds_bucket[le=0.005]"] == 1
    assert after["dairllm_pass_seconds_bucket[le=60.0]"] == 1
    assert after["dairllm_pass_seconds_bucket[le=+Inf]"] == after["dairllm_pass_seconds_count"] == 2
    assert after["dairllm_pass_seconds_sum"] == pytest.approx(99.003)
    assert after["dairllm_kernels_info[form=avx2]"] == 1
    assert after["dairllm_peak_rss_bytes"] > 0


def test_a_servers_meters_are_scraped_as_they_stand() -> None:
    metrics = ServiceMetrics(kernel_form="avx2", running=1, waiting=3, prompt_tokens=50, cached_tokens=20, generated_tokens=7, losses=2)
    metrics.requests.update(["stop", "stop", "queue_full"])
    metrics.prefill_rate, metrics.decode_rate = 100.0, 12.5
    metrics.first_token_seconds.observe(0.3)
    metrics.token_seconds.observe(0.02)
    metrics.request_seconds.observe(9)
    metrics.links = lambda: [LinkBytes(1, "10.0.0.2:9990", 5, 6, 7)]
    found = scrape(metrics)
    assert found["dairllm_kernels_info[form=avx2]"] == 1
    assert (found["dairllm_num_requests_running"], found["dairllm_num_requests_waiting"]) == (1, 3)
    assert found["dairllm_requests_total[outcome=stop]"] == 2
    assert found["dairllm_requests_total[outcome=queue_full]"] == 1
    assert found["dairllm_prompt_tokens_total"] == found["dairllm_prefix_cache_queries_total"] == 50
    assert found["dairllm_prefix_cache_hits_total"] == 20
    assert found["dairllm_generation_tokens_total"] == 7
    assert found["dairllm_model_losses_total"] == 2
    assert (found["dairllm_prefill_tokens_per_second"], found["dairllm_decode_tokens_per_second"]) == (100, 12.5)
    assert found["dairllm_time_to_first_token_seconds_bucket[le=0.25]"] == 0
    assert found["dairllm_time_to_first_token_seconds_bucket[le=0.5]"] == 1
    assert found["dairllm_inter_token_latency_seconds_bucket[le=0.025]"] == 1
    assert found["dairllm_e2e_request_latency_seconds_sum"] == 9
    assert found["dairllm_worker_bytes_total[address=10.0.0.2:9990][direction=sent][node=1]"] == 5
    assert found["dairllm_worker_bytes_total[address=10.0.0.2:9990][direction=received][node=1]"] == 6
    assert found["dairllm_worker_weight_bytes_total[address=10.0.0.2:9990][node=1]"] == 7
    assert not any(name.startswith("dairllm_sessions") for name in found), "that is a worker's"


@pytest.mark.parametrize("metrics", [WorkerMetrics(), ServiceMetrics()], ids=["worker", "server"])
def test_names_follow_the_conventions(metrics: WorkerMetrics | ServiceMetrics) -> None:
    for family in registry(metrics).collect():
        assert family.name.startswith(("dairllm_", "process_"))
        assert family.documentation.endswith(".")


def test_a_value_on_a_bound_belongs_to_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert list(histogram.cumulative()) == [("1.0", 1), ("2.0", 3), ("+Inf", 4)]


def test_paging_is_summed_over_programs() -> None:
    totals, first, second = PagingTotals(), PagingTotals(hits=1), PagingTotals()
    totals.follow(first)
    first.hits, first.misses, first.bytes, first.wait_seconds = 5, 2, 100, 0.5
    totals.follow(first)
    totals.follow(first)
    totals.follow(None)
    second.hits = 3
    totals.follow(second)
    assert (totals.hits, totals.misses, totals.bytes, totals.wait_seconds) == (8, 2, 100, 0.5)
