"""How many query heads each node can have, and which: heads in groups that read one KV head, dealt to nodes.

A node's attention counts its heads from its first one and changes KV head every `group` heads. So a node has whole groups, then at most
one part of a group. Whole groups can be had anywhere; parts must fill groups among themselves. That is the same as walking along a line
of all heads, node after node in some *order*, so that a node's part never crosses the end of the group that is begun: finding the order
is packing bins, and finding numbers that can be dealt is finding the cheapest walk.

Where a block of quantized weights covers several heads (`unit`), a node's heads come in whole units. If units do not fit into groups, only
heads that lie together are tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import groupby

__all__ = ["HeadRule", "deal_heads", "even_heads", "most_nodes", "nearest_heads"]

_MAX_STATES = 30_000
"""Looked at before a search is given up: a second or so."""

_State = tuple[int, tuple[int, ...]]  # heads dealt, nodes taken from each queue


@dataclass(frozen=True, slots=True)
class HeadRule:
    """`n_heads` query heads in groups of `group`, dealt `unit` at a time."""

    n_heads: int
    group: int
    unit: int

    @property
    def scatters(self) -> bool:
        """Whether a part of a group may lie apart from the whole groups of its node."""
        return self.group % self.unit == 0

    def fits(self, at: int, size: int) -> bool:
        """Whether the next node can have `size` heads when `at` have been dealt."""
        begun = at % self.group
        if self.scatters:
            return begun + size % self.group <= self.group
        return begun == 0 or begun + size <= self.group


def most_nodes(rule: HeadRule) -> int:
    """As many nodes as can have heads at all; every smaller number can."""
    longest = {0: 0}
    for stop in range(rule.unit, rule.n_heads + 1, rule.unit):
        steps = [n for at, n in longest.items() if rule.fits(at, stop - at)]
        if steps:
            longest[stop] = max(steps) + 1
    return longest.get(rule.n_heads, 0)


def deal_heads(rule: HeadRule, sizes: Sequence[int]) -> list[list[range]] | None:
    """Each node's heads, in the order in which it has them: whole groups, then the part. None where `sizes` cannot be dealt.

    Node 0 has its heads in one piece. Equal nodes have theirs in the natural order.

    Args:
        sizes: heads of each node; positive multiples of the unit that add up to the rule's.
    """
    order = _order(rule, sizes)
    if order is None:
        return None
    if rule.scatters:
        return _scattered(rule, sizes, order)
    starts, at = {}, 0
    for node in order:
        starts[node] = at
        at += sizes[node]
    return [[range(starts[node], starts[node] + size)] for node, size in enumerate(sizes)]


def even_heads(rule: HeadRule, n_nodes: int) -> tuple[int, ...]:
    """Numbers that can be dealt and are as even as can be: the largest as small as possible, then all near the mean; the largest first.

    Args:
        n_nodes: at most ``most_nodes``.
    """
    mean = rule.n_heads // n_nodes
    for largest in range(max(mean, rule.unit), rule.n_heads + 1):
        walk = _walk(rule, [[mean] * n_nodes], lambda size, wanted: (size - wanted) ** 2, lambda _: 0, largest)
        if walk is not None:
            return tuple(sorted((size for _, size in walk), reverse=True))
    raise ValueError(f"{n_nodes} nodes for {rule}")


def nearest_heads(rule: HeadRule, sizes: Sequence[int]) -> tuple[int, ...]:
    """The numbers nearest to `sizes` (least sum of differences) that can be dealt.

    The nearest of all where there are few nodes or few different sizes; for many the search is given up at some point, and they are near.

    Args:
        sizes: what was asked for; at most ``most_nodes`` of them.
    """
    wanted = [min(size, rule.n_heads) for size in sizes]  # more cannot be had: the differences beyond are the same for all
    by_size = sorted(range(len(wanted)), key=lambda node: -wanted[node])
    found: list[tuple[int, tuple[int, ...]]] = []
    for order in (range(len(wanted)), by_size):  # one queue: in this order
        walk = _walk(rule, [[wanted[node] for node in order]], _difference, abs, rule.n_heads)
        if walk is not None:
            dealt = {node: size for node, (_, size) in zip(order, walk, strict=True)}
            found.append(_rated(wanted, dealt))
    queues = [list(same) for _, same in groupby(by_size, key=lambda node: wanted[node])]  # a queue a size: in any order
    limit = min((cost for cost, _ in found), default=None)
    walk = _walk(rule, [[wanted[node] for node in queue] for queue in queues], _difference, abs, rule.n_heads, limit)
    if walk is not None:
        found.append(_rated(wanted, _by_node(queues, walk)))
    return min(found, key=lambda entry: entry[0])[1]


def _rated(wanted: Sequence[int], dealt: dict[int, int]) -> tuple[int, tuple[int, ...]]:
    sizes = tuple(dealt[node] for node in range(len(wanted)))
    return sum(map(_difference, sizes, wanted)), sizes


def _difference(size: int, wanted: int) -> int:
    return abs(size - wanted)


def _by_node(queues: Sequence[Sequence[int]], walk: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Node -> size, in the order of the walk; `queues` hold nodes."""
    waiting = [iter(queue) for queue in queues]
    return {next(waiting[queue]): size for queue, size in walk}


