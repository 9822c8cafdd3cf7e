"""Runs and windows over per-token numbers: arrays in, arrays out, O(T). Knows no model, no text and no threshold.

`parts` (T,) never falls and says which answer a token belongs to: no run and no window goes from one into the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows `[start, stop)` of tokens, none empty; both arrays (W,)."""

    starts: Ints
    stops: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> Ints:
        """(W,) tokens of each."""
        return self.stops - self.starts


def lengths(hits: Bools, parts: Ints) -> Ints:
    """(T,) hits in a row from each token on; 0 where it is missed."""
    misses = np.append(np.flatnonzero(~hits), len(hits))
    at = np.arange(len(hits))
    found: Ints = np.minimum(misses[np.searchsorted(misses, at)], _borders(parts)) - at
    return found


def of_tokens(parts: Ints, size: int) -> Windows:
    """Every window of `size` tokens."""
    starts = np.flatnonzero(np.arange(len(parts)) + size <= _borders(parts))
    return Windows(starts, starts + size)


def of_weight(parts: Ints, weights: Ints, least: int) -> Windows:
    """From each token the shortest window whose weights add up to `least` > 0, where there is one."""
    before = np.concatenate(([0], np.cumsum(weights)))
    stops = np.searchsorted(before, before[:-1] + least)
    starts = np.flatnonzero(stops <= _borders(parts))
    return Windows(starts, stops[starts])


def of_parts(parts: Ints, least: int) -> Windows:
    """Each part that has `least` tokens or more, as one window."""
    starts = np.flatnonzero(np.diff(parts, prepend=-1))
    stops = _borders(parts)[starts]
    kept = stops - starts >= least
    return Windows(starts[kept], stops[kept])


def joined(*some: Windows) -> Windows:
    """All of them, in the order given."""
    return Windows(np.concatenate([one.starts for one in some]), np.concatenate([one.stops for one in some]))


def all_of(flags: Bools, windows: Windows) -> Bools:
    """(W,) whether every token of a window is flagged."""
    before = np.concatenate(([0], np.cumsum(flags)))
    found: Bools = before[windows.stops] - before[windows.starts] == windows.sizes
    return found


def totals(values: Floats, windows: Windows) -> Floats:
    """(W,) sums; -inf where a value is. The rounding is that of one float64 sum over all T values."""
    lost = np.isneginf(values)
    before = np.concatenate(([0.0], np.cumsum(np.where(lost, 0.0, values))))
    return np.where(all_of(~lost, windows), before[windows.stops] - before[windows.starts], -np.inf)


def least(values: Floats, windows: Windows) -> Floats:
    """(W,) smallest values; O(W x size), in C."""
    if not len(windows):
        return np.zeros(0)
    edges = np.stack((windows.starts, windows.stops), axis=1).ravel()
    found: Floats = np.minimum.reduceat(np.append(values, np.inf), edges)[::2]
    return found


def _borders(parts: Ints) -> Ints:
    """(T,) where the part of each token stops."""
    return np.searchsorted(parts, parts, side="right")
