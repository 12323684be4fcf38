"""Text to token ids from a `.t` file alone: greedy merging by highest score.

The answer is that of distributed-llama's encoder, so that our root and a C++ root make the same ids of the same text:

1. At each byte, a special token that the text spells out there is taken whole; among several, the one with the lowest id.
2. Other bytes become tokens one by one (a byte without a token of its own waits for those after it).
3. Of all neighbouring pairs whose bytes together are a regular token, the one with the highest score is merged, the leftmost of
   equals; again, until no pair is left.

The C++ program looks at every pair again after each merge, which is quadratic. Here the pairs wait in a heap, and the tokens are a
doubly linked list: n log n. A pair that has changed since it was put there is noticed when it comes out.

No token can reach over two bytes that are neighbours in no piece. The text falls apart there into stretches, words mostly, that
are merged each for itself, and once however often they occur: prose takes a tenth of the time, with the same outcome.

Three things differ on purpose. Bytes that no token can say are left out with a warning, where the C++ program aborts. Where a
vocabulary's special tokens come first, they are special here (see `special_ids`). And SentencePiece's vocabularies, of which that program
makes other ids than the model was taught, are read by `dairllm.text.sentence_merging`.
"""

import re
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

import structlog

__all__ = ["GreedyMerging", "special_ids", "stand_in_ids"]

_LOWEST_SCORE = -1e10
"""A piece that scores no higher is never the outcome of a merge."""

_POSITION_BITS = 40
"""A heap entry is one integer, rank above position: integers compare several times faster than tuples."""

_log = structlog.get_logger(__name__)


def special_ids(pieces: Sequence[bytes], bos_id: int | None) -> frozenset[int]:
    """The ids of special tokens, which a `.t` file does not name.

    The ids from `bos_id` on, where all single-byte tokens lie below it. Also the ids before the first single-byte token: longer
    regular pieces are made of bytes and come after them, so what comes before can only be special.
    """
    first_byte, last_byte = _byte_range(pieces)
    special = set(range(first_byte))
    if bos_id is not None and bos_id > last_byte:
        special.update(range(bos_id, len(pieces)))
    return frozenset(special)


def stand_in_ids(pieces: Sequence[bytes], bos_id: int | None) -> frozenset[int]:
    """The one regular token that a file calls `bos_id` for the C++ program's sake, or none.

    That program takes all ids below `bos_id`, and no others, for regular. So a vocabulary whose special tokens come first is written
    with its last id as `bos_id`. It is then a special token to an encoder, but the end of a word to who reads an answer.
    """
    first_byte, last_byte = _byte_range(pieces)
    if bos_id is not None and first_byte > 0 and bos_id == len(pieces) - 1 > last_byte:
        return frozenset({bos_id})
    return frozenset()


def _byte_range(pieces: Sequence[bytes]) -> tuple[int, int]:
    """The first and the last id of a single-byte token."""
    single = [token for token, piece in enumerate(pieces) if len(piece) == 1]
    return (single[0], single[-1]) if single else (0, -1)


