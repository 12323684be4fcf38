"""How a node tells what it does: structured logs on stderr, metrics in memory, and Prometheus' view of them.

Code that works increments plain numbers (:class:`WorkerMetrics`); what reads them, and how they are called outside, is the collector's
business. So nothing below ``api`` knows Prometheus, and counting costs an addition. Modules take their logger from
``structlog.get_logger()``; only the entry points call :func:`configure_logging`.
"""

import logging
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TextIO, cast

import structlog

from dairllm import __version__, machine
from dairllm.log_lines import LogLines
from dairllm.log_sink import LogSink

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric

__all__ = [
    "Histogram",
    "LinkBytes",
    "PagingCounts",
    "PagingTotals",
    "Readiness",
    "ServiceMetrics",
    "WorkerMetrics",
    "configure_logging",
    "registry",
]

PASS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Bounds of a pass's duration: from a small model on one node to a large one that is paged from disks."""

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
"""Bounds of how long who asked has waited: for the first token, for the whole answer."""


def configure_logging(
    format: Literal["auto", "console", "json"] = "auto",  # noqa: A002 - the name of the setting
    level: Literal["debug", "info", "warning", "error"] = "info",
    stream: TextIO | None = None,
) -> None:
    """Send all logs, ours and those of libraries, to `stream` (stderr by default).

    `auto` is `console` where the stream is a terminal, else `json`: one line an event. Colours need a terminal and no NO_COLOR. From now on
    no log call raises: what cannot be shown is named, what cannot be written is dropped and counted (dairllm.log_sink).
    """

    def told_lost(lines: int) -> str:
        return render(None, "warning", {"event": "log lines were lost: they could not be written", "lines": lines}) + "\n"

    sink = LogSink(stream or sys.stderr, told_lost)
    terminal = sink.isatty()
    minimum = getattr(logging, level.upper())
    render = LogLines(console=format == "console" or (format == "auto" and terminal), colors=terminal, private=level == "debug")
    structlog.configure(
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(minimum),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, sink)),  # which only writes and flushes
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_OfLibraries(sink, render)]
    root.setLevel(max(minimum, logging.WARNING))  # libraries say at most what an operator must know


class _OfLibraries(logging.Handler):
    """What libraries log by Python's own means becomes a line like ours."""

    def __init__(self, sink: LogSink, render: LogLines) -> None:
        super().__init__()
        self._sink, self._render = sink, render

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit, or cannot be shown
            message = str(record.msg)
        self._sink.write(self._render(None, record.levelname.lower(), {"event": message, "exc_info": record.exc_info}) + "\n")


@dataclass(slots=True)
class Histogram:
    """Counts of values at most as large as each bound, their sum and number."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> Iterator[tuple[str, float]]:
        """Prometheus' buckets: the bound as text, how many values are at most that."""
        so_far = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            so_far += count
            yield ("+Inf" if bound == float("inf") else repr(bound)), so_far


class PagingCounts(Protocol):
    """What the engine counts of one program's paging, from 0 on."""

    hits: int
    misses: int
    wait_seconds: float
    bytes: int


@dataclass(slots=True)
class PagingTotals:
    """The same over all programs of a process."""

    hits: int = 0
    """Blocks of weights that were in memory when they were needed."""
    misses: int = 0
    """Blocks that were waited for."""
    wait_seconds: float = 0.0
    bytes: int = 0
    """Read from the disk."""
    _seen: tuple[int, int, float, int] = (0, 0, 0.0, 0)
    _of: PagingCounts | None = None

    def follow(self, counts: PagingCounts | None) -> None:
        """Add what `counts` has grown by since the last time; another object than the last time has begun anew."""
        seen = self._seen if counts is self._of else (0, 0, 0.0, 0)
        self._of = counts
        if counts is None:
            return
        self._seen = now = counts.hits, counts.misses, counts.wait_seconds, counts.bytes
        self.hits += now[0] - seen[0]
        self.misses += now[1] - seen[1]
        self.wait_seconds += now[2] - seen[2]
        self.bytes += now[3] - seen[3]


