"""What a node of a cluster reads for one pass of its share, and how long that takes, by the file that it reads.

    python benchmarks/shares.py --model F.m [--nodes 2 4] [--rounds 3]

Of the last node: whole blocks of the model's file around all slices, of 2 MiB and of 512 KiB; the slices' own bytes, of columns row by row;
columns in a file of their own, the rest in blocks of the model's; the node's share in a file of its own (`dairllm prepare`, written first).
Nothing is in memory before, and nothing stays. Bytes from the disk are what the system counts for this process.
"""

import argparse
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dairllm.bench.pure_read import forget, read_file
from dairllm.engine.located_weights import LocatedWeights
from dairllm.engine.pieces import PIECE_BYTES, segment_pieces
from dairllm.engine.weights import Weights, WeightsFile
from dairllm.formats.digest import model_digests
from dairllm.formats.model_file import ModelFile
from dairllm.formats.model_layout import Slice
from dairllm.formats.share_file import ShareFile
from dairllm.formats.share_writer import ShareWriter
from dairllm.graph.build import build_network, build_node
from dairllm.graph.references import weight_references
from dairllm.graph.slicing import Axis, deal_shares, nearly_equal_sizes
from dairllm.graph.types import FloatType, NodeConfig, OpCode
from dairllm.paging.needs import BLOCK_BYTES
from dairllm.paging.read_mode import probe_read_mode
from dairllm.paging.schedule import blocks_of

STREAMING = 16 * BLOCK_BYTES
READERS = 2
COLUMNS = ("block_matmul_wo", "block_matmul_w2")


def blocks(node: NodeConfig, weights: Weights, size: int, but: Sequence[str] = ()) -> list[int]:
    """Of one pass, in its order."""
    segments = [type(segment)(ops=tuple(op for op in segment.ops if op.name not in but), syncs=segment.syncs) for segment in node.segments]
    kept = type(node)(node.node, node.buffers, tuple(segments))
    pieces = (piece for group in segment_pieces(kept, weights, PIECE_BYTES) for piece in group)
    return list(dict.fromkeys(blocks_of((span for piece in pieces for span in piece.spans), size)))


def strided(path: Path, slices: Iterable[Slice]) -> None:
    """Only the slices' bytes, through the page cache, slice after slice; the page cache forgets them."""
    waiting = iter(list(slices))
    lock = threading.Lock()
    fd = os.open(path, os.O_RDONLY)

    def read() -> None:
        room = memoryview(bytearray(PIECE_BYTES))
        while True:
            with lock:
                piece = next(waiting, None)
            if piece is None:
                return
            together = piece.slice_row_bytes == piece.stride
            length = min(PIECE_BYTES, piece.nbytes) if together else piece.slice_row_bytes
            for number in range(-(-piece.nbytes // length)):
                os.preadv(fd, [room[:length]], piece.offset + number * (length if together else piece.stride))
            os.posix_fadvise(fd, piece.offset, piece.n_rows * piece.stride, os.POSIX_FADV_DONTNEED)

    threads = [threading.Thread(target=read) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)


def disk_bytes() -> int:
    counted = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counted["read_bytes"])


def timed(read: Callable[[], object], files: Iterable[Path]) -> tuple[float, int]:
    """(seconds, bytes from the disk)."""
    for path in files:
        forget(path)
    before, begun = disk_bytes(), time.perf_counter()
    read()
    return time.perf_counter() - begun, disk_bytes() - before


def measure(model: ModelFile, n_nodes: int, rounds: int) -> None:
    number = n_nodes - 1
    shares = deal_shares(model.spec, nearly_equal_sizes(model.spec, n_nodes))
    node = build_node(model.spec, build_network(model.spec, shares, FloatType.Q80), number, shares[number])
    references = weight_references(model.spec, shares[number], node)
    writer = ShareWriter(model, model_digests(model).identity, number, n_nodes, shares[number])
    begun = time.perf_counter()
    prepared = writer.prepare()
    print(f"node {number} of {n_nodes}: share of {prepared.nbytes / 1e6:.0f} MB {prepared.state} in {time.perf_counter() - begun:.1f} s")
    share = ShareFile.open(prepared.path)
    share.locate(model)
    here, apart = LocatedWeights(model, node, references), LocatedWeights(model, node, references, share)
    located = [here.located(op.name, op.index) for segment in node.segments for op in segment.ops if op.code == OpCode.MATMUL]
    slices = [
        piece for weight in located if weight is not None for expert in range(len(weight.tensors)) for piece in weight.slices_of(expert)
    ]
    columns = sum(weight.nbytes for weight in located if weight is not None and weight.axis is Axis.COLUMNS)

    modes = {
        size: (probe_read_mode(model.path, model.stamp, size), probe_read_mode(share.path, share.stamp, size))
        for size in (BLOCK_BYTES, 512 << 10)
    }

    def read_blocks(file: WeightsFile, wanted: Sequence[int], size: int) -> None:
        read_file(file, wanted, modes[size][file is share], size, STREAMING // size)  # type: ignore[arg-type]  # of any file

    def columns_apart() -> None:
        read_blocks(model, blocks(node, here, BLOCK_BYTES, COLUMNS), BLOCK_BYTES)
        read_blocks(share, range(-(-columns // BLOCK_BYTES)), BLOCK_BYTES)

    small = 512 << 10
    kinds: dict[str, Callable[[], object]] = {
        "model, blocks of 2 MiB": lambda: read_blocks(model, blocks(node, here, BLOCK_BYTES), BLOCK_BYTES),
        "model, blocks of 512 KiB": lambda: read_blocks(model, blocks(node, here, small), small),
        "model, the slices' bytes": lambda: strided(model.path, slices),
        "columns in a file": columns_apart,
        "share in a file": lambda: read_blocks(share, blocks(node, apart, BLOCK_BYTES), BLOCK_BYTES),
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    read: dict[str, int] = {}
    for _ in range(rounds):
        for kind, way in kinds.items():
            took, read[kind] = timed(way, [model.path, share.path])
            seconds[kind].append(took)
    for kind in kinds:
        figures = {"nodes": n_nodes, "read": kind, "mb": round(read[kind] / 1e6), "ms": round(statistics.median(seconds[kind]) * 1e3, 1)}
        figures["ms_all"] = [round(took * 1e3) for took in seconds[kind]]
        print(json.dumps(figures), flush=True)
    print({size >> 10: [f"{mode.io_mode}, {mode.readers}" for mode in pair] for size, pair in modes.items()})
    share.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with ModelFile.open(options.model) as model:
        for n_nodes in options.nodes:
            measure(model, n_nodes, options.rounds)


if __name__ == "__main__":
    main()
