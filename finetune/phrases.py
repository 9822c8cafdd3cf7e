"""Stock phrases, loops and repeated pairs of words in what a model wrote, beside its base and the data's author.

Counts words; asks no model and judges nothing. A figure of nothing is None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from finetune import manner
from finetune.overlap import words

_UNIT = 40  # words: the longest stretch whose repetition is looked for
_TIMES = 3  # in a row, for a stretch of several words ...
_WORDS = 8  # ... and at least so many words in all; of single words more are needed than a list or a chorus has
_RUNAWAY = re.compile(r"(\S{1,20}?)\1{15,}")  # !!!!!!!!!!!!!!!! and the like, which are no words


@dataclass(frozen=True)
class Manner:
    """How a pile of texts is written. `stock` per 1,000 words; `distinct_2`: share of pairs of words that are new."""

    texts: int
    words: int
    stock: float | None
    looped: int
    distinct_2: float | None
    median_words: float | None


def manner_of(texts: Sequence[str], first: int | None = None) -> Manner:
    """Of texts taken together. `first`: only so many pairs of words enter `distinct_2`, which falls with length."""
    some = [words(text) for text in texts]
    total = sum(map(len, some))
    return Manner(
        texts=len(texts),
        words=total,
        stock=1000 * sum(map(stock, texts)) / total if total else None,
        looped=sum(loop(text) is not None for text in texts),
        distinct_2=distinct([pair for one in some for pair in _pairs(one)][:first]),
        median_words=median(map(len, some)) if some else None,
    )


def pairs(texts: Iterable[str]) -> int:
    """How many pairs of neighbouring words there are: two piles are compared over the smaller number."""
    return sum(len(_pairs(words(text))) for text in texts)


def stock(text: str) -> int:
    """How often stock phrases of chat models stand in a text, its opening included."""
    some = words(text)
    flat = f" {' '.join(some)} "
    known = manner.stock(text, some)
    return sum(max(1, flat.count(f" {' '.join(words(phrase))} ")) for phrase in known)


def loop(text: str) -> str | None:
    """The stretch a text goes on repeating at its end or anywhere, or None."""
    some = words(text)
    for size in range(1, min(_UNIT, len(some) // _TIMES) + 1):
        times = max(_TIMES, -(-_WORDS // size))
        run = 0  # words that equal the one `size` before them
        for place in range(size, len(some)):
            run = run + 1 if some[place] == some[place - size] else 0
            if run >= size * (times - 1):
                return " ".join(some[place - size + 1 : place + 1])
    found = _RUNAWAY.search(text)
    return found[1] if found and not found[1].isspace() and set(found[1]) - set("-=_*.#") else None


def distinct(some: Sequence[tuple[str, str]]) -> float | None:
    """Share of different ones [Li et al. 2016, distinct-2]."""
    return len(set(some)) / len(some) if some else None


def _pairs(some: Sequence[str]) -> list[tuple[str, str]]:
    return list(pairwise(some))
