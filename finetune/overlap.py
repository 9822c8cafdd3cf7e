"""What texts have in common: words, spans of words, near-copies. Exact counts; judges nothing, knows no example."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence, Set
from itertools import chain
from typing import NamedTuple, TypeVar

# Written without spaces, so each sign counts as a word: Thai to Lao, kana, Han.
_SIGNS = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Vowel signs and accents that stand inside words and that \w leaves out: Latin, Hebrew, Arabic, Indic.
_JOINERS = "'\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0670\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(f"[{_SIGNS}]|[^\\W{_SIGNS}]+(?:[{_JOINERS}]+[^\\W{_SIGNS}]+)*")


_Item = TypeVar("_Item", bound=Hashable)


class Span(NamedTuple):
    """Items `[start, stop)` of a list that also stand, in this order, in list number `other`."""

    start: int
    stop: int
    other: int


def words(text: str) -> list[str]:
    """The words of a text in one case, without punctuation; of scripts without spaces, each sign."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'"))


def placed(text: str) -> list[tuple[str, int, int]]:
    """The same words, each with the characters `[start, stop)` of the text that it stands on."""
    found = _WORD.finditer(text.replace("\u2019", "'"))
    return [(unicodedata.normalize("NFKC", one.group()).casefold(), *one.span()) for one in found]


def shingles(items: Sequence[str], size: int = 3) -> frozenset[tuple[str, ...]]:
    """All runs of `size` neighbours; of a shorter list the whole, of an empty one nothing."""
    if len(items) <= size:
        return frozenset([tuple(items)] if items else [])
    return frozenset(zip(*(items[i:] for i in range(size)), strict=False))


def jaccard(one: Set[Hashable], other: Set[Hashable]) -> float:
    """Shared items as a share of all items, in [0, 1]; two empty sets share nothing."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


def own(sets: Sequence[Set[_Item]]) -> list[Set[_Item]]:
    """The sets without what more than half of them hold."""
    # In a ring, an item of more than half of the sets is in two neighbours: only such items need counting.
    beside = frozenset().union(*(one & sets[i - 1] for i, one in enumerate(sets)))
    counts = Counter(chain.from_iterable(one & beside for one in sets))
    usual = {item for item, count in counts.items() if count > len(sets) / 2}
    return [one - usual for one in sets] if usual else list(sets)


def alike(sets: Sequence[Set[Hashable]], least: float) -> Iterator[tuple[int, int, float]]:
    """(i, j, Jaccard) of every pair i < j that shares at least `least` > 0.

    Prefix filter [Bayardo, Ma, Srikant 2007]: such a pair meets among the rarest items of both, so few are compared.
    """
    counts = Counter(chain.from_iterable(sets))
    shared = sorted((item for item, count in counts.items() if count > 1), key=counts.__getitem__)
    rank: dict[Hashable, int] = {item: place for place, item in enumerate(shared)}
    seen: defaultdict[int, list[int]] = defaultdict(list)
    for j, one in enumerate(sets):
        ours = sorted(rank[item] for item in one if item in rank)
        # Items of one set only come first in that order and need no look-up.
        first = ours[: max(0, len(ours) - math.ceil(least * len(one) - 1e-9) + 1)]
        for i in sorted({i for item in first for i in seen[item]}):
            if (share := jaccard(sets[i], one)) >= least:
                yield i, j, share
        for item in first:
            seen[item].append(j)


def repeated(lists: Sequence[Sequence[Hashable]], least: int) -> list[list[Span]]:
    """For each list its longest stretches, of `least` items or more, that another list holds too."""
    runs = [[hash(one[i : i + least]) for i in range(len(one) - least + 1)] for one in map(tuple, lists)]
    seen: set[int] = set()
    shared: set[int] = set()
    for mine in map(set, runs):
        shared |= mine & seen
        seen |= mine
    homes: defaultdict[int, list[int]] = defaultdict(list)
    for number, mine in enumerate(map(set, runs)):
        for run in mine & shared:
            homes[run].append(number)
    return [list(_spans(number, mine, homes, least)) for number, mine in enumerate(runs)]


def _spans(number: int, mine: list[int], homes: dict[int, list[int]], least: int) -> Iterator[Span]:
    span: Span | None = None
    for at, run in enumerate(mine) if homes else ():
        if run not in homes:
            continue
        if span and at <= span.stop:
            span = span._replace(stop=at + least)
            continue
        if span:
            yield span
        span = Span(at, at + least, next(home for home in homes[run] if home != number))
    if span:
        yield span
