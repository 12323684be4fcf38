"""Who holds which part of a layer: shares, and the part of each weight that a share means.

A share is a value, not a division: equal shares are one way to deal. Query heads go with the KV heads that they read, so that a node's
attention needs nothing of its neighbours (a KV head whose query heads are parted is held by each of their nodes); its slice of the
feed-forward block is a range of that block's width; its classifier rows are its part of the logits.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import gcd

from dairllm.errors import ConfigError, GraphError
from dairllm.graph.model import ModelSpec
from dairllm.graph.packing import HeadRule, deal_heads, even_heads, most_nodes, nearest_heads
from dairllm.graph.types import BLOCK_VALUES, FloatType

__all__ = [
    "Axis",
    "Part",
    "Share",
    "ShareSize",
    "Span",
    "deal_shares",
    "equal_shares",
    "nearly_equal_sizes",
    "parse_shares",
    "weight_part",
]


@dataclass(frozen=True, slots=True)
class Span:
    """start .. stop - 1."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def times(self, width: int) -> "Span":
        """The span of values, where each of ours has `width`."""
        return Span(self.start * width, self.stop * width)


@dataclass(frozen=True, slots=True)
class Share:
    """What one node computes of every layer, and of the logits."""

    heads: tuple[Span, ...]
    """Query heads in the node's own order: whole KV groups, then at most one part of a group."""
    kv_heads: tuple[Span, ...]
    """In the same order."""
    ffn: Span
    """Columns of the feed-forward block (of each expert)."""
    logits: Span
    """Rows of the classifier: those that there are. On the wire all nodes have equally many, so that the last ones may be short of some."""

    @property
    def n_heads(self) -> int:
        return sum(span.size for span in self.heads)

    @property
    def n_kv_heads(self) -> int:
        return sum(span.size for span in self.kv_heads)


@dataclass(frozen=True, slots=True)
class ShareSize:
    """How much a node is to have, as a user writes it: `str()` is "2/64"."""

    heads: int
    ffn: int
    """Columns of the feed-forward block."""

    def __str__(self) -> str:
        return f"{self.heads}/{self.ffn}"


class Axis(Enum):
    WHOLE = "whole"
    ROWS = "rows"
    """Outputs: rows of a [d, n] weight."""
    COLUMNS = "columns"
    """Inputs: columns of every row."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a weight, [d outputs, n inputs] as it lies in a file; `spans` None is the whole of it, else they lie in this order."""

    axis: Axis
    spans: tuple[Span, ...] | None


_WHOLE = Part(Axis.WHOLE, None)


def weight_part(spec: ModelSpec, share: Share, name: str) -> Part:
    """What a node with `share` holds of the weight of op `name`.

    The embedding is whole too, though only the root has it.

    Raises:
        GraphError: no op of that name has a weight.
    """
    match name:
        case "block_matmul_q":
            return Part(Axis.ROWS, _values(share.heads, spec))
        case "block_matmul_k" | "block_matmul_v":
            return Part(Axis.ROWS, _values(share.kv_heads, spec))
        case "block_matmul_wo":
            return Part(Axis.COLUMNS, _values(share.heads, spec))
        case "block_matmul_w1" | "block_matmul_w3":
            return Part(Axis.ROWS, (share.ffn,))
        case "block_matmul_w2":
            return Part(Axis.COLUMNS, (share.ffn,))
        case "final_matmul_logits":
            return Part(Axis.ROWS, (share.logits,))
        case "embedding" | "block_moe_gate" | "block_norm_q" | "block_norm_k" | "block_norm_0" | "block_norm_1" | "final_norm":
            return _WHOLE
    raise GraphError(f"op {name!r} has no weight")


def _values(heads: Iterable[Span], spec: ModelSpec) -> tuple[Span, ...]:
    return tuple(span.times(spec.head_dim) for span in heads)


