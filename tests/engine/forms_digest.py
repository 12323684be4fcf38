"""Logits of models as digests, with one form of the kernels: in batches and alone, with weights in place and paged, with each KV cache.

    python -m tests.engine.forms_digest FORM [--numba] [MODEL.m...] [--in-place MODEL.m...]

Models after --in-place are not paged, which is quick. --numba has the kernels compiled in this process, as where their object code cannot
be loaded. Prints {model: {type of the KV cache: [digests]}}: one digest wherever threads, batches and paging made no difference, which is
how it must be.
"""

import asyncio
import hashlib
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from dairllm.engine import ops
from dairllm.engine.executor import Executor
from dairllm.engine.weights import FileWeights
from dairllm.formats.model_file import ModelFile
from dairllm.graph.build import build_graph
from dairllm.graph.model import ModelSpec
from dairllm.graph.types import BLOCK_VALUES, FloatType
from dairllm.kernels import forms
from dairllm.kernels.objects import entry
from dairllm.kernels.objects.loader import ObjectCodeError
from dairllm.paging import needs as paging_needs
from dairllm.paging import schedule
from dairllm.paging.needs import PagingSettings, weights_needs
from dairllm.runtime import paged_compute
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode, default_sync

DATA = Path(__file__).parent.parent / "data"
THREADS = (1, 2, 3)
CLAIMED_BYTES = {1: 0, 2: ops.CLAIMED_BYTES, 3: 0}
"""By threads: all outputs of matmuls claimed, or, of so small a model, all dealt."""
LENGTH = 40
ALONE = [1] * LENGTH


def use_small_blocks(path: Path) -> int:
    """Blocks, and pieces of matrices, of which a small model has as many as a large one has of the usual size. Returns a block's bytes."""
    block_bytes = 1 << max(12, (path.stat().st_size // 16).bit_length() - 1)
    if block_bytes >= paging_needs.BLOCK_BYTES:
        return paging_needs.BLOCK_BYTES
    for module, name in ((paged_compute, "PIECE_BYTES"), (paging_needs, "PIECE_BYTES"), (schedule, "UNIT_BYTES")):
        setattr(module, name, 2 * block_bytes)
    paging_needs.STREAMING_BYTES = 6 * block_bytes
    return block_bytes


def cache_types(spec: ModelSpec) -> tuple[FloatType, ...]:
    """As which the KV cache of a model can be kept."""
    return (FloatType.F32, FloatType.F16, FloatType.Q80)[: 3 if spec.head_dim % BLOCK_VALUES == 0 else 2]


def settings(model: ModelFile, n_threads: int, block_bytes: int) -> Iterator[tuple[FloatType, PagingSettings | None, list[list[int]]]]:
    """(KV cache, room, sizes of batches): all weights in place; and, with each number of threads another, the least room that works or half
    of what there is, and an I/O mode.

    Rows that come alone read all weights again, which takes its time: paged, all 40 do so with one kind of cache.
    """
    network, (node,) = build_graph(model.spec, 1, default_sync(model.spec.weight_type), LENGTH)
    needs = weights_needs(network, node, FileWeights(model), block_bytes=block_bytes)
    rooms = needs.streaming_blocks_min, (needs.streaming_blocks_min + needs.blocks_total) // 2
    assert rooms[0] < rooms[1] < needs.blocks_total
    io_mode = paging_needs.IO_MODES[n_threads % 3]
    for number, kind in enumerate(cache_types(model.spec), n_threads):
        yield kind, None, [[LENGTH], [7, 33], [38, 2], ALONE]
        room = PagingSettings(rooms[number % 2], io_mode=io_mode, readers=1 + n_threads % 2, block_bytes=block_bytes, threads=n_threads)
        yield kind, room, [[LENGTH], [7, 33], ALONE if kind == FloatType.F32 else [33, *[1] * 7]]


async def digests(path: Path, tokens: Sequence[int], in_place: bool) -> dict[str, list[str]]:
    """By the type of the KV cache, of the logits after all tokens."""
    found: dict[str, set[str]] = defaultdict(set)
    block_bytes = use_small_blocks(path)
    with ModelFile.open(path) as model:
        for n_threads in THREADS:
            ops.CLAIMED_BYTES = CLAIMED_BYTES[n_threads]
            with Executor(n_threads) as executor:
                for kind, room, batches in settings(model, n_threads, block_bytes):
                    if room is not None and in_place:
                        continue
                    node = LocalNode(model, Compute(executor, math.inf), n_threads=n_threads, kv_cache=kind, paging=room)
                    await node.open()
                    for sizes in batches:
                        at = 0
                        for size in sizes:
                            logits = await node.feed(tokens[at : at + size], at, logits=True)
                            at += size
                        found[kind.name].add(hashlib.sha256(logits.tobytes()).hexdigest()[:16])
                    assert node.paging is None or node.paging.metrics.bytes > model.nbytes, "what had gone came again"
                    await node.close()
    return {kind: sorted(values) for kind, values in found.items()}


def tokens_of(name: str) -> list[int]:
    """The golden ids of a fixture; ids that any vocabulary has for all other models."""
    golden = json.loads((DATA / "dllama" / "golden.json").read_text())["models"]
    if name in golden:
        return (golden[name]["prompt_ids"] + golden[name]["generated_ids_1_node"])[:LENGTH]
    return [(7 * i * i + 3 * i) % 97 for i in range(LENGTH)]


def refuse_object_code() -> None:
    def refused(*_: object) -> None:
        raise ObjectCodeError("this test has none")

    entry.ObjectCode = refused  # type: ignore[assignment,misc] # as where it cannot be loaded


def main(form: str, *words: str) -> None:
    forms.select(form)
    in_place, result = False, {}
    for word in words:
        if word == "--numba":
            refuse_object_code()
        elif word == "--in-place":
            in_place = True
        else:
            path = Path(word)
            result[path.stem] = asyncio.run(digests(path, tokens_of(path.stem), in_place))
    assert ("numba" in sys.modules) == ("--numba" in words), "who computed it"
    print(json.dumps(result))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main(*sys.argv[1:])
