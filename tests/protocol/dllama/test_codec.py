"""Every message, both ways: a table of hand-made bytes for encoders and decoders, messages that hypothesis makes up, and real ones."""

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dairllm.errors import LocalProtocolError, RemoteProtocolError
from dairllm.graph.types import (
    AttentionConfig,
    Buffer,
    FloatType,
    InvRmsConfig,
    MatmulConfig,
    MoeGateConfig,
    MulConfig,
    NetworkConfig,
    NoConfig,
    NodeConfig,
    Op,
    OpCode,
    OpConfig,
    Pipe,
    Pointer,
    PointerSource,
    PointerType,
    RmsNormConfig,
    RopeConfig,
    RopeType,
    ScaleConfig,
    Segment,
    ShiftConfig,
    Size,
    Sync,
    SyncType,
)
from dairllm.protocol.dllama import codec
from dairllm.protocol.dllama.codec import Control, Greeting, Peer, WeightHeader
from dairllm.protocol.dllama.limits import Limits

ACK = bytes.fromhex("aaaa6701")


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def size(kind: int, z: int, y: int, x: int, length: int, nbytes: int, nbytes_xy: int) -> bytes:
    return struct.pack("<iIIIQQQ", kind, z, y, x, length, nbytes, nbytes_xy)


NO_SIZE = size(-1, 0, 0, 0, 0, 0, 0)
X = Pointer(PointerSource.PIPE, 2, PointerType.BATCH)
Y = Pointer(PointerSource.BUFFER, 3, PointerType.BATCHED_SLICE)
X_RAW, Y_RAW = words(0, 2, 1), words(1, 3, 2)


def op(code: OpCode, config: OpConfig, weight: Size | None = None) -> Op:
    return Op(code, "op", 5, X, Y, weight or Size.none(), config)


def op_bytes(code: int, config: bytes, weight: bytes = NO_SIZE) -> bytes:
    return words(code, 5) + weight + words(len(config), 3) + b"op\0" + X_RAW + Y_RAW + config


ROPE_SIZE, ROPE_SIZE_RAW = Size(FloatType.F32, 1, 8, 4), size(0, 1, 8, 4, 32, 128, 128)
ROPE = RopeConfig(RopeType.LLAMA3_1, 1, 0, 9, 8.0, 1.0, 4.0, 64, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 10000.0, ROPE_SIZE)
ROPE_RAW = words(2, 1, 0, 9) + struct.pack("<fff", 8, 1, 4) + words(64, *range(10, 21)) + struct.pack("<f", 10000) + ROPE_SIZE_RAW
FALCON = RopeConfig(RopeType.FALCON, 0, 0, 9, 1.0, 0.0, 0.0, 0, 10, 0, 0, 0, 14, 15, 0, 0, 18, 19, 20, 5e5, ROPE_SIZE)
FALCON_WORDS = words(0, 10, 0, 0, 0, 14, 15, 0, 0, 18, 19, 20)
FALCON_RAW = words(1, 0, 0, 9) + struct.pack("<fff", 1, 0, 0) + FALCON_WORDS + struct.pack("<f", 5e5) + ROPE_SIZE_RAW
Q40_WEIGHT, Q40_WEIGHT_RAW = Size(FloatType.Q40, 2, 64, 4), size(2, 2, 64, 4, 512, 288, 144)