class GreedyMerging:
    """Encoder made of a vocabulary's pieces and scores.

    Args:
        pieces: the bytes of every token, by id.
        scores: the score of every token, by id.
        special: ids that are taken whole where the text spells them out, and never come of a merge.
        ids: the tokens that merges may make, by piece; those that the C++ program finds, where they are not given.
    """

    def __init__(
        self, pieces: Sequence[bytes], scores: Sequence[float], special: frozenset[int], ids: dict[bytes, int] | None = None
    ) -> None:
        self._pieces = pieces
        self._ids = _regular_ids(pieces, special) if ids is None else ids
        joined = b"\0".join(self._ids)
        self._neighbours = set(pairwise(joined))  # those with the zeros between are too many, and do no harm
        self._rank = _ranks(scores)
        self._single = [self._ids.get(bytes([value]), -1) for value in range(256)]
        self._longest = max(map(len, self._ids), default=0)
        spelled = [(pieces[token], token) for token in sorted(special) if pieces[token]]
        self._special_ids = dict(reversed(spelled))  # the lowest id of equal pieces
        self._special = re.compile(b"|".join(re.escape(piece) for piece, _ in spelled)) if spelled else None

    def encode(self, text: bytes) -> list[int]:
        """Ids of `text`; adds nothing to it."""
        tokens = self._first_tokens(text)
        known: dict[tuple[int, ...], list[int]] = {}
        merged: list[int] = []
        for stretch in self._stretches(tokens):
            if stretch not in known:
                known[stretch] = self._merge(list(stretch))
            merged += known[stretch]
        return merged

    def _first_tokens(self, text: bytes) -> list[int]:
        """Specials that are spelled out, and of all other bytes the shortest tokens."""
        tokens: list[int] = []
        lost = 0
        start = 0
        for match in self._special.finditer(text) if self._special else ():
            lost += self._split(text, start, match.start(), tokens)
            tokens.append(self._special_ids[match.group()])
            start = match.end()
        lost += self._split(text, start, len(text), tokens)
        if lost:
            _log.warning("bytes that no token of the vocabulary can say were left out", n_bytes=lost)
        return tokens

    def _split(self, text: bytes, start: int, end: int, tokens: list[int]) -> int:
        """Append the tokens of text[start:end]; returns how many bytes no token could say."""
        singles = [self._single[value] for value in memoryview(text)[start:end]]
        if -1 not in singles:
            tokens += singles
            return 0
        lost = 0
        while start < end:
            for stop in range(start + 1, min(start + self._longest, end) + 1):
                token = self._ids.get(text[start:stop], -1)
                if token >= 0:
                    tokens.append(token)
                    start = stop
                    break
            else:
                lost += 1
                start += 1
        return lost

    def _stretches(self, tokens: list[int]) -> Iterator[tuple[int, ...]]:
        """The runs of `tokens` that no merge can join to one another."""
        pieces, neighbours = self._pieces, self._neighbours
        start = 0
        for place, (left, right) in enumerate(pairwise(tokens), 1):
            if (pieces[left][-1], pieces[right][0]) not in neighbours:
                yield tuple(tokens[start:place])
                start = place
        yield tuple(tokens[start:])

    def _merge(self, tokens: list[int]) -> list[int]:
        pieces, ids, rank = self._pieces, self._ids, self._rank
        count = len(tokens)
        position_mask = (1 << _POSITION_BITS) - 1
        following = list(range(1, count + 1))
        previous = list(range(-1, count - 1))
        rank_at = [-1] * count  # of the pair that begins at a position; -1: none
        heap = []
        for left in range(count - 1):
            merged = ids.get(pieces[tokens[left]] + pieces[tokens[left + 1]], -1)
            if merged >= 0 and rank[merged] >= 0:
                rank_at[left] = rank[merged]
                heap.append(rank[merged] << _POSITION_BITS | left)
        heapify(heap)
        while heap:
            entry = heappop(heap)
            left = entry & position_mask
            if rank_at[left] != entry >> _POSITION_BITS:
                continue  # one of the two is part of another token by now
            right = following[left]
            tokens[left] = ids[pieces[tokens[left]] + pieces[tokens[right]]]
            tokens[right] = rank_at[right] = rank_at[left] = -1
            after = following[left] = following[right]
            before = previous[left]
            if after < count:
                previous[after] = left
                merged = ids.get(pieces[tokens[left]] + pieces[tokens[after]], -1)
                if merged >= 0 and rank[merged] >= 0:
                    rank_at[left] = rank[merged]
                    heappush(heap, rank[merged] << _POSITION_BITS | left)
            if before >= 0:
                merged = ids.get(pieces[tokens[before]] + pieces[tokens[left]], -1)
                rank_at[before] = rank[merged] if merged >= 0 else -1
                if rank_at[before] >= 0:
                    heappush(heap, rank_at[before] << _POSITION_BITS | before)
        return [token for token in tokens if token >= 0]


def _ranks(scores: Sequence[float]) -> list[int]:
    """Place of each score from the highest (0) down, equal scores sharing it; -1 for one that is never merged into."""
    usable = sorted({score for score in scores if score > _LOWEST_SCORE}, reverse=True)
    place = {score: rank for rank, score in enumerate(usable)}
    return [place.get(score, -1) for score in scores]


def _regular_ids(pieces: Sequence[bytes], special: frozenset[int]) -> dict[bytes, int]:
    n_regular = len(pieces)
    while n_regular - 1 in special:
        n_regular -= 1
    return {piece: token for piece, token in _ids_by_piece(pieces[:n_regular]).items() if token not in special}


def _ids_by_piece(pieces: Sequence[bytes]) -> dict[bytes, int]:
    """The id that the C++ program finds for each piece.

    A vocabulary may have pieces twice. Which of them the C++ program takes is decided by how the C library bisects the sorted pieces: it
    ends at the first hit. (Those that stem from SentencePiece have them; `sentence_merging` reads these as they were meant.)
    """
    once = {piece: token for token, piece in enumerate(pieces)}
    if len(once) == len(pieces):
        return once
    order = sorted(range(len(pieces)), key=pieces.__getitem__)  # stable, as the C library's sort is
    found: dict[bytes, int] = {}
    first = 0
    while first < len(order):
        piece = pieces[order[first]]
        end = first + 1
        while end < len(order) and pieces[order[end]] == piece:
            end += 1
        found[piece] = order[first if end - first == 1 else _bisect(first, end, len(order))]
        first = end
    return found


def _bisect(first: int, end: int, count: int) -> int:
    """Where a bisection of `count` places ends that looks for any of first..end-1."""
    low, high = 0, count
    while True:
        middle = (low + high) // 2
        if middle < first:
            low = middle + 1
        elif middle >= end:
            high = middle
        else:
            return middle
