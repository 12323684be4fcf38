"""A node's program with what computes it: over weights that are all in place, or over blocks of its model file that come and go."""

from dataclasses import dataclass

from dairllm.engine.program import Program, compile_program
from dairllm.engine.weights import Weights
from dairllm.formats.model_file import ModelFile
from dairllm.graph.types import FloatType, NetworkConfig, NodeConfig
from dairllm.net.runner import in_thread
from dairllm.paging.needs import PagingSettings
from dairllm.paging.status import PagingStatus
from dairllm.runtime.compute import Compute
from dairllm.runtime.paged_compute import PagedCompute, open_paged
from dairllm.runtime.resident_compute import ResidentCompute

__all__ = ["NodeProgram", "open_program"]


@dataclass(frozen=True, slots=True)
class NodeProgram:
    """From `open_program` to `close`.

    Attributes:
        program: the node's.
        compute: runs it.
    """

    program: Program
    compute: ResidentCompute | PagedCompute

    @property
    def paging(self) -> PagingStatus | None:
        """None where nothing is paged."""
        return self.compute.status if isinstance(self.compute, PagedCompute) else None

    async def close(self) -> None:
        """Nothing is being computed."""
        if isinstance(self.compute, PagedCompute):
            await self.compute.close()
        else:
            self.compute.close()


async def open_program(
    network: NetworkConfig,
    node: NodeConfig,
    weights: Weights,
    compute: Compute[Program],
    *,
    n_threads: int,
    kv_cache: FloatType = FloatType.F32,
    model: ModelFile | None = None,
    paging: PagingSettings | None = None,
) -> NodeProgram:
    """Compile, off the loop.

    Args:
        weights: where they are: in memory, or in the model's file.
        compute: open; stays the caller's.
        kv_cache: F32, F16 or Q80.
        model: the file that `weights` lie in; None where they are in memory.
        paging: the room for part of them; None where all of them are in place.

    Raises:
        GraphError: something of the graph cannot be computed.
        EngineError: the file is another one by now, or cannot be read.
        LimitError: there is less room than the least that works.
    """
    if model is None or paging is None:
        files = [file for file in dict.fromkeys((model, weights.matmul_file)) if file is not None]
        for file in files:
            file.ask_for_huge_pages()
        program = await in_thread("compile", lambda: compile_program(network, node, weights, n_threads=n_threads, kv_cache=kv_cache))
        return NodeProgram(program, ResidentCompute(compute, program.n_segments, files))
    pager = await open_paged(network, node, weights, model, paging, compute, n_threads=n_threads, kv_cache=kv_cache)
    return NodeProgram(pager.program, pager)
