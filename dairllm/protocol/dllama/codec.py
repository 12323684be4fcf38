"""Every message of the distributed-llama protocol, both sides: `encode_*` gives bytes, `read_*` is a parser for a stream,
`decode_*` the same parser for bytes in hand.

The wire has no frames: who speaks next and how much is known from what was said before (``worker.py`` is that knowledge).

    root -> worker   greeting, go, network, node, (weight header, its bytes)*, end of weights, (control, pipe rows)*, stop
    worker -> root   ACK after greeting, network, node, end of weights; pipe rows

Decoders raise RemoteProtocolError, encoders LocalProtocolError.
"""

import struct
from dataclasses import dataclass

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.types import Buffer, NetworkConfig, NodeConfig, Pipe, Segment, Size, Sync, SyncType
from dairllm.protocol.dllama.fields import (
    ACK,
    SIZE,
    U32,
    bounded,
    enum_of,
    read_ack,
    read_string,
    read_u32,
    size_of,
    string_of,
    write_size,
    write_string,
)
from dairllm.protocol.dllama.limits import DEFAULT_LIMITS, Limits
from dairllm.protocol.dllama.ops import read_op, write_op
from dairllm.protocol.stream import Need, Parser, parse_all

__all__ = [
    "ACK",
    "HELLO",
    "HELLO_1",
    "KIN",
    "MARKER",
    "MAX_REASON_BYTES",
    "REFUSAL",
    "Control",
    "Greeting",
    "Peer",
    "WeightHeader",
    "decode_ack",
    "decode_control",
    "decode_greeting",
    "decode_network",
    "decode_node",
    "decode_weight_header",
    "encode_ack",
    "encode_control",
    "encode_greeting",
    "encode_network",
    "encode_node",
    "encode_refusal",
    "encode_stop",
    "encode_weight_header",
    "encode_weights_end",
    "read_ack",
    "read_control",
    "read_greeting",
    "read_network",
    "read_node",
    "read_weight_header",
]

KIN = b"dairllm/"
MARKER = KIN + b"2"
"""What a root of ours puts behind the NUL of a pipe's name: the version that it speaks. A worker that knows no such version answers with
the latest that it knows."""

HELLO = b"dai2"
"""A worker of ours answers a network configuration marked by its `KIN` with this word in place of the ACK, and with the identity of the
model that it has (``graph.references``)."""

HELLO_1 = b"dai1"
"""Its word to a root of version 1, or that of a worker of version 1: nothing follows, models are not spoken of."""

REFUSAL = b"dai?"
"""In place of the ACK to a node configuration, said to a root of ours by a worker that cannot do its part; the reason follows."""

MAX_REASON_BYTES = 2048

_PAIR = struct.Struct("<II")
_NETWORK = struct.Struct("<III")  # batches, nodes, pipes
_NODE = struct.Struct("<III")  # node number, buffers, segments
_WEIGHT = struct.Struct("<IQQ")  # layer, offset, bytes
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Peer:
    """Where another worker listens."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Greeting:
    """A root's first words: how many workers there are, which of them this one is (from 0), and where the others listen, in order."""

    n_workers: int
    index: int
    peers: tuple[Peer, ...]

    @property
    def node(self) -> int:
        """This worker's node number: the root is node 0."""
        return self.index + 1


@dataclass(frozen=True, slots=True)
class WeightHeader:
    """`nbytes` bytes follow: bytes offset .. offset + nbytes - 1 of this node's slice of the weight of op `name` in layer `index`."""

    name: str
    index: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Control:
    """Run the graph for `rows` rows at positions position .. position + rows - 1. No rows: the session is over."""

    position: int
    rows: int


def encode_ack() -> bytes:
    """The word of consent: a worker's answer, and the root's "go" when every worker has answered the greeting."""
    return ACK


def decode_ack(data: bytes) -> None:
    parse_all(read_ack("ACK"), data)


# Greeting


def encode_greeting(greeting: Greeting) -> bytes:
    if not 0 <= greeting.index < greeting.n_workers or len(greeting.peers) != greeting.n_workers - 1:
        raise LocalProtocolError(f"worker {greeting.index} of {greeting.n_workers} with {len(greeting.peers)} peers")
    peers = (write_string(peer.host) + U32.pack(peer.port) for peer in greeting.peers)
    return _PAIR.pack(greeting.n_workers, greeting.index) + b"".join(peers)