def _order(rule: HeadRule, sizes: Sequence[int]) -> list[int] | None:
    """An order of the nodes in which each fits: their own where it will do."""
    at = 0
    for size in sizes:
        if not rule.fits(at, size):
            break
        at += size
    else:
        return list(range(len(sizes)))
    if rule.scatters:  # only parts matter
        sizes = [size % rule.group for size in sizes]
    by_size = sorted((node for node, size in enumerate(sizes) if size), key=lambda node: -sizes[node])
    queues = [list(same) for _, same in groupby(by_size, key=lambda node: sizes[node])]
    parts = replace(rule, n_heads=sum(sizes))
    walk = _walk(parts, [[sizes[node] for node in queue] for queue in queues], _difference, abs, parts.n_heads, 0)
    if walk is None:
        return None
    return [node for node, size in enumerate(sizes) if not size] + list(_by_node(queues, walk))


def _scattered(rule: HeadRule, sizes: Sequence[int], order: Sequence[int]) -> list[list[range]]:
    """Node after node takes its whole groups where the line has come to; a group of parts is placed when the first of its nodes comes."""
    group = rule.group
    group_of: dict[int, int] = {}
    dealt = 0
    for node in order:
        if sizes[node] % group:
            group_of[node] = dealt // group
            dealt += sizes[node] % group
    at = 0
    begun: dict[int, int] = {}  # group of parts -> its next head
    heads: list[list[range]] = []
    for node, size in enumerate(sizes):
        whole, part = size // group * group, size % group
        pieces = [range(at, at + whole)] if whole else []
        at += whole
        if part:
            which = group_of[node]
            if which not in begun:
                begun[which] = at
                at += group
            first = begun[which]
            begun[which] += part
            pieces.append(range(first, first + part))
        heads.append(pieces)
    return heads


def _walk(
    rule: HeadRule,
    queues: Sequence[Sequence[int]],
    cost: Callable[[int, int], int],
    least_cost: Callable[[int], int],
    largest: int,
    limit: int | None = None,
) -> list[tuple[int, int]] | None:
    """The cheapest walk along all heads: (queue, heads) of each node. None where there is none, or none was found in time.

    Args:
        queues: what nodes want; the next node is the first of any queue.
        cost: of (heads had, heads wanted).
        least_cost: of what is left, where it wants so many heads too many or (negative) too few; never more than it will be.
        largest: heads that a node may have.
        limit: a cost that is enough to know of.
    """
    start: _State = (0, (0,) * len(queues))
    left = [[sum(queue[taken:]) for taken in range(len(queue) + 1)] for queue in queues]
    n_nodes = sum(map(len, queues))
    came_from: dict[_State, tuple[_State, int, int]] = {}
    best = {start: 0}
    done: set[_State] = set()
    heap = [(0, 0, start)]  # cost at least, nodes left, state
    while heap and len(done) < _MAX_STATES:
        _, _, state = heappop(heap)
        if state in done:
            continue
        done.add(state)
        at, taken = state
        waiting = n_nodes - sum(taken)
        if not waiting:
            if at == rule.n_heads:
                return _steps(came_from, state, start)
            continue
        for number, queue in enumerate(queues):
            if taken[number] == len(queue):
                continue
            after = (*taken[:number], taken[number] + 1, *taken[number + 1 :])
            wanted = queue[taken[number]]
            rest = sum(sums[n] for sums, n in zip(left, after, strict=True))
            most = min(largest, rule.n_heads - at - (waiting - 1) * rule.unit)
            sizes = range(rule.unit, most + 1, rule.unit) if limit != 0 else [wanted] * (wanted <= most)
            for size in sizes:
                if not rule.fits(at, size) or (waiting == 1 and at + size != rule.n_heads):
                    continue
                spent = best[state] + cost(size, wanted)
                least = spent + least_cost(rest - (rule.n_heads - at - size))
                new = (at + size, after)
                if (limit is None or least <= limit) and spent < best.get(new, spent + 1):
                    best[new] = spent
                    came_from[new] = state, number, size
                    heappush(heap, (least, waiting - 1, new))
            if rule.scatters and at % rule.group == 0:
                break  # whoever comes first begins a group, now or later: groups can change places
    return None


def _steps(came_from: dict[_State, tuple[_State, int, int]], state: _State, start: _State) -> list[tuple[int, int]]:
    steps = []
    while state != start:
        state, number, size = came_from[state]
        steps.append((number, size))
    return steps[::-1]