OPS = [
    (op(OpCode.MERGE_ADD, NoConfig()), op_bytes(0, b"\0")),
    (op(OpCode.MERGE_SUM, NoConfig()), op_bytes(1, b"\0")),
    (op(OpCode.EMBEDDING, NoConfig(), ROPE_SIZE), op_bytes(2, b"\0", ROPE_SIZE_RAW)),
    (op(OpCode.INV_RMS, InvRmsConfig(0.5, 7)), op_bytes(3, struct.pack("<fI", 0.5, 7))),
    (op(OpCode.RMS_NORM, RmsNormConfig(8, 7)), op_bytes(4, words(8, 7))),
    (op(OpCode.MATMUL, MatmulConfig(2, 1, 6), Q40_WEIGHT), op_bytes(5, words(2, 1, 6), Q40_WEIGHT_RAW)),
    (op(OpCode.ROPE, ROPE), op_bytes(6, ROPE_RAW)),
    (op(OpCode.ROPE, FALCON), op_bytes(6, FALCON_RAW)),
    (op(OpCode.MULTIHEAD_ATT, AttentionConfig(*range(12))), op_bytes(7, words(*range(12)))),
    (op(OpCode.GELU, NoConfig()), op_bytes(8, b"\0")),
    (op(OpCode.SILU, NoConfig()), op_bytes(9, b"\0")),
    (op(OpCode.MUL, MulConfig(4)), op_bytes(10, words(4))),
    (op(OpCode.SCALE, ScaleConfig(4)), op_bytes(11, words(4))),
    (op(OpCode.CAST, NoConfig()), op_bytes(12, b"\0")),
    (op(OpCode.REPEAT_Z, NoConfig()), op_bytes(13, b"\0")),
    (op(OpCode.SHIFT, ShiftConfig(0)), op_bytes(14, words(0))),
    (op(OpCode.SOFTMAX, NoConfig()), op_bytes(15, b"\0")),
    (op(OpCode.MOE_GATE, MoeGateConfig(2, 1, 6)), op_bytes(16, words(2, 1, 6))),
]

NODE = NodeConfig(
    3,
    (Buffer("b", Size(FloatType.Q80, 2, 1, 64)),),
    (Segment((), (Sync(2, SyncType.WITH_ROOT),)), Segment(tuple(o for o, _ in OPS), (Sync(4, SyncType.NODE_SLICES_EXCEPT_ROOT),))),
)
NODE_RAW = (
    ACK + words(3, 1, 2) + size(3, 2, 1, 64, 128, 136, 68) + words(2) + b"b\0"
    + words(1, 0, 2, 0)
    + words(1, len(OPS), 4, 2) + b"".join(raw for _, raw in OPS)
)  # fmt: skip

NETWORK = NetworkConfig(32, 2, (Pipe("POS", Size(FloatType.F32, 1, 32, 1)), Pipe("ZQ", Size(FloatType.Q80, 1, 32, 128))), (0,))
POS_SIZE, ZQ_SIZE = size(0, 1, 32, 1, 32, 128, 128), size(3, 1, 32, 128, 4096, 4352, 4352)
NETWORK_RAW = ACK + words(32, 2, 2) + POS_SIZE + words(4) + b"POS\0" + ZQ_SIZE + words(3) + b"ZQ\0" + words(1, 0)
MARKED_RAW = ACK + words(32, 2, 2) + POS_SIZE + words(14) + b"POS\0dairllm/1\0" + ZQ_SIZE + words(3) + b"ZQ\0" + words(1, 0)

GREETING = Greeting(3, 1, (Peer("10.0.0.7", 9999), Peer("beta", 9990)))
GREETING_RAW = words(3, 1, 9) + b"10.0.0.7\0" + words(9999, 5) + b"beta\0" + words(9990)

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes], Any]

VECTORS: list[tuple[str, Any, bytes, Encode, Decode]] = [
    ("ack", None, ACK, lambda _: codec.encode_ack(), codec.decode_ack),
    ("greeting", GREETING, GREETING_RAW, codec.encode_greeting, codec.decode_greeting),
    ("greeting of one", Greeting(1, 0, ()), words(1, 0), codec.encode_greeting, codec.decode_greeting),
    ("network", (NETWORK, b""), NETWORK_RAW, lambda pair: codec.encode_network(*pair), codec.decode_network),
    ("network, marked", (NETWORK, b"dairllm/1"), MARKED_RAW, lambda pair: codec.encode_network(*pair), codec.decode_network),
    ("node", NODE, NODE_RAW, codec.encode_node, codec.decode_node),
    ("empty node", NodeConfig(1, (), ()), ACK + words(1, 0, 0), codec.encode_node, codec.decode_node),
    (
        "weight",
        WeightHeader("w", 5, 1 << 33, 1 << 34),
        words(2) + b"w\0" + words(5) + struct.pack("<QQ", 1 << 33, 1 << 34),
        codec.encode_weight_header,
        codec.decode_weight_header,
    ),
    ("end of weights", None, words(0), lambda _: codec.encode_weights_end(), codec.decode_weight_header),
    ("control", Control(63, 32), words(63, 32), codec.encode_control, codec.decode_control),
    ("stop", Control(0, 0), words(0, 0), lambda _: codec.encode_stop(), codec.decode_control),
]
MESSAGES = pytest.mark.parametrize(("value", "raw", "encode", "decode"), [pytest.param(*v[1:], id=v[0]) for v in VECTORS])


