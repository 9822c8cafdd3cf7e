"""One group's share above another's, by permutation; and how soon random draws give a text. Numbers in, numbers out.

It does not say what is too much.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from math import comb, expm1, log1p
from typing import Literal

import numpy as np

from finetune.runlength import Floats, Ints

_ENUMERATED = 50_000  # regroupings that are all looked at; above, some are drawn
_DRAWN = 9_999
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Above:
    """One group's pooled share minus the other's, and the chance `p` of a difference as large were the groups drawn.

    `method`: `exact` over all regroupings, or `drawn`, 9,999 of them. `n`: examples of the two groups that count.
    """

    difference: float
    p: float
    method: Literal["exact", "drawn"]
    n: tuple[int, int]


def above(ones: Ints, others: Ints, seed: int = 0) -> Above | None:
    """One-sided permutation test of two groups of examples, each (n, 2): so many, of so many. None if one is empty.

    Exact for a plain yes or no (then it is Fisher's test) and where the groups are small. Examples are what is
    permuted: where the draw kept some together, add their rows up first. Examples with nothing to count are left out.
    """
    ones, others = ones[ones[:, 1] > 0], others[others[:, 1] > 0]
    if not len(ones) or not len(others):
        return None
    rows, n = np.concatenate((ones, others)), (len(ones), len(others))
    seen = float(_differences(ones.sum(0)[None], rows)[0])
    if (rows[:, 1] == 1).all():
        return Above(seen, _tail(rows[:, 0], n[0], int(ones[:, 0].sum())), "exact", n)
    chosen, exact = _regrouped(n, seed)
    sums = rows[chosen].sum(1)
    found = _differences(sums if n[0] <= n[1] else rows.sum(0) - sums, rows)
    reached = int((found >= seen - _ROUNDING).sum())
    p = reached / len(found) if exact else (1 + reached) / (1 + len(found))
    return Above(seen, p, "exact" if exact else "drawn", n)


def _differences(sums: Ints, rows: Ints) -> Floats:
    """(R,) shares of the first group minus the second's, from the first group's sums (R, 2)."""
    rest = rows.sum(0) - sums
    found: Floats = sums[:, 0] / sums[:, 1] - rest[:, 0] / rest[:, 1]
    return found


def _tail(yes: Ints, drawn: int, at_least: int) -> float:
    """Chance of `at_least` yeses among `drawn` of these rows, hypergeometric, in exact integers."""
    total, marked = len(yes), int(yes.sum())
    ways = sum(comb(marked, k) * comb(total - marked, drawn - k) for k in range(at_least, min(marked, drawn) + 1))
    return ways / comb(total, drawn)


def _regrouped(n: tuple[int, int], seed: int) -> tuple[Ints, bool]:
    """(R, m) members of the smaller group in every regrouping, or in some drawn ones; and whether these are all."""
    few, total = min(n), sum(n)
    if (count := comb(total, few)) <= _ENUMERATED:
        every = np.fromiter(chain.from_iterable(combinations(range(total), few)), dtype=np.int64)
        return every.reshape(count, few), True
    draws = np.random.default_rng(seed).random((_DRAWN, total))
    return np.argpartition(draws, few, axis=1)[:, :few], False


def extracted(log10_p: float, draws: int) -> float:
    """Chance that `draws` samples hold a text that each gives with probability p [Hayes et al. 2024, (n, p)]."""
    p = 10.0**log10_p
    return 1.0 if p >= 1 else -expm1(draws * log1p(-p))


def draws_for(log10_p: float, chance: float = 0.5) -> float:
    """How many samples hold it with this chance; inf where it is never drawn."""
    p = 10.0**log10_p
    return 1.0 if p >= 1 else log1p(-chance) / log1p(-p) if p > 0 else float("inf")
