"""The longest stretch of a text that stands in another almost verbatim: few signs put in, left out or exchanged.

Texts are compared without white space. Only a copy that shares some signs in a row with the other is found, and is
looked for around the longest of them. It judges nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from rapidfuzz.distance import Levenshtein

from finetune.runlength import Ints

_REACH = 200  # signs beside the first and last shared stretch that are still compared


@dataclass(frozen=True)
class Shared:
    """Signs `[at, at + size)` of a text that stand in the other from sign `there` on."""

    at: int
    there: int
    size: int


@dataclass(frozen=True)
class Copy:
    """Signs `[start, stop)` of a text that stand in the other but for so many edits; `there`: a sign of the other."""

    start: int
    stop: int
    edits: int
    there: int


def copied(text: str, other: str, shared: list[Shared], share: float) -> Copy | None:
    """The longest stretch with at most `share` edits a sign [Lee et al. 2022]. `shared`: verbatim ones, at least one.

    Texts without white space. Shared stretches far off the longest one's place are of another copy, and left out.
    """
    middle = max(shared, key=lambda one: one.size)
    offset = middle.there - middle.at
    near = [one for one in shared if abs(one.there - one.at - offset) <= share * abs(one.at - middle.at) + 2]
    low = max(0, min(one.at for one in near) - _REACH, -offset)
    high = min(len(text), max(one.at + one.size for one in near) + _REACH)
    edits, where = _edits(text[low:high], other[low + offset : max(0, high + offset)])
    start, stop = longest(edits, share)
    if start == stop:
        return None
    return Copy(low + start, low + stop, int(edits[start:stop].sum()), low + offset + int(where[start]))


def longest(edits: Ints, share: float) -> tuple[int, int]:
    """The longest `[start, stop)` with at most `share` edits a sign; the first of several. (0, 0) where none is."""
    excess = np.concatenate(([0.0], np.cumsum(edits - share)))
    highest = np.maximum.accumulate(excess)
    starts = np.searchsorted(highest, excess - 1e-9)  # the first prefix from which on the mean is small enough
    lengths = np.arange(len(excess)) - starts
    stop = int(lengths.argmax())
    return (int(starts[stop]), stop) if lengths[stop] > 0 else (0, 0)


def _edits(text: str, other: str) -> tuple[Ints, Ints]:
    """(signs,) edits at or before each sign of a text in a shortest alignment, and where it stands in the other."""
    edits, where = np.zeros(len(text) + 1, dtype=np.int64), np.zeros(len(text) + 1, dtype=np.int64)
    for step in Levenshtein.opcodes(text, other):
        size, put_in = step.src_end - step.src_start, step.dest_end - step.dest_start
        if step.tag == "insert":
            edits[step.src_start] += put_in
            continue
        edits[step.src_start : step.src_end] += step.tag != "equal"
        where[step.src_start : step.src_end] = step.dest_start + np.minimum(np.arange(size), put_in)
    return edits[:-1], where[:-1]