@MESSAGES
def test_encode(value: Any, raw: bytes, encode: Encode, decode: Decode) -> None:
    assert encode(value) == raw


@MESSAGES
def test_decode(value: Any, raw: bytes, encode: Encode, decode: Decode) -> None:
    assert decode(raw) == value


@MESSAGES
def test_torn_and_overlong_messages_are_refused(value: Any, raw: bytes, encode: Encode, decode: Decode) -> None:
    for length in range(len(raw)):
        with pytest.raises(RemoteProtocolError, match="found"):
            decode(raw[:length])
    with pytest.raises(RemoteProtocolError, match="expected the end, found 1 more"):
        decode(raw + b"\0")


@pytest.mark.parametrize(("expected", "raw"), OPS, ids=[o.code.name for o, _ in OPS])
def test_each_op_stands_for_itself(expected: Op, raw: bytes) -> None:
    message = ACK + words(1, 0, 1, 0, 1) + raw
    node = NodeConfig(1, (), (Segment((expected,), ()),))
    assert codec.encode_node(node) == message
    assert codec.decode_node(message) == node


def test_configurations_without_fields_may_be_missing() -> None:
    message = ACK + words(1, 0, 1, 0, 1) + op_bytes(OpCode.CAST, b"")
    assert codec.decode_node(message).segments[0].ops == (op(OpCode.CAST, NoConfig()),)


def test_uninitialised_fields_of_a_falcon_rope_are_not_believed() -> None:
    garbage = bytearray(FALCON_RAW)
    for field in (9, 10, 11, 14, 15):
        garbage[4 * field : 4 * field + 4] = b"\xde\xad\xbe\xef"
    message = ACK + words(1, 0, 1, 0, 1) + op_bytes(OpCode.ROPE, bytes(garbage))
    assert codec.decode_node(message).segments[0].ops[0].config == FALCON


