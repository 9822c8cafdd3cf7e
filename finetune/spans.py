"""Where a text stands verbatim in others: from every sign of it on, the longest stretch, and one place it stands at.

White space does not count; all other signs must be equal. An index over the others is sorted once, in n log n for
ordinary text; texts are then looked up without another pass over it. It knows no word, token or example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from finetune.runlength import Bools, Ints

_SPACE = np.array([chr(point).isspace() for point in range(0x3001)] + [False])  # none lies higher
_END, _CUT, _FIRST = 0, 1, 2  # codes: after the last sign, between two texts, of the first sign of the alphabet


class Place(NamedTuple):
    """A sign of an indexed text: the text's number, which of its signs, and the character."""

    text: int
    sign: int
    character: int


@dataclass(frozen=True, eq=False)
class Matches:
    """A text of M signs, looked up. `places` (M,): the character of each sign; `lengths` (M,): signs that stand
    elsewhere from it on; `homes` (M,): a sign of the index where they do, see `Index.place`.
    """

    places: Ints
    lengths: Ints
    homes: Ints

    def starts(self, least: int) -> Ints:
        """Signs where a stretch of `least` or more begins that is no mere end of the one before."""
        goes_on = np.zeros(len(self.lengths), dtype=bool)
        goes_on[1:] = self.lengths[1:] == self.lengths[:-1] - 1
        found: Ints = np.flatnonzero(~goes_on & (self.lengths >= max(least, 1)))
        return found


