"""A root that asks a worker for the largest graph there can be."""

import contextlib
import dataclasses
import socket
import threading
from pathlib import Path

from dairllm.protocol.dllama.codec import Greeting, encode_ack, encode_greeting, encode_network, encode_node
from dairllm.protocol.dllama.limits import Limits
from tests.commands.node_process import WorkerProcess
from tests.commands.test_worker_process import ACK, ask
from tests.engine.test_large_graphs import activations
from tests.patience import PATIENCE


def test_a_worker_answers_others_while_it_is_configured(tmp_path: Path) -> None:
    network, node = activations(Limits().max_buffers)
    assert sum(len(segment.ops) for segment in node.segments) == Limits().max_ops
    worker = WorkerProcess(tmp_path / "log", "--memory-limit", "1GiB")
    configured = threading.Event()
    answered = 0
    try:
        with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as root:
            root.settimeout(PATIENCE)
            for said in (encode_greeting(Greeting(1, 0, ())), encode_ack() + encode_network(dataclasses.replace(network, n_nodes=2))):
                root.sendall(said)
                assert root.recv(4) == ACK
            root.sendall(encode_node(dataclasses.replace(node, node=1)))

            def await_word() -> None:
                if root.recv(4) == ACK:
                    configured.set()

            waiting = threading.Thread(target=await_word)
            waiting.start()
            while waiting.is_alive():
                assert ask(worker.metrics_port, "/readyz")[0] == 200
                with socket.create_connection(("127.0.0.1", worker.port), PATIENCE) as other:
                    other.settimeout(PATIENCE)
                    with contextlib.suppress(ConnectionResetError):
                        assert other.recv(1) == b""  # a root is being served
                answered += 1
            waiting.join()
        assert configured.is_set(), worker.text()
        assert answered > 1
        assert worker.stop()[0] == 0
    finally:
        worker.end()