@pytest.mark.parametrize("wrapped", [True, False])
def test_counts_of_32_bits_are_believed_where_the_true_one_is_larger(wrapped: bool) -> None:
    """128 experts of 8192 x 8192: the C++ program's product of dimensions overflows."""
    true = 128 * 8192 * 8192
    count = true % (1 << 32) if wrapped else true
    raw = size(2, 128, 8192, 8192, count, count // 32 * 18, 8192 * 8192 // 32 * 18)
    message = ACK + words(1, 0, 1, 0, 1) + op_bytes(OpCode.MATMUL, words(128, 8, 0), raw)
    assert codec.decode_node(message).segments[0].ops[0].weight_size == Size(FloatType.Q40, 128, 8192, 8192)


def node_with_op(raw: bytes) -> bytes:
    return ACK + words(1, 0, 1, 0, 1) + raw


def pipe_of(raw_size: bytes, name: bytes = b"X\0", length: int | None = None) -> bytes:
    return ACK + words(32, 2, 1) + raw_size + words(len(name) if length is None else length) + name + words(0)


NAN, INFINITE_THETA = struct.pack("<fI", float("nan"), 1), ROPE_RAW[:76] + struct.pack("<f", float("inf")) + ROPE_SIZE_RAW
W = words(2) + b"w\0" + words(0)
END = (1 << 64) - 1

HOSTILE = {
    "an HTTP request": (codec.decode_greeting, b"GET / HTTP/1.1\r\n", r"workers in 1\.\.256, found b'GET '"),
    "no workers": (codec.decode_greeting, words(0, 0), r"found 0: no dllama root"),
    "too many workers": (codec.decode_greeting, words(257, 0), "found 257"),
    "a binary first word": (codec.decode_greeting, words(0xFFFFFFFF, 0), "found 4294967295"),
    "an index beyond the workers": (codec.decode_greeting, words(2, 2), r"index in 0\.\.1, found 2"),
    "an endless host": (codec.decode_greeting, words(2, 0, 1 << 31), r"the host of peer 0 in 2\.\.256"),
    "an empty host": (codec.decode_greeting, words(2, 0, 1) + b"\0", "the length of the host"),
    "a host of control characters": (codec.decode_greeting, words(2, 0, 3) + b"\x1b[\0" + words(1), "printable ASCII"),
    "a host without a NUL": (codec.decode_greeting, words(2, 0, 4) + b"host" + words(1), "expected a NUL within the 4 bytes"),
    "port 0": (codec.decode_greeting, words(2, 0, 2) + b"h\0" + words(0), r"port of peer 0 in 1\.\.65535, found 0"),
    "port 65536": (codec.decode_greeting, words(2, 0, 2) + b"h\0" + words(65536), "found 65536"),
    "no ACK": (codec.decode_ack, words(1), r"expected ACK \(23571114\), found 1"),
    "a network without its word": (codec.decode_network, words(32, 2, 0, 0), "opens the network configuration"),
    "no batch rows": (codec.decode_network, ACK + words(0, 2, 0, 0), "batch rows"),
    "too many batch rows": (codec.decode_network, ACK + words(1 << 31, 2, 0), "batch rows"),
    "no nodes": (codec.decode_network, ACK + words(32, 0, 0), "number of nodes"),
    "too many pipes": (codec.decode_network, ACK + words(32, 2, 1 << 30), "number of pipes"),
    "too many pre-syncs": (codec.decode_network, ACK + words(32, 2, 0, 1 << 30), "number of pre-syncs"),
    "a pre-sync of no pipe": (codec.decode_network, pipe_of(POS_SIZE)[:-4] + words(1, 1), "pipe of pre-sync 0"),
    "an unknown float type": (codec.decode_network, pipe_of(size(7, 1, 1, 1, 1, 4, 4)), "float type of pipe 0 to be one of Float"),
    "a size that cannot be": (codec.decode_network, pipe_of(size(0, 1 << 31, 1 << 31, 1 << 31, 0, 0, 0)), "number of values of pipe 0"),
    "a typeless size with values": (codec.decode_network, pipe_of(size(-1, 1, 1, 1, 1, 0, 0)), "without a float type to be empty"),
    "a wrong length": (codec.decode_network, pipe_of(size(0, 1, 2, 3, 7, 24, 24)), "the length of 1 x 2 x 3 values: expected 6, found 7"),
    "wrong bytes": (codec.decode_network, pipe_of(size(0, 1, 2, 3, 6, 25, 24)), "the bytes of 1 x 2 x 3 F32 values: expected 24, found 25"),
    "wrong bytes of a plane": (codec.decode_network, pipe_of(size(0, 2, 2, 3, 12, 48, 48)), "bytes of one plane of 2 x 2 x 3 F32 values"),
    "a torn block": (codec.decode_network, pipe_of(size(3, 1, 1, 33, 33, 34, 34)), "not a whole number of Q80 blocks"),
    "an endless pipe name": (codec.decode_network, pipe_of(POS_SIZE, b"X\0", 1 << 31), "length of the name of pipe 0"),
    "a nameless pipe": (codec.decode_network, pipe_of(POS_SIZE, b"\0\0"), "the name of pipe 0 in printable ASCII"),
    "too high a node": (codec.decode_node, ACK + words(257, 0, 0), "node number"),
    "too many buffers": (codec.decode_node, ACK + words(1, 1 << 30, 0), "number of buffers"),
    "too many segments": (codec.decode_node, ACK + words(1, 0, 1 << 30), "number of segments"),
    "too many syncs": (codec.decode_node, ACK + words(1, 0, 1, 1 << 30, 0), "number of syncs of segment 0"),
    "too many ops": (codec.decode_node, ACK + words(1, 0, 1, 0, 1 << 30), "number of ops of segment 0"),
    "an unknown sync": (codec.decode_node, ACK + words(1, 0, 1, 1, 0, 0, 3), "type of sync 0 of segment 0 to be one of SyncType, found 3"),
    "an unknown op": (codec.decode_node, node_with_op(op_bytes(17, b"\0")), "code of op 0 of segment 0 to be one of OpCode, found 17"),
    "another op's configuration": (codec.decode_node, node_with_op(op_bytes(5, b"\0")), "expected 12 bytes of MATMUL config"),
    "an endless op name": (codec.decode_node, node_with_op(words(0, 0) + NO_SIZE + words(1, 1 << 31)), "length of the name of op 0"),
    "an unknown source": (codec.decode_node, node_with_op(op_bytes(0, b"\0").replace(X_RAW, words(2, 2, 1))), "source of the input of op "),
    "an unknown pointer": (codec.decode_node, node_with_op(op_bytes(0, b"\0").replace(Y_RAW, words(1, 3, 3))), "type of the output of op "),
    "an unknown rope": (codec.decode_node, node_with_op(op_bytes(6, words(3) + ROPE_RAW[4:])), "rope type of op "),
    "neither q nor k": (codec.decode_node, node_with_op(op_bytes(6, words(2, 2) + ROPE_RAW[8:])), "whether op "),
    "an epsilon that is no number": (codec.decode_node, node_with_op(op_bytes(3, NAN)), "finite"),
    "an infinite theta": (codec.decode_node, node_with_op(op_bytes(6, INFINITE_THETA)), "finite"),
    "an endless weight name": (codec.decode_weight_header, words(1 << 31), "length of a weight's name"),
    "a nameless weight": (codec.decode_weight_header, words(1) + b"\0" + bytes(20), "length of a weight's name"),
    "an empty weight": (codec.decode_weight_header, words(2) + b"w\0" + bytes(20), "bytes of w of layer 0"),
    "an endless weight": (codec.decode_weight_header, W + struct.pack("<QQ", 0, END), "bytes of w"),
    "a weight beyond all": (codec.decode_weight_header, W + struct.pack("<QQ", END, 1), "the offset in w"),
    "too many rows": (codec.decode_control, words(0, 1025), "rows of a control packet"),
    "too high a position": (codec.decode_control, words((1 << 24) - 31, 32), "position of a control packet"),
}  # fmt: skip


@pytest.mark.parametrize(("decode", "raw", "message"), HOSTILE.values(), ids=HOSTILE)
def test_what_cannot_be_is_refused_by_name(decode: Decode, raw: bytes, message: str) -> None:
    with pytest.raises(RemoteProtocolError, match=message):
        decode(raw)


def test_ops_are_bounded_over_all_segments() -> None:
    message = ACK + words(1, 0, 2) + 2 * (words(0, 2) + 2 * op_bytes(OpCode.CAST, b"\0"))
    assert len(codec.decode_node(message, Limits(max_ops=4)).segments) == 2
    with pytest.raises(RemoteProtocolError, match=r"ops of segment 1 in 0\.\.1, found 2"):
        codec.decode_node(message, Limits(max_ops=3))


@pytest.mark.parametrize("text", ["", "two\nlines", "é", "nul\0nul"])
def test_strings_that_the_wire_cannot_carry(text: str) -> None:
    with pytest.raises(LocalProtocolError, match="printable ASCII"):
        codec.encode_weight_header(WeightHeader(text, 0, 0, 1))


def test_a_greeting_that_contradicts_itself_is_not_sent() -> None:
    for greeting in (Greeting(1, 1, ()), Greeting(2, 0, ())):
        with pytest.raises(LocalProtocolError, match="worker"):
            codec.encode_greeting(greeting)


def test_a_configuration_of_another_op_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="MUL is configured by MulConfig, not NoConfig"):
        codec.encode_node(NodeConfig(1, (), (Segment((op(OpCode.MUL, NoConfig()),), ()),)))


