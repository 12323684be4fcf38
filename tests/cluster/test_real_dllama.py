"""The real C++ program. Its root with our workers: the same text as with its own. Our root with its workers: one node's ids.

Needs the program: DAIRLLM_TEST_DLLAMA=/path/to/dllama pytest.

Its faults are worked around: `--net-turbo 0`, since its nodes poll; its workers are not probed, since that ends
them; and both runs use the same binary and prompt, since some builds feed a wrong last token.
"""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dairllm.cluster.cluster import Cluster
from dairllm.config import WorkerAddress
from dairllm.engine.program import Program
from dairllm.errors import ConfigError, NetworkError
from dairllm.formats.model_file import ModelFile
from dairllm.formats.random_model import byte_vocabulary, small_spec, write_random_model
from dairllm.formats.tokenizer_file import TokenizerFile
from dairllm.graph.model import Architecture, ModelSpec
from dairllm.graph.slicing import parse_shares
from dairllm.graph.types import FloatType
from dairllm.runtime.compute import Compute
from dairllm.units import parse_size
from tests.cluster.clusters import ids_of, one_node
from tests.commands.node_process import WorkerProcess
from tests.patience import PATIENCE

DLLAMA = os.environ.get("DAIRLLM_TEST_DLLAMA", "")
DATA = Path(__file__).parents[1] / "data" / "dllama"
GOLDEN = json.loads((DATA / "golden.json").read_text())["models"]
NEAR_TIE = 0.15
"""Logits that differ by less may change places where partial sums are rounded on the wire."""
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
def cpp_processes() -> list[subprocess.Popen[bytes]]:
    """The C++ workers that a test has started."""
    return []


@pytest.fixture
def cpp_worker(cpp_processes: list[subprocess.Popen[bytes]]) -> Iterator[Any]:
    """Starts a C++ worker; gives its port."""
    made = cpp_processes

    async def start() -> int:
        async with asyncio.timeout(PATIENCE):
            while True:
                port = free_port()
                arguments = [DLLAMA, "worker", "--port", str(port), "--nthreads", "1", "--net-turbo", "0"]
                process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: ASYNC220 - returns at once
                made.append(process)
                while process.poll() is None:  # else somebody else has taken the port meanwhile
                    if listens(port):
                        return port
                    await asyncio.sleep(0.02)

    yield start
    for process in made:
        process.kill()
        process.wait(PATIENCE)


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
        async with asyncio.timeout(PATIENCE):
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
    assert worker.metrics.sessions == {"finished": 2}


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


# A worker with a model of its own: what the C++ root sends is compared, and dropped


@pytest.mark.parametrize("name", GOLDEN)
async def test_a_worker_with_the_model_under_their_root(make_worker: Any, name: str, logged: Any) -> None:
    model, sync = DATA / f"{name}.m", "f32" if name.endswith("f32") else "q80"
    found = [await generate(model, DATA / "tiny.t", sync, [(await make_worker(own=own)).port]) for own in (None, model)]
    assert found[0] == found[1]
    (compared,) = (entry for entry in logged if entry["event"] == "weights compared with the own model")
    assert parse_size(compared["held"]) < parse_size(compared["size"]) / 2, "columns alone are copied together"


async def test_their_root_over_a_mesh_of_workers_with_and_without_the_model(make_worker: Any, cpp_worker: Any, tmp_path: Path) -> None:
    model, tokenizer = random_model(tmp_path, 4, weight_type=FloatType.F32)
    expected = await generate(model, tokenizer, "f32", [await cpp_worker() for _ in range(3)])
    ports = [(await make_worker(own=model)).port, await cpp_worker(), (await make_worker()).port]
    for _ in range(2):
        assert await generate(model, tokenizer, "f32", ports) == expected


async def test_their_roots_weights_take_little_memory_where_they_are_here(tmp_path: Path) -> None:
    """Two processes, one with the model: what each comes to hold of its own, sampled while the root sends and asks."""
    spec = small_spec(dim=1024, n_heads=8, n_kv_heads=8, head_dim=128, hidden_dim=8192, n_layers=8, vocab_size=320)
    model, tokenizer = tmp_path / "m.m", tmp_path / "m.t"
    write_random_model(model, spec, seed=5)
    byte_vocabulary(spec.vocab_size).write(tokenizer)
    share = model.stat().st_size // 2
    held, pieces = [], []
    for arguments in (["--model", str(model)], []):
        worker = WorkerProcess(tmp_path / f"{len(held)}.log", *arguments)
        try:
            port = await asyncio.to_thread(lambda worker=worker: worker.port)
            before, generating = anonymous_bytes(worker), asyncio.create_task(generate(model, tokenizer, "q80", [port]))
            most = before
            while not generating.done():
                most = max(most, anonymous_bytes(worker))
                await asyncio.sleep(0.01)
            pieces.append(await generating)
            held.append(most - before)
        finally:
            worker.process.kill()
            worker.process.wait(PATIENCE)
    assert pieces[0] == pieces[1]
    assert held[1] > share * 0.9
    assert held[0] < share * 0.55, "columns alone are copied together"