class Index:
    """A suffix array over texts [Manber, Myers 1990], by doubling, with only ties sorted again [Larsson, Sadakane].

    10 MB of text take some seconds, and under 1 GiB while it is built.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        points, self._places, self._starts = _joined(texts)
        seen = np.zeros(int(points.max(initial=0)) + 2, dtype=bool)  # the last stands for all that lies higher
        seen[points] = True
        self._unknown = _FIRST + int(seen.sum())
        self._codes = np.where(seen, np.cumsum(seen) + _FIRST - 1, self._unknown)
        self._bits = self._unknown.bit_length()
        self._width = 62 // self._bits  # a key and one more fit into 63
        codes = self._codes[points]
        codes[self._starts[1:] - 1] = _CUT
        self._keys = self._packed(codes, _END)
        self._order = _suffixes(self._keys[:-1], self._width)

    def place(self, sign: int) -> Place:
        """Of a sign of the index, as `Matches.homes` counts them."""
        text = int(np.searchsorted(self._starts, sign, side="right")) - 1
        return Place(text, sign - int(self._starts[text]), int(self._places[sign]))

    def within(self, text: int, sign: int) -> Place:
        """The place of one of the signs of an indexed text."""
        return self.place(int(self._starts[text]) + sign)

    def find(self, texts: Sequence[str]) -> list[Matches]:
        """Look up texts, in order. No stretch reaches over the end of an indexed text."""
        points, places, starts = _joined(texts)
        codes = self._codes[np.minimum(points, len(self._codes) - 1)]
        codes[starts[1:] - 1] = self._unknown
        lengths, homes = self._look_up(self._packed(codes, self._unknown))
        ends = np.append(starts[1:] - 1, len(codes))
        return [
            Matches(places[a:b], lengths[a:b], homes[a:b]) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)
        ]

    def _packed(self, codes: Ints, beyond: int) -> Ints:
        """(n + 1,) as many codes from each sign on as one number holds; `beyond` stands after the last."""
        count = len(codes) + 1
        row = np.concatenate((codes, np.full(self._width, beyond)))
        keys = np.zeros(count, dtype=np.int64)
        for step in range(self._width):
            keys <<= self._bits
            keys |= row[step : step + count]
        return keys

    def _look_up(self, asked: Ints) -> tuple[Ints, Ints]:
        """(signs,) lengths and homes: slots of the array that agree so far are narrowed, some signs at a time."""
        count = len(asked) - 1
        lengths, homes = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        live = np.arange(count if len(self._order) else 0)
        low, high = np.zeros_like(live), np.full_like(live, len(self._order))
        depth = 0
        while len(live):
            keys = asked[np.minimum(live + depth, count)]
            first = self._slot(low, high, depth, keys)
            last = self._slot(first, high, depth, keys + 1)
            met = first < last
            ended = ~met
            some, at = self._nearest(low[ended], high[ended], first[ended], depth, keys[ended])
            lengths[live[ended]], homes[live[ended]] = depth + some, at
            live, low, high, depth = live[met], first[met], last[met], depth + self._width
        return lengths, homes

    def _at(self, slots: Ints, depth: int) -> Ints:
        """What stands `depth` signs after the beginning of the suffix in each slot."""
        return self._keys[np.minimum(self._order[slots] + depth, len(self._order))]

    def _slot(self, low: Ints, high: Ints, depth: int, keys: Ints) -> Ints:
        """The first slot in `[low, high)` that is not below the key; by halving, all at once."""
        low, high = low.copy(), high.copy()
        while (open_ := np.flatnonzero(low < high)).size:
            middle = (low[open_] + high[open_]) // 2
            below = self._at(middle, depth) < keys[open_]
            low[open_[below]] = middle[below] + 1
            high[open_[~below]] = middle[~below]
        return low

    def _nearest(self, low: Ints, high: Ints, first: Ints, depth: int, keys: Ints) -> tuple[Ints, Ints]:
        """Of the two neighbours of where the key would stand: how many codes more agree at best, and that home."""
        found = []
        for slots in (first - 1, first):
            inside = (slots >= low) & (slots < high)
            held = np.where(inside, slots, 0)
            found.append((np.where(inside, self._common(self._at(held, depth), keys), -1), self._order[held]))
        (one, here), (other, there) = found
        return np.maximum(np.maximum(one, other), 0), np.where(one >= other, here, there)

    def _common(self, ones: Ints, others: Ints) -> Ints:
        """How many leading codes two keys share."""
        shifts = self._bits * np.arange(self._width)
        equal: Ints = ((ones[:, None] >> shifts) == (others[:, None] >> shifts)).sum(1)
        return equal


def _joined(texts: Sequence[str]) -> tuple[Ints, Ints, Ints]:
    """(code points, characters within the text, first sign of each text) without white space, a sign between texts."""
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    begins = np.concatenate(([0], np.cumsum(lengths + 1)[:-1])) if len(texts) else lengths
    raw = np.frombuffer("\0".join(texts).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    kept = np.flatnonzero(~_SPACE[np.minimum(raw, len(_SPACE) - 1)])
    starts = np.searchsorted(kept, begins)
    places = kept - np.repeat(begins, np.diff(np.append(starts, len(kept))))
    return raw[kept], places.astype(np.int32), starts


def _suffixes(keys: Ints, width: int) -> Ints:
    """(n,) where the suffixes begin, in order. `keys`: the first `width` codes of each as one number."""
    count = len(keys)
    order = np.argsort(keys, kind="stable")
    slots = np.arange(count)
    rank = np.full(count + 1, -1)
    new = _changes(keys[order])
    while True:
        rank[order[slots]] = slots[np.maximum.accumulate(np.where(new, np.arange(len(slots)), 0))]
        slots = slots[~(new & np.append(new[1:], True))]
        if not len(slots):
            return order
        there = order[slots]
        pairs = rank[there] * (count + 1) + rank[np.minimum(there + width, count)] + 1
        turn = np.argsort(pairs, kind="stable")
        order[slots] = there[turn]
        new, width = _changes(pairs[turn]), 2 * width


def _changes(values: Ints) -> Bools:
    """(n,) whether a value differs from the one before."""
    found = np.ones(len(values), dtype=bool)
    found[1:] = values[1:] != values[:-1]
    return found