def test_the_cpp_roots_configuration_survives(recording: Any) -> None:
    _, network, node, *_ = recording.root
    network = network[len(ACK) :]  # the word before it is "go"
    assert codec.encode_network(*codec.decode_network(network)) == network
    assert codec.encode_node(codec.decode_node(node)) == node


# Round trips of messages that hypothesis makes up.

u32 = st.integers(0, (1 << 32) - 1)
f32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
names = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=40)
markers = st.binary(max_size=20).filter(lambda raw: b"\0" not in raw)
sizes = st.builds(
    lambda kind, z, y, blocks: Size.none() if kind == FloatType.NONE else Size(kind, z, y, 32 * blocks),
    st.sampled_from(FloatType), st.integers(0, 300), st.integers(0, 1 << 16), st.integers(0, 1 << 13),
)  # fmt: skip
pointers = st.builds(Pointer, st.sampled_from(PointerSource), u32, st.sampled_from(PointerType))
ropes = st.builds(
    RopeConfig, st.sampled_from([RopeType.LLAMA, RopeType.LLAMA3_1]), st.integers(0, 1), u32, u32, f32, f32, f32,
    *[u32] * 12, f32, sizes,
)  # fmt: skip
configs: dict[OpCode, st.SearchStrategy[OpConfig]] = {
    OpCode.INV_RMS: st.builds(InvRmsConfig, f32, u32),
    OpCode.RMS_NORM: st.builds(RmsNormConfig, u32, u32),
    OpCode.MATMUL: st.builds(MatmulConfig, u32, u32, u32),
    OpCode.ROPE: ropes,
    OpCode.MULTIHEAD_ATT: st.builds(AttentionConfig, *[u32] * 12),
    OpCode.MUL: st.builds(MulConfig, u32),
    OpCode.SCALE: st.builds(ScaleConfig, u32),
    OpCode.SHIFT: st.builds(ShiftConfig, u32),
    OpCode.MOE_GATE: st.builds(MoeGateConfig, u32, u32, u32),
}
ops = st.sampled_from(OpCode).flatmap(
    lambda code: st.builds(Op, st.just(code), names, u32, pointers, pointers, sizes, configs.get(code, st.just(NoConfig())))
)
syncs = st.builds(Sync, u32, st.sampled_from(SyncType))
segments = st.builds(Segment, st.lists(ops, max_size=4).map(tuple), st.lists(syncs, max_size=3).map(tuple))
buffers = st.builds(Buffer, names, sizes)
nodes = st.builds(NodeConfig, st.integers(0, 256), st.lists(buffers, max_size=4).map(tuple), st.lists(segments, max_size=3).map(tuple))
networks = st.lists(st.builds(Pipe, names, sizes), min_size=1, max_size=6).flatmap(
    lambda pipes: st.builds(
        NetworkConfig, st.integers(1, 1024), st.integers(1, 257), st.just(tuple(pipes)),
        st.lists(st.integers(0, len(pipes) - 1), max_size=3).map(tuple),
    )
)  # fmt: skip
relaxed = settings(suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(nodes)
def test_any_node_comes_back(node: NodeConfig) -> None:
    assert codec.decode_node(codec.encode_node(node)) == node


@relaxed
@given(networks, markers)
def test_any_network_comes_back(network: NetworkConfig, marker: bytes) -> None:
    assert codec.decode_network(codec.encode_network(network, marker)) == (network, marker)


@given(st.lists(st.builds(Peer, names, st.integers(1, 65535)), max_size=5), st.data())
def test_any_greeting_comes_back(peers: list[Peer], data: st.DataObject) -> None:
    greeting = Greeting(len(peers) + 1, data.draw(st.integers(0, len(peers))), tuple(peers))
    assert codec.decode_greeting(codec.encode_greeting(greeting)) == greeting


@given(names, u32, st.integers(0, 1 << 40), st.integers(1, 1 << 40))
def test_any_weight_header_comes_back(name: str, index: int, offset: int, nbytes: int) -> None:
    header = WeightHeader(name, index, offset, nbytes)
    assert codec.decode_weight_header(codec.encode_weight_header(header)) == header


@given(st.integers(0, 1 << 23), st.integers(1, 1024))
def test_any_control_comes_back(position: int, rows: int) -> None:
    assert codec.decode_control(codec.encode_control(Control(position, rows))) == Control(position, rows)


@given(st.sampled_from([v[4] for v in VECTORS]), st.binary(max_size=400))
def test_random_bytes_are_a_message_or_refused(decode: Decode, raw: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        decode(raw)