@dataclass(slots=True)
class WorkerMetrics:
    """What one node has done since it started. Times are seconds, amounts bytes; all of it only grows, except `sessions_running`."""

    kernel_form: str = ""
    sessions_running: int = 0
    sessions: Counter[str] = field(default_factory=Counter)
    """By outcome: finished (the root said so), stopped (we did), or the kind of error that ended it."""
    refused: Counter[str] = field(default_factory=Counter)
    """Connections closed before they became a session's, by reason."""
    rows: int = 0
    passes: int = 0
    pass_seconds: Histogram = field(default_factory=lambda: Histogram(PASS_SECONDS))
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of activations and messages by kind of link: root, peer."""
    received: Counter[str] = field(default_factory=Counter)
    paging: PagingTotals = field(default_factory=PagingTotals)
    weight_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"compute": 0.0, "exchange": 0.0, "wait": 0.0})
    """Time in sessions: compute, exchange (moving slices), wait (for the next control packet)."""
    pass_running: Callable[[], float] = float
    """Asked at each scrape: for how long the pass in hand has been running; 0 where none is."""


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What a root has exchanged with one node."""

    node: int
    address: str
    sent: int
    received: int
    weights: int


@dataclass(slots=True)
class ServiceMetrics:
    """What a server of requests has done since it started. Times are seconds; all of it only grows, except `running`, `waiting` and the
    two rates."""

    kernel_form: str = ""
    running: int = 0
    waiting: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    """By outcome: stop, length, abandoned (the client went away), stalled (it did not read), unavailable, queue_full, invalid, failed."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the model still held from the request before."""
    generated_tokens: int = 0
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    token_seconds: Histogram = field(default_factory=lambda: Histogram(PASS_SECONDS))
    request_seconds: Histogram = field(default_factory=lambda: Histogram(REQUEST_SECONDS))
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    """Tokens a second of the last answer."""
    paging: PagingTotals = field(default_factory=PagingTotals)
    losses: int = 0
    """How often the model was lost: a worker went away, or a pass failed."""
    begun_again: int = 0
    """Requests that were put back into the line since the model was lost before their answers had begun."""
    links: Callable[[], Iterable[LinkBytes]] = tuple
    """Asked at each scrape."""
    pass_running: Callable[[], float] = float
    """Asked at each scrape: for how long the pass in hand has been running; 0 where none is."""


@dataclass(slots=True)
class Readiness:
    """What must still happen before this node can take work; None when it can.

    Attributes:
        waiting_until: until when requests that come nevertheless wait for it (time.monotonic()); None where they are refused.
    """

    reason: str | None = "starting"
    waiting_until: float | None = None


def registry(metrics: WorkerMetrics | ServiceMetrics) -> "CollectorRegistry":
    """A Prometheus registry that reads `metrics` at each scrape, beside the process' own figures."""
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily
    from prometheus_client.registry import Collector

    class NodeCollector(Collector):
        def collect(self) -> Iterator["Metric"]:
            yield InfoMetricFamily("dairllm_build", "Version of dairllm.", {"version": __version__})
            yield InfoMetricFamily("dairllm_kernels", "Form of the kernels in use.", {"form": metrics.kernel_form or "none"})
            yield GaugeMetricFamily("dairllm_peak_rss_bytes", "Most memory held so far (VmHWM).", machine.peak_rss_bytes())
            yield GaugeMetricFamily(
                "dairllm_pass_running_seconds", "For how long the pass in hand has been running.", metrics.pass_running()
            )
            yield from _of_paging(metrics.paging)
            yield from _of_worker(metrics) if isinstance(metrics, WorkerMetrics) else _of_service(metrics)

    result = CollectorRegistry(auto_describe=False)
    result.register(NodeCollector())
    ProcessCollector(registry=result)
    return result


def _of_worker(metrics: WorkerMetrics) -> Iterator["Metric"]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("dairllm_sessions_running", "Roots being served.", metrics.sessions_running)
    yield CounterMetricFamily("dairllm_rows_computed", "Rows (tokens) computed.", metrics.rows)
    yield CounterMetricFamily("dairllm_passes", "Control packets answered: one for each batch of rows.", metrics.passes)
    yield CounterMetricFamily("dairllm_weight_bytes", "Bytes of weights taken from the network.", metrics.weight_bytes)
    yield _counts("dairllm_sessions", "Roots served, by outcome.", "outcome", metrics.sessions)
    yield _counts("dairllm_connections_refused", "Connections closed before they became a session's.", "reason", metrics.refused)
    yield _counts("dairllm_activity_seconds", "Time in sessions by activity.", "activity", metrics.seconds)
    bytes_family = CounterMetricFamily("dairllm_link_bytes", "Bytes on links, without weights.", labels=["direction", "kind"])
    for direction, counts in (("sent", metrics.sent), ("received", metrics.received)):
        for kind, value in counts.items():
            bytes_family.add_metric([direction, kind], value)
    yield bytes_family
    yield _histogram("dairllm_pass_seconds", "From a control packet to the end of its pass.", metrics.pass_seconds)