def read_greeting(limits: Limits = DEFAULT_LIMITS) -> Parser[Greeting]:
    """A stranger's first bytes come here: the first word alone decides whether to listen on."""
    first = yield Need(U32.size, "the number of workers")
    n_workers = U32.unpack(first)[0]
    if not 1 <= n_workers <= limits.max_workers:
        found = repr(first) if first.isascii() and first.decode().isprintable() else str(n_workers)
        raise RemoteProtocolError(f"expected the number of workers in 1..{limits.max_workers}, found {found}: no dllama root")
    index = bounded((yield from read_u32("this worker's index")), 0, n_workers - 1, "this worker's index")
    peers = []
    for number in range(n_workers - 1):
        host, _ = yield from read_string(limits, f"the host of peer {number}")
        port = yield from read_u32(f"the port of peer {number}")
        peers.append(Peer(host, bounded(port, 1, _MAX_PORT, f"the port of peer {number}")))
    return Greeting(n_workers, index, tuple(peers))


def decode_greeting(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Greeting:
    return parse_all(read_greeting(limits), data)


# Network: what all nodes share


def encode_network(network: NetworkConfig, marker: bytes = b"") -> bytes:
    """`marker` goes behind the NUL of the first pipe's name, where C++ does not look and our workers do."""
    parts = [ACK, _NETWORK.pack(network.n_batches, network.n_nodes, len(network.pipes))]
    for number, pipe in enumerate(network.pipes):
        parts += [write_size(pipe.size), write_string(pipe.name, b"" if number else marker)]
    parts.append(U32.pack(len(network.pre_syncs)))
    parts += map(U32.pack, network.pre_syncs)
    return b"".join(parts)


def read_network(limits: Limits = DEFAULT_LIMITS) -> Parser[tuple[NetworkConfig, bytes]]:
    """(network, marker): the bytes found behind the NUL of a pipe's name, the first that has any."""
    yield from read_ack("the word that opens the network configuration")
    n_batches, n_nodes, n_pipes = _NETWORK.unpack((yield Need(_NETWORK.size, "the network's counts")))
    bounded(n_batches, 1, limits.max_batches, "the number of batch rows")
    bounded(n_nodes, 1, limits.max_workers + 1, "the number of nodes")
    bounded(n_pipes, 0, limits.max_pipes, "the number of pipes")
    pipes, marker = [], b""
    for number in range(n_pipes):
        size, name, tail = yield from _read_sized_name(limits, f"pipe {number}")
        pipes.append(Pipe(name, size))
        marker = marker or tail
    n_pre_syncs = bounded((yield from read_u32("the number of pre-syncs")), 0, limits.max_pipes, "the number of pre-syncs")
    pre_syncs = []
    for number in range(n_pre_syncs):
        pipe = yield from read_u32(f"the pipe of pre-sync {number}")
        pre_syncs.append(bounded(pipe, 0, n_pipes - 1, f"the pipe of pre-sync {number}"))
    return NetworkConfig(n_batches, n_nodes, tuple(pipes), tuple(pre_syncs)), marker


def decode_network(data: bytes, limits: Limits = DEFAULT_LIMITS) -> tuple[NetworkConfig, bytes]:
    return parse_all(read_network(limits), data)


def _read_sized_name(limits: Limits, what: str) -> Parser[tuple[Size, str, bytes]]:
    header = yield Need(SIZE.size + U32.size, f"the size of {what}")
    size = size_of(header[: SIZE.size], limits, what)
    (nbytes,) = U32.unpack_from(header, SIZE.size)
    bounded(nbytes, 2, limits.max_string_bytes, f"the length of the name of {what}")
    name, tail = string_of((yield Need(nbytes, f"the name of {what}")), f"the name of {what}")
    return size, name, tail


# Node: one node's buffers, segments and ops


def encode_node(node: NodeConfig) -> bytes:
    parts = [ACK, _NODE.pack(node.node, len(node.buffers), len(node.segments))]
    for buffer in node.buffers:
        parts += [write_size(buffer.size), write_string(buffer.name)]
    for segment in node.segments:
        parts.append(_PAIR.pack(len(segment.syncs), len(segment.ops)))
        parts += (_PAIR.pack(sync.pipe, sync.type) for sync in segment.syncs)
        parts += map(write_op, segment.ops)
    return b"".join(parts)


def read_node(limits: Limits = DEFAULT_LIMITS) -> Parser[NodeConfig]:
    yield from read_ack("the word that opens the node configuration")
    number, n_buffers, n_segments = _NODE.unpack((yield Need(_NODE.size, "the node's counts")))
    bounded(number, 0, limits.max_workers, "the node number")
    bounded(n_buffers, 0, limits.max_buffers, "the number of buffers")
    bounded(n_segments, 0, limits.max_segments, "the number of segments")
    buffers = []
    for position in range(n_buffers):
        size, name, _ = yield from _read_sized_name(limits, f"buffer {position}")
        buffers.append(Buffer(name, size))
    segments, ops_left = [], limits.max_ops
    for position in range(n_segments):
        segment = yield from _read_segment(limits, ops_left, f"segment {position}")
        ops_left -= len(segment.ops)
        segments.append(segment)
    return NodeConfig(number, tuple(buffers), tuple(segments))


def decode_node(data: bytes, limits: Limits = DEFAULT_LIMITS) -> NodeConfig:
    return parse_all(read_node(limits), data)


def _read_segment(limits: Limits, ops_left: int, what: str) -> Parser[Segment]:
    n_syncs, n_ops = _PAIR.unpack((yield Need(_PAIR.size, f"the counts of {what}")))
    bounded(n_syncs, 0, limits.max_syncs, f"the number of syncs of {what}")
    bounded(n_ops, 0, ops_left, f"the number of ops of {what}")
    syncs = []
    for number in range(n_syncs):
        pipe, kind = _PAIR.unpack((yield Need(_PAIR.size, f"sync {number} of {what}")))
        syncs.append(Sync(pipe, enum_of(SyncType, kind, f"the type of sync {number} of {what}")))
    ops = []
    for number in range(n_ops):
        ops.append((yield from read_op(limits, f"op {number} of {what}")))
    return Segment(tuple(ops), tuple(syncs))


# Weights


def encode_weight_header(header: WeightHeader) -> bytes:
    """The `nbytes` bytes themselves follow; they are the caller's to send, uncopied."""
    return write_string(header.name) + _WEIGHT.pack(header.index, header.offset, header.nbytes)


def encode_weights_end() -> bytes:
    return U32.pack(0)


def read_weight_header(limits: Limits = DEFAULT_LIMITS) -> Parser[WeightHeader | None]:
    """None is the end of the weights. Whether op, layer and range exist is for the owner of the memory to say."""
    name_size = yield from read_u32("the length of a weight's name, or 0 after the last weight")
    if name_size == 0:
        return None
    bounded(name_size, 2, limits.max_string_bytes, "the length of a weight's name")
    raw = yield Need(name_size + _WEIGHT.size, "a weight's name, layer, offset and size")
    name, _ = string_of(raw[:name_size], "a weight's name")
    index, offset, nbytes = _WEIGHT.unpack_from(raw, name_size)
    bounded(nbytes, 1, limits.max_weight_bytes, f"the bytes of {name} of layer {index}")
    bounded(offset, 0, limits.max_weight_bytes - nbytes, f"the offset in {name} of layer {index}")
    return WeightHeader(name, index, offset, nbytes)


def decode_weight_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> WeightHeader | None:
    return parse_all(read_weight_header(limits), data)


# Inference


def encode_control(control: Control) -> bytes:
    return _PAIR.pack(control.position, control.rows)


def encode_refusal(reason: str) -> bytes:
    """Why a worker does not do its part: a word, `u32` bytes, UTF-8."""
    text = reason.encode("utf-8", "replace")[:MAX_REASON_BYTES]
    return REFUSAL + U32.pack(len(text)) + text


def encode_stop() -> bytes:
    return encode_control(Control(0, 0))


def read_control(limits: Limits = DEFAULT_LIMITS, n_batches: int | None = None) -> Parser[Control]:
    """A control packet of at most `n_batches` rows. A stop's position has no meaning: a C++ root sends the last one again."""
    position, rows = _PAIR.unpack((yield Need(_PAIR.size, "a control packet")))
    bounded(rows, 0, limits.max_batches if n_batches is None else n_batches, "the rows of a control packet")
    if rows:
        bounded(position, 0, limits.max_positions - rows, "the position of a control packet")
    return Control(position, rows)


def decode_control(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Control:
    return parse_all(read_control(limits), data)
