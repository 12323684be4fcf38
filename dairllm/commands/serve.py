"""`dairllm serve`: a model behind OpenAI's API, on this machine or with workers."""

from pathlib import Path

import structlog

from dairllm.api.app import serve_app
from dairllm.api.prompts import ServedModel
from dairllm.api.server import HttpServer
from dairllm.cluster.cluster import Cluster
from dairllm.cluster.cluster_history import ClusterHistory
from dairllm.commands.generate_options import tokenizer_path
from dairllm.commands.plan_text import reading
from dairllm.commands.progress import COMPILING, telling
from dairllm.commands.root_node import planned_model, root_node, sync_of
from dairllm.config import RootSettings
from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.errors import ConfigError
from dairllm.formats.digest import sampled_digest
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import FloatType
from dairllm.net.runner import Steps, in_thread, until_one_ends
from dairllm.net.runner import run as run_service
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode
from dairllm.runtime.memory_plan import MemoryPlan
from dairllm.runtime.pass_clock import PassClock
from dairllm.serving.fingerprint import Fingerprint
from dairllm.serving.service import Service
from dairllm.telemetry import Readiness, ServiceMetrics
from dairllm.text.tokenizer import Tokenizer

__all__ = ["run"]

log = structlog.get_logger()
SPARE_CONNECTIONS = 256
"""Beside those of requests in line: for probes, and for who is told to come again."""


def run(settings: RootSettings) -> None:
    """Answer requests until a signal says otherwise.

    Raises:
        ConfigError: a setting is wrong, files do not belong together, or this processor cannot run the kernels that were asked for.
        FormatError: a file is not what it should be.
        GraphError: the model cannot be shared so.
        LimitError: it cannot be computed within the memory limit.
        NetworkError: the address cannot be listened on.
    """
    if settings.model.file is None:
        raise ConfigError("no model: name its file with --model, or as model.file in the configuration")
    tokenizer_file = tokenizer_path(Path(settings.model.file), settings.model.tokenizer, needed=True)
    with planned_model(settings, tokenizer_file, serves=True) as (model, tokenizer, plan):
        assert tokenizer is not None  # noqa: S101 - for the type checker: its file was needed
        if tokenizer.chat_template is None:
            log.warning("no chat template: /v1/chat/completions cannot be used with this model", tokenizer=str(tokenizer_file))
        run_service(lambda: _serve(settings, model, plan, tokenizer), shutdown=settings.deadlines.shutdown)


async def _serve(settings: RootSettings, model: ModelFile, plan: MemoryPlan, tokenizer: Tokenizer) -> None:
    """Checks, then the server, which says what it waits for; then kernels; then the model, as often as it takes."""
    executor, clock, history = Executor(settings.engine.n_threads, settings.engine.kernels), PassClock(), ClusterHistory()
    compute: Compute[Program] = Compute(executor)
    root_node(settings, model, compute, plan)  # told now, what could be known to fail
    readiness, metrics = Readiness("starting"), ServiceMetrics(kernel_form=executor.form)
    metrics.pass_running = lambda: clock.running_seconds

    async def opened() -> LocalNode | Cluster:
        node = root_node(settings, model, compute, plan, clock, history)
        await node.open()  # which leaves nothing behind where it fails
        if node.paging is not None:
            log.info("paging", threads=executor.n_threads, **reading(node.paging.read_mode, plan))
        return node

    async def end_threads() -> None:
        compute.close()
        await in_thread("kernels", executor.close)

    server = settings.server
    digest = await in_thread("digest", lambda: sampled_digest(model))
    service = Service(
        opened,
        tokenizer,
        readiness,
        metrics,
        fingerprint=Fingerprint(digest, sync_of(settings, model), FloatType[settings.engine.kv_cache.upper()]),
        queue=server.queue,
        reconnect=settings.deadlines.reconnect,
        recovery=settings.deadlines.recovery,
        shutdown=settings.deadlines.shutdown,
    )
    renderer = tokenizer.chat_renderer()
    served = ServedModel(
        name=settings.model.name or model.path.stem,
        tokenizer=tokenizer,
        renderer=renderer,
        seq_len=model.spec.seq_len,
        vocab_size=model.spec.vocab_size,
        sampling=settings.sampling,
        request_bytes=server.request_bytes,
    )
    app = serve_app(served, service, readiness, metrics, heartbeat=server.heartbeat, cors_origins=server.cors_origins)
    http = HttpServer(
        app,
        server.host,
        server.port,
        connections=server.queue + SPARE_CONNECTIONS,
        keep_alive=server.keep_alive,
        hosts=server.hosts,
    )
    async with Steps(settings.deadlines.shutdown + 2.0) as steps:
        port = await steps.start("http server", http.start, http.close)
        # After the server, so that it ends before: who waits for it is told so while there is somebody to tell it. In a thread of its own
        # in the end: those that requests are rendered in may all be waiting.
        await steps.start(
            "chat template", lambda: in_thread("chat template", renderer.start), lambda: in_thread("chat template", renderer.close)
        )
        log.info("listening", host=server.host, port=port, model=served.name)
        log.info("memory plan", **plan.summary())
        readiness.reason = "compiling kernels"
        async with telling(COMPILING):
            await steps.start("kernels", lambda: in_thread("kernels", executor.start), end_threads)
        compute.open()
        log.info("kernels ready", form=executor.form, threads=executor.n_threads)
        workers = ", ".join(map(str, settings.cluster.workers))
        readiness.reason = f"connecting to {workers}" if workers else "loading the model"
        await steps.start("service", service.start, service.close)
        await until_one_ends(service.ended(), http.ended(), compute.ended())