def anonymous_bytes(worker: WorkerProcess) -> int:
    """Memory of a process that is no file's."""
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")) * 1024


@pytest.mark.parametrize("tensor", [("block_matmul_w2", 1), ("block_matmul_k", 0), ("final_matmul_logits", 0)])
async def test_a_file_that_differs_from_their_roots_ends_the_session(
    make_worker: Any, cpp_worker: Any, tmp_path: Path, logged: Any, tensor: tuple[str, int]
) -> None:
    own = tmp_path / "own.m"
    raw = bytearray((DATA / "llama_q40.m").read_bytes())
    with ModelFile.open(DATA / "llama_q40.m") as model:
        place = model.tensor(*tensor)
    raw[place.offset + place.nbytes - 1] ^= 1
    own.write_bytes(raw)
    worker = await make_worker(own=own)
    with pytest.raises(AssertionError):  # it says what went wrong there, and ends
        await generate(DATA / "llama_q40.m", DATA / "tiny.t", "q80", [worker.port])
    (failed,) = (entry for entry in logged if entry["event"] == "session failed")
    assert failed["kind"] == "FormatError"
    assert f"{own}, byte {place.offset + place.nbytes - 1}: expected what the root sends of {place.label}" in failed["error"]
    own.write_bytes((DATA / "llama_q40.m").read_bytes())  # mended, and taken from the wire until the worker starts again
    assert len(await generate(DATA / "llama_q40.m", DATA / "tiny.t", "q80", [worker.port])) > 10


# Our root


async def test_our_root_over_a_worker_with_the_model_beside_one_of_theirs(
    make_worker: Any, cpp_worker: Any, compute: Compute[Program], tmp_path: Path
) -> None:
    """Heads that lie apart in the file among them."""
    spec = small_spec(weight_type=FloatType.F32, n_heads=9, n_kv_heads=3, dim=144, head_dim=16, hidden_dim=192, vocab_size=322)
    write_random_model(tmp_path / "m.m", spec, seed=4)
    expected = await one_node(tmp_path / "m.m", compute, IDS, 12)
    with_model = [(await make_worker(own=tmp_path / "m.m")).port for _ in range(2)]
    for ports in ([with_model[0], await cpp_worker(), with_model[1]], [await cpp_worker(), *with_model]):
        async with our_root(compute, tmp_path / "m.m", ports, "4/32,2/64,2/32,1/64") as cluster:
            assert [node.weight_bytes_sent == 0 for node in cluster.nodes[1:]] == [port in with_model for port in ports]
            assert await ids_of(cluster, IDS, 12) == expected


@contextlib.asynccontextmanager
async def our_root(compute: Compute[Program], path: Path, ports: Sequence[int], shares: str | None = None) -> AsyncIterator[Cluster]:
    """Open, over the workers at these ports."""
    sizes = None if shares is None else parse_shares(shares)
    with ModelFile.open(path) as model:
        cluster = Cluster(model, [WorkerAddress("127.0.0.1", port) for port in ports], compute, n_threads=1, sizes=sizes)
        try:
            async with asyncio.timeout(PATIENCE):
                await cluster.open()
            yield cluster
        finally:
            await cluster.close()


IDS = [(7 * place + 3) % 320 for place in range(37)]
"""A prompt of two batches."""
KINDS: dict[str, Callable[[int], bool]] = {
    "dllama": lambda _: True,
    "both": lambda node: node % 2 == 1,
    "both, ours first": lambda node: node % 2 == 0,
}
"""Which nodes are of the C++ kind."""


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    ("heads", "n_nodes", "shares"),
    [
        ((6, 2), 2, None),
        ((6, 2), 2, "4/64,2/128"),
        ((6, 2), 3, None),
        ((6, 2), 3, "1/32,4/96,1/64"),
        ((6, 2), 4, None),
        ((6, 2), 4, "2/32,1/96,2/32,1/32"),
        ((6, 2), 5, None),
        ((9, 3), 2, None),
        ((9, 3), 2, "7/32,2/160"),
        ((9, 3), 3, None),
        ((9, 3), 3, "1/64,5/64,3/64"),
        ((9, 3), 4, None),
        ((9, 3), 4, "4/32,2/64,2/32,1/64"),
        ((9, 3), 5, None),
        ((9, 3), 5, "1/32,3/32,2/32,2/64,1/32"),
    ],
)
async def test_our_root_finds_one_nodes_ids_over_any_nodes(
    make_worker: Any,
    cpp_worker: Any,
    compute: Compute[Program],
    tmp_path: Path,
    heads: tuple[int, int],
    n_nodes: int,
    shares: str | None,
    kinds: str,
) -> None:
    """Equal shares and others, also of nodes that part a KV head's group; 322 classifier rows, which hardly any number divides."""
    n_heads, n_kv_heads = heads
    spec = small_spec(
        weight_type=FloatType.F32, n_heads=n_heads, n_kv_heads=n_kv_heads, dim=144, head_dim=16, hidden_dim=192, vocab_size=322
    )
    write_random_model(tmp_path / "m.m", spec, seed=4)
    foreign = [KINDS[kinds](node) for node in range(1, n_nodes)]
    ports = [await cpp_worker() if cpp else (await make_worker()).port for cpp in foreign]
    expected = await one_node(tmp_path / "m.m", compute, IDS, 12)
    for _ in range(2):  # root after root
        async with our_root(compute, tmp_path / "m.m", ports, shares) as cluster:
            assert [node.kind for node in cluster.nodes] == ["dairllm"] + ["dllama" if cpp else "dairllm" for cpp in foreign]
            assert [node.heads for node in cluster.nodes] == [size.heads for size in parse_shares(shares)] if shares else True
            assert await ids_of(cluster, IDS, 12) == expected