def equal_shares(spec: ModelSpec, n_nodes: int) -> tuple[Share, ...]:
    """The shares of `n_nodes` nodes that hold the same amount each: what a C++ root deals.

    Raises:
        GraphError: something does not divide; names all that does not, and the numbers of nodes that would do.
    """
    obstacles = _obstacles(spec, n_nodes)
    if obstacles:
        possible = [n for n in range(1, spec.n_kv_heads + 1) if not _obstacles(spec, n)]
        hint = f"; possible: {', '.join(map(str, possible))}" if possible else ""
        raise GraphError(f"{n_nodes} equal nodes cannot share this model: {', '.join(obstacles)}{hint}")
    heads, kv_heads, ffn, logits = (_equal(whole, n_nodes) for whole in (spec.n_heads, spec.n_kv_heads, spec.ff_dim, spec.vocab_size))
    return tuple(Share((heads[node],), (kv_heads[node],), ffn[node], logits[node]) for node in range(n_nodes))


def parse_shares(text: str) -> tuple[ShareSize, ...]:
    """Sizes written as "2/64,1/32": query heads and feed-forward columns of each node, the root first.

    Raises:
        ConfigError: it is something else.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,9})/([0-9]{1,9})\s*", part)
        if match is None:
            raise ConfigError(f'shares "{text}": expected query heads/feed-forward columns of each node, as in 2/64,1/32; found "{part}"')
        sizes.append(ShareSize(int(match[1]), int(match[2])))
    return tuple(sizes)


def deal_shares(spec: ModelSpec, sizes: Sequence[ShareSize]) -> tuple[Share, ...]:
    """A share for each node, as large as `sizes` say, the root first; node 0's heads are one span.

    Feed-forward columns come in blocks of 32, the model's last one being as short as it is; equal shares need no blocks. Classifier rows
    come in slices of ceil(vocab / nodes), of which the last ones are short or empty.

    Raises:
        GraphError: they cannot be dealt so: why, and the nearest sizes that can, as a user would write them.
    """
    n_nodes = len(sizes)
    if tuple(sizes) == _equal_sizes(spec, n_nodes):
        return equal_shares(spec, n_nodes)
    rule = _rule(spec, n_nodes)
    problem = _wrong_heads(spec, rule, [size.heads for size in sizes])
    heads = None if problem else deal_heads(rule, [size.heads for size in sizes])
    if not problem and heads is None:
        over = ", ".join(f"{size.heads % rule.group}" for size in sizes if size.heads % rule.group)
        problem = f"beside whole groups of {rule.group} heads to a KV head, nodes have {over}, which do not make up whole groups"
        if not rule.scatters:
            problem = f"groups of {rule.group} heads to a KV head, and heads {rule.unit} at a time, cannot be parted so"
    problem = problem or _wrong_ffn(spec, [size.ffn for size in sizes])
    if problem or heads is None:
        asked, nearest = (",".join(map(str, some)) for some in (sizes, _nearest(spec, rule, sizes)))
        raise GraphError(f"shares {asked}: {problem}; the nearest that can be dealt: {nearest}")
    ffn, first = [], 0
    for size in sizes:
        ffn.append(Span(first, first + size.ffn))
        first += size.ffn
    rows = -(-spec.vocab_size // n_nodes)
    logits = [Span(*(min(row, spec.vocab_size) for row in (node * rows, (node + 1) * rows))) for node in range(n_nodes)]
    return tuple(Share(*_merged(mine, rule.group), ffn[node], logits[node]) for node, mine in enumerate(heads))


def nearly_equal_sizes(spec: ModelSpec, n_nodes: int) -> tuple[ShareSize, ...]:
    """Sizes that can be dealt, as near to equal as they can be; those of ``equal_shares`` where there are such.

    Raises:
        GraphError: so many nodes cannot share this model; says how many can.
    """
    equal = _equal_sizes(spec, n_nodes)
    if equal:
        return equal
    heads = even_heads(_rule(spec, n_nodes), n_nodes)
    ffn = _ffn_widths(spec, [spec.ff_dim // n_nodes] * n_nodes, lambda found, _: (found * n_nodes - spec.ff_dim) ** 2)
    return tuple(map(ShareSize, heads, ffn))


def _equal(whole: int, n_nodes: int) -> list[Span]:
    each = whole // n_nodes
    return [Span(node * each, (node + 1) * each) for node in range(n_nodes)]


def _equal_sizes(spec: ModelSpec, n_nodes: int) -> tuple[ShareSize, ...]:
    """Empty where there are no equal shares."""
    if _obstacles(spec, n_nodes):
        return ()
    return (ShareSize(spec.n_heads // n_nodes, spec.ff_dim // n_nodes),) * n_nodes


def _obstacles(spec: ModelSpec, n_nodes: int) -> list[str]:
    """What keeps the model from being dealt equally, each with its number."""
    if n_nodes < 1:
        return ["there must be one at least"]
    counts = {
        "query heads": spec.n_heads,
        "KV heads": spec.n_kv_heads,
        "feed-forward columns": spec.ff_dim,
        "classifier rows": spec.vocab_size,
    }
    found = [f"{count} {what} do not divide by {n_nodes}" for what, count in counts.items() if count % n_nodes]
    if _is_quantized(spec):
        widths = {"attention values": spec.q_dim, "feed-forward columns": spec.ff_dim}
        found += [
            f"{width // n_nodes} {what} a node are not whole blocks of {BLOCK_VALUES}"
            for what, width in widths.items()
            if width % n_nodes == 0 and width // n_nodes % BLOCK_VALUES
        ]
    return found


def _is_quantized(spec: ModelSpec) -> bool:
    return spec.weight_type in (FloatType.Q40, FloatType.Q80)


def _rule(spec: ModelSpec, n_nodes: int) -> HeadRule:
    """How heads can be dealt.

    Raises:
        GraphError: there are too many nodes for it, or none.
    """
    if n_nodes < 1:
        raise GraphError("a model is shared by one node at least")
    if spec.n_heads % spec.n_kv_heads:
        raise GraphError(f"{spec.n_heads} query heads cannot share {spec.n_kv_heads} KV heads")
    unit = BLOCK_VALUES // gcd(BLOCK_VALUES, spec.head_dim) if _is_quantized(spec) else 1
    if spec.n_heads % unit:
        raise GraphError(f"{spec.q_dim} attention values are not whole blocks of {BLOCK_VALUES}")
    rule = HeadRule(spec.n_heads, spec.n_heads // spec.n_kv_heads, unit)
    most = min(most_nodes(rule), _ffn_blocks(spec))
    if n_nodes > most:
        at_a_time = f", dealt {unit} at a time" if unit > 1 else ""
        equal = [str(n) for n in range(most + 1, spec.n_kv_heads + 1) if not _obstacles(spec, n)]  # need no blocks
        raise GraphError(
            f"{n_nodes} nodes cannot share this model, {most} can at most: each needs query heads, of which there are {spec.n_heads}"
            f"{at_a_time}, and a block of {BLOCK_VALUES} feed-forward columns, of which there are {_ffn_blocks(spec)}"
            + (f"; {' or '.join(equal)} equal nodes can, too" if equal else "")
        )
    return rule


def _wrong_heads(spec: ModelSpec, rule: HeadRule, heads: Sequence[int]) -> str:
    """What is wrong with the numbers of heads by themselves; empty where nothing is."""
    for node, n in enumerate(heads):
        if n < 1:
            return f"node {node} has no query head"
        if n % rule.unit:
            return f"node {node} has {n} query heads of {spec.head_dim} values, no whole blocks of {BLOCK_VALUES}"
    if sum(heads) != spec.n_heads:
        return f"they have {sum(heads)} query heads, the model {spec.n_heads}"
    return ""


def _wrong_ffn(spec: ModelSpec, ffn: Sequence[int]) -> str:
    for node, n in enumerate(ffn):
        if n < 1:
            return f"node {node} has no feed-forward columns"
        if n % BLOCK_VALUES and node + 1 < len(ffn):
            return f"node {node} has {n} feed-forward columns, no whole blocks of {BLOCK_VALUES}"
    if sum(ffn) != spec.ff_dim:
        return f"they have {sum(ffn)} feed-forward columns, the model {spec.ff_dim}"
    return ""


def _nearest(spec: ModelSpec, rule: HeadRule, sizes: Sequence[ShareSize]) -> tuple[ShareSize, ...]:
    """The sizes nearest to these that can be dealt. Sizes of another model stand for their ratio."""
    wanted_heads = _apportioned([size.heads for size in sizes], spec.n_heads)
    wanted_ffn = _apportioned([size.ffn for size in sizes], spec.ff_dim)

    def distance(other: Sequence[ShareSize]) -> int:
        wanted = zip(wanted_heads, wanted_ffn, other, strict=True)
        return sum(abs(heads - size.heads) + abs(ffn - size.ffn) for heads, ffn, size in wanted)

    heads = nearest_heads(rule, wanted_heads)
    ffn = _ffn_widths(spec, wanted_ffn, lambda found, wanted: abs(found - wanted))
    dealt = tuple(map(ShareSize, heads, ffn))
    equal = _equal_sizes(spec, len(sizes))  # need not be in blocks
    return equal if equal and distance(equal) < distance(dealt) else dealt


def _apportioned(wanted: Sequence[int], total: int) -> list[int]:
    """`total` in the ratio of `wanted`, in whole numbers: what is left after rounding down goes to
    the largest remainders, the first of equal ones first."""
    asked = sum(wanted)
    if asked in (0, total):
        return list(wanted)
    found = [size * total // asked for size in wanted]
    by_remainder = sorted(range(len(wanted)), key=lambda node: -(wanted[node] * total % asked))
    for node in by_remainder[: total - sum(found)]:
        found[node] += 1
    return found


def _ffn_blocks(spec: ModelSpec) -> int:
    return -(-spec.ff_dim // BLOCK_VALUES)


def _ffn_widths(spec: ModelSpec, wanted: Sequence[int], cost: Callable[[int, int], int]) -> list[int]:
    """Columns of each node, in blocks, the last block being as long as it is: those of the least cost, a convex function of
    (columns had, columns wanted)."""
    total, last = _ffn_blocks(spec), len(wanted) - 1
    short = total * BLOCK_VALUES - spec.ff_dim

    def width(node: int, blocks: int) -> int:
        return blocks * BLOCK_VALUES - (short if node == last else 0)

    def change(node: int, by: int) -> int:
        return cost(width(node, blocks[node] + by), wanted[node]) - cost(width(node, blocks[node]), wanted[node])

    blocks = [min(max((columns + BLOCK_VALUES // 2) // BLOCK_VALUES, 1), total) for columns in wanted]
    while sum(blocks) < total:
        blocks[min(range(len(blocks)), key=lambda node: change(node, 1))] += 1
    while sum(blocks) > total:
        several = [node for node in reversed(range(len(blocks))) if blocks[node] > 1]
        blocks[min(several, key=lambda node: change(node, -1))] -= 1
    return [width(node, n) for node, n in enumerate(blocks)]


def _merged(heads: Sequence[range], group: int) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """(query heads, KV heads) as spans, neighbours made one."""
    kv_heads = [range(piece.start // group, -(-piece.stop // group)) for piece in heads]
    return _joined(heads), _joined(kv_heads)


def _joined(pieces: Iterable[range]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for piece in pieces:
        if spans and spans[-1].stop == piece.start:
            spans[-1] = Span(spans[-1].start, piece.stop)
        else:
            spans.append(Span(piece.start, piece.stop))
    return tuple(spans)
