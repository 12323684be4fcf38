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

_MAX_TRIES = 300_000
"""Before a search is given up: half a second or so."""

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
    """Numbers that can be dealt and are as even as can be: the largest as small as possible, then all near one another; the largest first.

    Args:
        n_nodes: at most ``most_nodes``.
    """
    mean = rule.n_heads // n_nodes
    for largest in range(max(mean, 1), rule.n_heads + 1):
        sizes = _line(rule, [range(1, largest + 1)] * n_nodes, lambda _, size: (size - mean) ** 2)
        if sizes:
            return tuple(sorted(sizes, reverse=True))
    raise ValueError(f"{n_nodes} nodes for {rule}")


def nearest_heads(rule: HeadRule, sizes: Sequence[int]) -> tuple[int, ...]:
    """The numbers nearest to `sizes` (least sum of differences) that can be dealt.

    The nearest of all where there are few nodes or few different sizes; for many the search is given up at some point, and they are near.

    Args:
        sizes: what was asked for; at most ``most_nodes`` of them.
    """
    wanted = [min(size, rule.n_heads) for size in sizes]  # more cannot be had: the differences beyond are the same for all
    by_size = sorted(range(len(wanted)), key=lambda node: -wanted[node])
    found = [_nearest_in_order(rule, wanted, order) for order in (range(len(wanted)), by_size)]
    best = min(found, key=lambda sizes: _distance(sizes, wanted))
    queues = _same(by_size, wanted)  # a queue a size: in any order
    walk = _walk(rule, [[wanted[node] for node in queue] for queue in queues], _distance(best, wanted) - 1)
    if walk is not None:
        dealt = _by_node(queues, walk)
        best = [dealt[node] for node in range(len(wanted))]
    return tuple(best)


def _nearest_in_order(rule: HeadRule, wanted: Sequence[int], order: Sequence[int]) -> list[int]:
    """The nearest sizes for a walk that takes the nodes in this order; with sizes free, there is one in any order."""
    reach, found = 2, list[int]()
    while not found or reach < min(_distance(found, wanted), rule.n_heads):  # no node need be further off than all together
        reach *= 2
        choices = [range(max(wanted[node] - reach, 1), wanted[node] + reach + 1) for node in order]
        sizes = dict(zip(order, _line(rule, choices, lambda place, size: abs(size - wanted[order[place]])), strict=False))
        found = [sizes[node] for node in sorted(sizes)]
    return found


def _distance(sizes: Sequence[int], wanted: Sequence[int]) -> int:
    return sum(abs(a - b) for a, b in zip(sizes, wanted, strict=True))


def _by_node(queues: Sequence[Sequence[int]], walk: Sequence[tuple[int, int]]) -> dict[int, int]:
    """Node -> size, in the order of the walk; `queues` hold nodes."""
    waiting = [iter(queue) for queue in queues]
    return {next(waiting[queue]): size for queue, size in walk}


def _same(nodes: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Nodes in order of size as runs of one size."""
    return [list(run) for _, run in groupby(nodes, key=lambda node: sizes[node])]


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
    queues = _same(by_size, sizes)
    walk = _walk(replace(rule, n_heads=sum(sizes)), [[sizes[node] for node in queue] for queue in queues], 0)
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


def _line(rule: HeadRule, choices: Sequence[range], cost: Callable[[int, int], int]) -> list[int]:
    """Sizes of the cheapest walk that takes places in order, each with a size of its range; empty if there is none.

    Args:
        cost: of (place, size).
    """
    unit = rule.unit
    layers: list[dict[int, tuple[int, int]]] = [{0: (0, 0)}]  # heads dealt -> least cost, last size
    least_left, most_left = sum(sizes.start for sizes in choices), sum(sizes.stop - 1 for sizes in choices)
    for place, sizes in enumerate(choices):
        least_left, most_left = least_left - sizes.start, most_left - sizes.stop + 1
        priced = [(size, cost(place, size)) for size in sizes if size % unit == 0]
        layer: dict[int, tuple[int, int]] = {}
        for at, (spent, _) in layers[-1].items():
            least, most = rule.n_heads - at - most_left, rule.n_heads - at - least_left
            for size, price in priced:
                if least <= size <= most and spent + price < layer.get(at + size, (spent + price + 1, 0))[0] and rule.fits(at, size):
                    layer[at + size] = spent + price, size
        layers.append(layer)
    found, at = [], rule.n_heads
    for layer in layers[:0:-1]:
        if at not in layer:
            return []
        found.append(layer[at][1])
        at -= found[-1]
    return found[::-1]


def _walk(rule: HeadRule, queues: Sequence[Sequence[int]], limit: int) -> list[tuple[int, int]] | None:
    """The walk along all heads with the least sum of differences, at most `limit`: (queue, heads) of each node.

    None where there is none, or none was found in time.

    Args:
        queues: what nodes want; the next node is the first of any queue.
    """
    start: _State = (0, (0,) * len(queues))
    n_nodes = sum(map(len, queues))
    came_from: dict[_State, tuple[_State, int, int]] = {}
    best = {start: 0}
    done: set[_State] = set()
    heap = [(0, n_nodes, start, sum(map(sum, queues)))]  # cost at least, nodes left, state, what they want
    tries = 0
    while heap and tries < _MAX_TRIES:
        _, waiting, state, left = heappop(heap)
        if state in done:
            continue
        done.add(state)
        at, taken = state
        if not waiting:
            return _steps(came_from, state, start)
        room = limit - best[state]
        most = rule.n_heads - at - (waiting - 1) * rule.unit
        for number, queue in enumerate(queues):
            if taken[number] == len(queue):
                continue
            after = (*taken[:number], taken[number] + 1, *taken[number + 1 :])
            wanted = queue[taken[number]]
            least = max(wanted - room, 1) if waiting > 1 else most
            for size in range(-(-least // rule.unit) * rule.unit, min(wanted + room, most) + 1, rule.unit):
                tries += 1
                spent = best[state] + abs(size - wanted)
                in_all = spent + abs(left - wanted - (rule.n_heads - at - size))
                new = (at + size, after)
                if in_all <= limit and rule.fits(at, size) and spent < best.get(new, spent + 1):
                    best[new] = spent
                    came_from[new] = state, number, size
                    heappush(heap, (in_all, waiting - 1, new, left - wanted))
            if rule.scatters and at % rule.group == 0:
                break  # whoever comes first begins a group, now or later: groups can change places
    return None


def _steps(came_from: dict[_State, tuple[_State, int, int]], state: _State, start: _State) -> list[tuple[int, int]]:
    steps = []
    while state != start:
        state, number, size = came_from[state]
        steps.append((number, size))
    return steps[::-1]
