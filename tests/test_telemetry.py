"""Logs are lines that people and programs can read; meters are numbers that Prometheus can scrape."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dairllm.telemetry import Histogram, LinkBytes, Meters, PagingTotals, ServiceMeters, configure_logging, registry


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


def test_an_exception_is_part_of_its_line() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    try:
        raise ValueError("broken")
    except ValueError:
        structlog.get_logger().exception("failed")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["exception"][0]["exc_value"] == "broken"


def test_libraries_speak_in_the_same_form_and_only_of_trouble() -> None:
    out = io.StringIO()
    configure_logging("json", "info", out)
    logging.getLogger("asyncio").info("details")
    logging.getLogger("asyncio").error("trouble with %s", "a task")
    (line,) = out.getvalue().splitlines()
    assert json.loads(line)["event"] == "trouble with a task"
    assert json.loads(line)["level"] == "error"


def scrape(meters: Meters | ServiceMeters) -> dict[str, float]:
    text = generate_latest(registry(meters)).decode()
    return {
        sample.name + "".join(f"[{key}={value}]" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_meters_are_scraped_as_they_stand() -> None:
    meters = Meters(kernel_form="avx2")
    before = scrape(meters)
    assert before["dairllm_rows_computed_total"] == before["dairllm_passes_total"] == 0
    meters.rows, meters.passes, meters.weight_bytes, meters.sessions_running = 33, 2, 1000, 1
    meters.sessions.update(["finished", "finished", "NetworkError"])
    meters.refused["busy"] += 1
    meters.sent["peer"] += 7
    meters.received["root"] += 9
    meters.seconds["compute"] += 0.25
    meters.pass_seconds.observe(0.003)
    meters.pass_seconds.observe(99)
    after = scrape(meters)
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
    meters = ServiceMeters(kernel_form="avx2", running=1, waiting=3, prompt_tokens=50, cached_tokens=20, generated_tokens=7, losses=2)
    meters.requests.update(["stop", "stop", "queue_full"])
    meters.prefill_rate, meters.decode_rate = 100.0, 12.5
    meters.first_token_seconds.observe(0.3)
    meters.token_seconds.observe(0.02)
    meters.request_seconds.observe(9)
    meters.links = lambda: [LinkBytes(1, "10.0.0.2:9990", 5, 6, 7)]
    found = scrape(meters)
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


@pytest.mark.parametrize("meters", [Meters(), ServiceMeters()], ids=["worker", "server"])
def test_names_follow_the_conventions(meters: Meters | ServiceMeters) -> None:
    for family in registry(meters).collect():
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