def _of_service(metrics: ServiceMetrics) -> Iterator["Metric"]:
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

    yield GaugeMetricFamily("dairllm_num_requests_running", "Requests being answered: 1 at most.", metrics.running)
    yield GaugeMetricFamily("dairllm_num_requests_waiting", "Requests that wait for their turn.", metrics.waiting)
    yield _counts("dairllm_requests", "Requests for text, by outcome.", "outcome", metrics.requests)
    yield CounterMetricFamily("dairllm_prompt_tokens", "Tokens of the prompts of requests that were begun.", metrics.prompt_tokens)
    yield CounterMetricFamily("dairllm_prefix_cache_queries", "Prompt tokens that might have been held already.", metrics.prompt_tokens)
    yield CounterMetricFamily("dairllm_prefix_cache_hits", "Prompt tokens that were held already.", metrics.cached_tokens)
    yield CounterMetricFamily("dairllm_generation_tokens", "Tokens generated.", metrics.generated_tokens)
    yield CounterMetricFamily("dairllm_model_losses", "How often the model was lost: a worker went away, or a pass failed.", metrics.losses)
    yield CounterMetricFamily("dairllm_requests_begun_again", "Requests put back into the line as the model was lost.", metrics.begun_again)
    yield GaugeMetricFamily("dairllm_prefill_tokens_per_second", "Prompt tokens a second, of the last answer.", metrics.prefill_rate)
    yield GaugeMetricFamily("dairllm_decode_tokens_per_second", "Generated tokens a second, of the last answer.", metrics.decode_rate)
    yield _histogram(
        "dairllm_time_to_first_token_seconds",
        "From a request's arrival to its first token, the wait included.",
        metrics.first_token_seconds,
    )
    yield _histogram("dairllm_inter_token_latency_seconds", "From one token of an answer to the next.", metrics.token_seconds)
    yield _histogram("dairllm_e2e_request_latency_seconds", "From a request's arrival to its last token.", metrics.request_seconds)
    sent_and_received = CounterMetricFamily(
        "dairllm_worker_bytes", "Bytes on the link to a worker, without weights.", labels=["node", "address", "direction"]
    )
    weights = CounterMetricFamily("dairllm_worker_weight_bytes", "Bytes of weights sent to a worker.", labels=["node", "address"])
    for link in metrics.links():
        sent_and_received.add_metric([str(link.node), link.address, "sent"], link.sent)
        sent_and_received.add_metric([str(link.node), link.address, "received"], link.received)
        weights.add_metric([str(link.node), link.address], link.weights)
    yield sent_and_received
    yield weights


def _histogram(name: str, text: str, histogram: Histogram) -> "Metric":
    from prometheus_client.metrics_core import HistogramMetricFamily

    family = HistogramMetricFamily(name, text)
    family.add_metric([], list(histogram.cumulative()), histogram.total)
    return family


def _of_paging(paging: PagingTotals) -> Iterator["Metric"]:
    from prometheus_client.metrics_core import CounterMetricFamily

    lookups = {"hit": paging.hits, "miss": paging.misses}
    yield _counts(
        "dairllm_paging_blocks", "Blocks of weights that were in memory when they were needed, and that were waited for.", "lookup", lookups
    )
    yield CounterMetricFamily("dairllm_paging_wait_seconds", "Time that computing waited for the disk.", paging.wait_seconds)
    yield CounterMetricFamily("dairllm_paging_read_bytes", "Weights read from the disk.", paging.bytes)


def _counts(name: str, text: str, label: str, counts: Mapping[str, float]) -> "Metric":
    from prometheus_client.metrics_core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
