"""What can be dealt, against trying everything; what is said to be nearest, against all that can be dealt."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise, permutations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dairllm.graph.packing import HeadRule, deal_heads, even_heads, most_nodes, nearest_heads

SMALL = [HeadRule(n, group, unit) for n in (6, 8, 9, 12) for group in range(1, n + 1) for unit in (1, 2, 4) if n % group == n % unit == 0]
RULES = st.sampled_from(SMALL)


@cache
def splits(total: int, n_nodes: int, unit: int) -> tuple[tuple[int, ...], ...]:
    """All ways to deal `total` heads."""
    if n_nodes == 1:
        return ((total,),) if total >= unit else ()
    return tuple((first, *rest) for first in range(unit, total, unit) for rest in splits(total - first, n_nodes - 1, unit))


def fills_groups(parts: tuple[int, ...], group: int) -> bool:
    """Whether parts can be put together to groups: tried one group after the other, whichever way."""
    if not parts:
        return True

    def ways(space: int, rest: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if space == 0:
            yield rest
        for at, part in enumerate(rest):
            if part <= space:
                yield from ways(space - part, rest[:at] + rest[at + 1 :])

    return any(fills_groups(rest, group) for rest in ways(group - parts[0], parts[1:]))


@cache
def can_be_dealt(rule: HeadRule, sizes: tuple[int, ...]) -> bool:
    """By the rule's own words; `sizes` in descending order."""
    if rule.group % rule.unit == 0:
        return fills_groups(tuple(size % rule.group for size in sizes if size % rule.group), rule.group)
    return any(lie_together(rule, order) for order in set(permutations(sizes)))


def lie_together(rule: HeadRule, sizes: Sequence[int]) -> bool:
    at = 0
    for size in sizes:
        if at % rule.group and at // rule.group != (at + size - 1) // rule.group:
            return False
        at += size
    return True


def possible(rule: HeadRule, n_nodes: int) -> list[tuple[int, ...]]:
    return [sizes for sizes in splits(rule.n_heads, n_nodes, rule.unit) if can_be_dealt(rule, tuple(sorted(sizes, reverse=True)))]


def check_dealt(rule: HeadRule, sizes: Sequence[int], heads: Sequence[Sequence[range]]) -> None:
    """Every head once, and for each node what C++ attention and blocks of weights ask for."""
    assert sorted(head for pieces in heads for piece in pieces for head in piece) == list(range(rule.n_heads))
    assert len(heads) == len(sizes)
    for size, pieces in zip(sizes, heads, strict=True):
        mine = [head for piece in pieces for head in piece]
        assert len(mine) == size
        kv_heads = list(dict.fromkeys(head // rule.group for head in mine))
        assert [head // rule.group for head in mine] == [kv_heads[at // rule.group] for at in range(size)]
        for first in range(0, size, rule.unit):  # a block of weights holds neighbours only, and begins at a block of the file
            assert mine[first] % rule.unit == 0
            assert mine[first : first + rule.unit] == list(range(mine[first], mine[first] + rule.unit))
    at = heads[0][0].start  # node 0 has one piece
    for piece in heads[0]:
        assert piece.start == at
        at = piece.stop


@given(RULES, st.integers(1, 6), st.data())
def test_all_that_can_be_dealt_is_dealt(rule: HeadRule, n_nodes: int, data: st.DataObject) -> None:
    ways = splits(rule.n_heads, n_nodes, rule.unit)
    assume(ways)
    sizes = data.draw(st.sampled_from(ways))
    heads = deal_heads(rule, sizes)
    assert (heads is not None) == can_be_dealt(rule, tuple(sorted(sizes, reverse=True)))
    if heads is not None:
        check_dealt(rule, sizes, heads)


@pytest.mark.parametrize("rule", SMALL, ids=str)
def test_as_many_nodes_as_can_be(rule: HeadRule) -> None:
    counts = [n for n in range(1, 7) if possible(rule, n)]
    assert counts == list(range(1, min(most_nodes(rule), 6) + 1))


@pytest.mark.parametrize("rule", SMALL, ids=str)
def test_even_heads_are_as_even_as_can_be(rule: HeadRule) -> None:
    for n_nodes in range(1, min(most_nodes(rule), 6) + 1):
        found = even_heads(rule, n_nodes)
        assert deal_heads(rule, found) is not None
        assert list(found) == sorted(found, reverse=True)
        best = min((max(sizes), sum(size * size for size in sizes)) for sizes in possible(rule, n_nodes))
        assert (max(found), sum(size * size for size in found)) == best


@settings(deadline=None)
@given(RULES, st.lists(st.integers(0, 15), min_size=1, max_size=5))
def test_the_nearest_is_the_nearest(rule: HeadRule, wanted: list[int]) -> None:
    assume(len(wanted) <= most_nodes(rule))

    def distance(sizes: Sequence[int]) -> int:
        return sum(abs(a - b) for a, b in zip(sizes, wanted, strict=True))

    found = nearest_heads(rule, wanted)
    assert sum(found) == rule.n_heads
    assert deal_heads(rule, found) is not None
    assert distance(found) == min(map(distance, possible(rule, len(wanted))))


@st.composite
def _large(draw: st.DrawFn) -> tuple[HeadRule, tuple[int, ...]]:
    """Up to 256 heads and 64 nodes, dealt by filling groups with parts and giving whole groups away."""
    group = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 32]))
    n_groups = draw(st.integers(1, 256 // group))
    sizes: list[int] = []
    whole = 0
    for _ in range(n_groups):
        cuts = draw(st.sets(st.integers(1, group - 1), max_size=4)) if group > 1 and len(sizes) < 50 else set[int]()
        if not cuts:
            whole += 1
            continue
        edges = [0, *sorted(cuts), group]
        sizes += [b - a for a, b in pairwise(edges)]
    while whole:
        some = draw(st.integers(1, whole))
        whole -= some
        if sizes and (len(sizes) >= 64 or draw(st.booleans())):
            sizes[draw(st.integers(0, len(sizes) - 1))] += some * group
        else:
            sizes.append(some * group)
    return HeadRule(n_groups * group, group, 1), tuple(draw(st.permutations(sizes)))


@settings(deadline=None)
@given(_large())
def test_large_clusters_are_dealt(case: tuple[HeadRule, tuple[int, ...]]) -> None:
    rule, sizes = case
    heads = deal_heads(rule, sizes)
    assert heads is not None
    check_dealt(rule, sizes, heads)


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([1, 2, 4, 8, 16, 64]), st.integers(1, 64), st.data())
def test_large_clusters_have_even_and_near_numbers(group: int, n_nodes: int, data: st.DataObject) -> None:
    """What is found can be dealt, also where the search for the nearest is given up."""
    rule = HeadRule(256, group, 1)
    found = even_heads(rule, n_nodes)
    assert (len(found), sum(found), min(found) > 0) == (n_nodes, 256, True)
    assert deal_heads(rule, found) is not None
    wanted = data.draw(st.lists(st.integers(0, 300), min_size=n_nodes, max_size=n_nodes))
    near = nearest_heads(rule, wanted)
    assert (len(near), sum(near), min(near) > 0) == (n_nodes, 256, True)
    assert deal_heads(rule, near) is not None


def test_heads_two_at_a_time_in_groups_of_three() -> None:
    """Blocks and groups that do not fit together: nodes have what lies together, in an order of their own."""
    rule = HeadRule(12, 3, 2)
    assert deal_heads(rule, [2, 4, 4, 2]) == [[range(4, 6)], [range(4)], [range(6, 10)], [range(10, 12)]]
    assert deal_heads(rule, [2, 2, 8]) is None
