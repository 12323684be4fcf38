"""`dairllm worker`: the parts of a worker, started in order and stopped in reverse."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from dairllm.commands.asked_too_much import tell_threads
from dairllm.commands.progress import COMPILING, TELLING_SECONDS, telling
from dairllm.config import WorkerSettings, load_settings
from dairllm.errors import NetworkError
from dairllm.net.runner import Steps, in_thread, until_one_ends
from dairllm.net.runner import run as run_service
from dairllm.telemetry import Readiness, WorkerMetrics, configure_logging
from dairllm.units import format_size

if TYPE_CHECKING:
    from dairllm.cluster.own_model import OwnModel

__all__ = ["run", "serve"]

log = structlog.get_logger()


def run(config: Path | None, flags: Mapping[str, tuple[str, object]]) -> None:
    """Serve roots until a signal says otherwise.

    Raises:
        ConfigError: a setting is wrong, or this processor cannot run the kernels that were asked for.
        FormatError: the worker's own model is no whole model file.
        NetworkError: an address cannot be listened on.
    """
    settings = load_settings(WorkerSettings, config, flags=flags)
    configure_logging(settings.log.format, settings.log.level)
    run_service(lambda: serve(settings), shutdown=settings.deadlines.shutdown)


async def serve(settings: WorkerSettings) -> None:
    """A worker with its health server; ends when it is cancelled."""
    readiness, metrics = Readiness("starting"), WorkerMetrics()
    ended: Callable[[], Awaitable[None]] = asyncio.get_running_loop().create_future  # never
    async with Steps(settings.deadlines.shutdown + 2.0) as steps:
        if settings.metrics.enabled:
            from dairllm.api.health import HealthServer

            health = HealthServer(settings.metrics.host, settings.metrics_port, readiness, metrics)
            try:
                port = await steps.start("health server", health.start, health.close)
            except NetworkError as error:  # a port that nobody has named, unless he knows
                at = f"health and metrics of the worker on port {settings.worker.port}"
                raise NetworkError(f"{at}: {error}; another worker may have it (--port, --metrics-port)") from None
            log.info("health and metrics", host=settings.metrics.host, port=port)
            ended = health.ended

        readiness.reason = "compiling kernels"
        from dairllm.cluster.worker import Worker
        from dairllm.engine.executor import Executor

        tell_threads(settings.worker.n_threads)
        executor = Executor(settings.worker.n_threads, settings.worker.kernels)
        async with telling(COMPILING):
            await steps.start("kernels", lambda: in_thread("kernels", executor.start), lambda: in_thread("kernels", executor.close))
        metrics.kernel_form = executor.form
        log.info("kernels ready", form=executor.form, threads=executor.n_threads)

        own = None
        if settings.worker.model is not None:
            readiness.reason = "finding out which model it has"
            own = await in_thread("model", lambda: _open_model(settings.worker.model or ""), lambda own: own.close())
            log.info("model found", model=settings.worker.model, identity=own.identity.hex())
        worker = Worker(settings, executor, metrics, own)
        await steps.start("listener", worker.start, worker.close)
        readiness.reason = None
        try:
            await until_one_ends(worker.ended(), ended())
        finally:
            readiness.reason = "shutting down"


def _open_model(path: str) -> "OwnModel":
    """Open the worker's own model, and tell the log how far its reading is, where it must be read."""
    from dairllm.cluster.own_model import OwnModel

    told = time.monotonic()

    def progress(label: str, done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TELLING_SECONDS:
            told = time.monotonic()
            log.info("reading the model", model=path, at=label, done=format_size(done), of=format_size(total))

    return OwnModel.open(path, progress)