@pytest.mark.parametrize("name", GOLDEN)
async def test_our_root_over_a_worker_of_theirs_finds_the_golden_ids(cpp_worker: Any, compute: Compute[Program], name: str) -> None:
    golden = GOLDEN[name]
    prompt, ids = golden["prompt_ids"], golden["generated_ids_2_node"]
    async with our_root(compute, DATA / f"{name}.m", [await cpp_worker()]) as cluster:
        if name == "llama_f32":
            assert await ids_of(cluster, prompt, len(ids)) == ids
        # where partial sums are rounded on the wire, ids may part at a near tie: step by step along the golden ones
        fed = [*prompt, *ids[:-1]]
        logits = None
        for position, token in enumerate(fed):
            wanted = position >= len(prompt) - 1
            logits = await cluster.feed([token], position, logits=wanted)
            if logits is not None:
                best, expected = float(np.max(logits)), ids[position - len(prompt) + 1]
                assert int(np.argmax(logits)) == expected or best - logits[expected] < NEAR_TIE
        assert [node.kind for node in cluster.nodes] == ["dairllm", "dllama"]


@pytest.mark.parametrize("theirs", [1, 2])
@pytest.mark.parametrize(
    ("arch", "weight_type", "problem"),
    [
        (Architecture.LLAMA, FloatType.Q80, "given q80: make the model again with `dairllm convert SOURCE OUT.m --weights q40`"),
        (Architecture.QWEN3_MOE, FloatType.F32, "experts with Q40 weights alone .*: make the model again with `dairllm convert"),
    ],
)
async def test_workers_of_theirs_are_sent_nothing_that_ends_them(
    make_worker: Any,
    cpp_worker: Any,
    cpp_processes: list[subprocess.Popen[bytes]],
    compute: Compute[Program],
    tmp_path: Path,
    theirs: int,
    arch: Architecture,
    weight_type: FloatType,
    problem: str,
) -> None:
    """The error says how to convert; the worker lives on, and serves the next root."""
    changes = {"n_heads": 3, "n_kv_heads": 3, "dim": 96, "head_dim": 32, "moe_hidden_dim": 96 if arch == Architecture.QWEN3_MOE else 0}
    write_random_model(tmp_path / "refused.m", small_spec(arch, weight_type, **changes))
    write_random_model(tmp_path / "m.m", small_spec(weight_type=FloatType.F32))
    port = await cpp_worker()
    ports = [port if node == theirs else (await make_worker()).port for node in (1, 2)]
    with pytest.raises(ConfigError, match=rf"worker 127.0.0.1:{port} \(node {theirs}\).*{problem}"):
        async with our_root(compute, tmp_path / "refused.m", ports):
            pass
    await lives_on(cpp_processes, compute, tmp_path / "m.m", ports)


async def test_a_worker_that_cannot_be_reached_is_named_and_those_of_theirs_live_on(
    cpp_worker: Any, cpp_processes: list[subprocess.Popen[bytes]], compute: Compute[Program], tmp_path: Path
) -> None:
    write_random_model(tmp_path / "m.m", small_spec(weight_type=FloatType.F32))
    ports, nobody = [await cpp_worker(), await cpp_worker()], free_port()
    with pytest.raises(NetworkError, match=rf"^worker 127.0.0.1:{nobody} \(node 2\) cannot be reached"):
        async with our_root(compute, tmp_path / "m.m", [ports[0], nobody, ports[1]]):
            pass
    await lives_on(cpp_processes, compute, tmp_path / "m.m", ports)


async def lives_on(processes: list[subprocess.Popen[bytes]], compute: Compute[Program], path: Path, ports: list[int]) -> None:
    assert [process.poll() for process in processes] == [None] * len(processes)
    expected = await one_node(path, compute, IDS, 4)
    async with our_root(compute, path, ports) as cluster:
        assert await ids_of(cluster, IDS, 4) == expected
