"""A disk that fails, as the system has it: a file system on a loop device whose end is cut off. Needs root and loop devices."""

import contextlib
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from dairllm.engine.executor import Executor
from dairllm.engine.program import Program
from dairllm.engine.weights import FileWeights
from dairllm.errors import EngineError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import small_spec, write_random_model
from dairllm.graph.build import build_graph
from dairllm.paging.needs import IoMode, PagingSettings, weights_needs
from dairllm.runtime.compute import Compute
from dairllm.runtime.local_node import LocalNode, default_sync
from tests.patience import PATIENCE

DISK_BYTES, LEFT_BYTES = 64 << 20, 12 << 20
BLOCK = 64 << 10


def done(*words: object) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, timeout=PATIENCE).stdout.strip()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder on a disk of its own, and the file that holds the disk."""
    image, folder = tmp_path / "disk", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    with contextlib.ExitStack() as stack:
        try:
            device = done("losetup", "--find", "--show", image)
            stack.callback(subprocess.run, ["losetup", "--detach", device], capture_output=True)
            done("mkfs.ext4", "-q", device)
            done("mount", device, folder)
            stack.callback(subprocess.run, ["umount", "--lazy", str(folder)], capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no disk can be made here: {error}")
        yield folder, image


@pytest.mark.parametrize("io_mode", ["mmap", "buffered", "direct"])
async def test_a_disk_that_fails_fails_the_pass_and_says_so(io_mode: IoMode, disk: tuple[Path, Path]) -> None:
    folder, image = disk
    path = folder / "m.m"
    write_random_model(path, small_spec(dim=512, n_heads=8, n_kv_heads=8, hidden_dim=4096, n_layers=6))
    os.sync()
    with Executor(1) as executor, ModelFile.open(path) as model:
        compute: Compute[Program] = Compute(executor, math.inf)
        compute.open()
        network, (graph,) = build_graph(model.spec, 1, default_sync(model.spec.weight_type), 32)
        needs = weights_needs(network, graph, FileWeights(model), block_bytes=BLOCK)
        paging = PagingSettings(needs.streaming_blocks_min + 2, io_mode=io_mode, readers=1, block_bytes=BLOCK)
        node = LocalNode(model, compute, n_threads=1, rows=32, paging=paging)
        await node.open()
        expected = np.array(await node.feed([1], 0, logits=True))
        os.truncate(image, LEFT_BYTES)
        for _ in range(2):
            with pytest.raises(EngineError, match=r"m\.m, bytes \d+ to \d+ cannot be read: Input/output error"):
                await node.feed([1], 0, logits=True)
        assert expected.any()
        await node.close()
        compute.close()
