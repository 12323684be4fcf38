"""The real C++ root with our workers: the same text as with its own. Needs the program: DAIRLLM_TEST_DLLAMA=/path/to/dllama pytest.

Its faults are worked around: `--net-turbo 0`, since its nodes poll; its workers are not probed, since that ends
them; and both runs use the same binary and prompt, since some builds feed a wrong last token.
"""

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.graph.model import ModelSpec
from dairllm.graph.types import FloatType

DLLAMA = os.environ.get("DAIRLLM_TEST_DLLAMA", "")
DATA = Path(__file__).parents[1] / "data" / "dllama"
PROMPT = "the cat sat on the mat and the other cat is here on it"

pytestmark = pytest.mark.skipif(not DLLAMA, reason="DAIRLLM_TEST_DLLAMA names no C++ program")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody listens on a port, found without connecting to it."""
    return any(
        line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
    )


@pytest.fixture
def cpp_worker() -> Iterator[Any]:
    """Starts a C++ worker; gives its port."""
    made: list[subprocess.Popen[bytes]] = []

    async def start() -> int:
        port = free_port()
        arguments = [DLLAMA, "worker", "--port", str(port), "--nthreads", "1", "--net-turbo", "0"]
        made.append(subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))  # noqa: ASYNC220 - returns at once
        async with asyncio.timeout(10):
            while not listens(port):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.02)
        return port

    yield start
    for process in made:
        process.kill()
        process.wait(10)


async def generate(model: Path, tokenizer: Path, sync: str, ports: list[int], steps: int = 64) -> list[str]:
    """What the C++ root prints for each token that it generates."""
    process = await asyncio.create_subprocess_exec(
        *(DLLAMA, "inference", "--model", str(model), "--tokenizer", str(tokenizer), "--prompt", PROMPT, "--steps", str(steps)),
        *("--nthreads", "1", "--buffer-float-type", sync, "--net-turbo", "0", "--temperature", "0"),
        *("--workers", *(f"127.0.0.1:{port}" for port in ports)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(60):
            out, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    text = out.decode(errors="replace")
    assert process.returncode == 0, text
    pieces = re.findall(r"Pred .*?\| (.*)", text)
    assert len(pieces) > 10
    return pieces


def random_model(folder: Path, n_nodes: int, **changes: Any) -> tuple[Path, Path]:
    spec: ModelSpec = small_spec(
        dim=32 * n_nodes, n_heads=n_nodes, n_kv_heads=n_nodes, hidden_dim=64 * n_nodes, vocab_size=108 * n_nodes, **changes
    )
    model, tokenizer = folder / "random.m", folder / "random.t"
    write_random_model(model, spec, seed=5)
    vocabulary: TokenizerFile = byte_vocabulary(spec.vocab_size)
    vocabulary.write(tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("name", ["llama_f32", "llama_q40", "llama31_q40", "qwen3_q40"])
async def test_two_nodes(make_worker: Any, cpp_worker: Any, name: str) -> None:
    model, sync = DATA / f"{name}.m", "f32" if name.endswith("f32") else "q80"
    expected = await generate(model, DATA / "tiny.t", sync, [await cpp_worker()])
    worker = await make_worker()
    for _ in range(2):  # root after root
        found = await generate(model, DATA / "tiny.t", sync, [worker.port])
        if sync == "f32":
            assert found == expected
        else:
            assert found[:1] == expected[:1]  # sums in another order part at a near tie
    assert worker.meters.sessions == {"finished": 2}


@pytest.mark.parametrize("n_nodes", [3, 4])
async def test_a_mesh_of_our_workers(make_worker: Any, cpp_worker: Any, tmp_path: Path, n_nodes: int) -> None:
    model, tokenizer = random_model(tmp_path, n_nodes, weight_type=FloatType.F32)
    expected = await generate(model, tokenizer, "f32", [await cpp_worker() for _ in range(n_nodes - 1)])
    workers = [await make_worker() for _ in range(n_nodes - 1)]
    for _ in range(2):
        assert await generate(model, tokenizer, "f32", [worker.port for worker in workers]) == expected


@pytest.mark.parametrize("ours", [{0}, {1}, {2}, {0, 2}, {0, 1}, {1, 2}])
async def test_a_mesh_of_both_kinds(make_worker: Any, cpp_worker: Any, tmp_path: Path, ours: set[int]) -> None:
    model, tokenizer = random_model(tmp_path, 4, weight_type=FloatType.F32)
    expected = await generate(model, tokenizer, "f32", [await cpp_worker() for _ in range(3)])
    ports = [(await make_worker()).port if index in ours else await cpp_worker() for index in range(3)]
    assert await generate(model, tokenizer, "f32", ports) == expected
