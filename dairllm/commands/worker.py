"""`dairllm worker`: the parts of a worker, started in order and stopped in reverse."""

import asyncio
from collections.abc import Mapping
from pathlib import Path

import structlog

from dairllm.config import WorkerSettings, load_settings
from dairllm.net.runner import Steps, in_thread
from dairllm.net.runner import run as run_service
from dairllm.telemetry import Meters, Readiness, configure_logging

__all__ = ["run", "serve"]

log = structlog.get_logger()


def run(config: Path | None, flags: Mapping[str, tuple[str, object]]) -> None:
    """Serve roots until a signal says otherwise.

    Raises:
        ConfigError: a setting is wrong, or this processor cannot run the kernels that were asked for.
        NetworkError: an address cannot be listened on.
    """
    settings = load_settings(WorkerSettings, config, flags=flags)
    configure_logging(settings.log.format, settings.log.level)
    run_service(lambda: serve(settings))


async def serve(settings: WorkerSettings) -> None:
    """A worker with its health server; ends when it is cancelled."""
    readiness, meters = Readiness("starting"), Meters()
    async with Steps(settings.deadlines.shutdown + 2.0) as steps:
        if settings.metrics.enabled:
            from dairllm.api.health import HealthServer

            health = HealthServer(settings.metrics.host, settings.metrics_port, readiness, meters)
            port = await steps.start("health server", health.start, health.close)
            log.info("health and metrics", host=settings.metrics.host, port=port)

        readiness.reason = "compiling kernels"
        from dairllm.engine.executor import Executor
        from dairllm.nodes.worker import Worker

        executor = Executor(settings.worker.n_threads, settings.worker.kernels)
        await steps.start("kernels", lambda: in_thread("kernels", executor.start), lambda: asyncio.to_thread(executor.close))
        meters.kernel_form = executor.form
        log.info("kernels ready", form=executor.form, threads=executor.n_threads)

        worker = Worker(settings, executor, meters)
        await steps.start("listener", worker.start, worker.close)
        readiness.reason = None
        try:
            await asyncio.get_running_loop().create_future()  # until it is cancelled
        finally:
            readiness.reason = "shutting down"
