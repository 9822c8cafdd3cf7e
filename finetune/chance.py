"""What a few numbers can tell: bounds of a mean and of a rate, and how two rankings agree.

Standard library only. Bounds are one-sided 95 % each, so both together are a 90 % interval. Nothing is judged here,
and a figure of nothing is None, never 0. Coverage is measured by tests/bench/interval_coverage.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

LEVEL = 0.95
_SKEWED = 2.0  # an exponential law's; beyond it coverage was measured below 93 %


@dataclass(frozen=True)
class Interval:
    """A figure over `n` examples or trials. `approximate`: the data are too skewed for the bounds to hold 93 %."""

    value: float
    low: float
    high: float
    n: int
    approximate: bool = False


def mean(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """A mean and its bounds: Student's t, widened for skew. None for fewer than two values, or one not finite.

    Each bound holds with probability `level`.

    The wider, on each side, of t and of t after Hall's cubic transformation [Hall 1992, J. R. Stat. Soc. B 54:221]. The
    skewness of a small sample is too small by far, so it is stretched by 1 + 6/n, found by simulation. Closed form: no
    draws, and as good as a studentised bootstrap.
    """
    n, scale = len(values), max(map(abs, values), default=0.0)
    if n < 2 or not math.isfinite(scale) or any(map(math.isnan, values)):
        return None
    scaled = [value / scale for value in values] if scale else [0.0] * n
    middle = fmean(scaled)
    error = math.sqrt(fmean((one - middle) ** 2 for one in scaled) / (n - 1))
    skew = _skewness(scaled, middle) * (1 + 6 / n)
    t = t_quantile(level, n - 1)
    low = (middle - error * max(t, _untransformed(t, skew, n))) * scale
    high = (middle + error * max(t, -_untransformed(-t, skew, n))) * scale
    if not math.isfinite(high - low):
        return None
    return Interval(middle * scale, low, high, n, abs(skew) > _SKEWED)


def p_above(values: Sequence[float]) -> float | None:
    """How often so high a mean comes by luck where the true one is 0: the level whose lower bound touches 0.

    None where `mean` gives none.
    """
    found, error = mean(values), standard_error(values)
    if found is None or error is None:
        return None
    if error == 0:
        return 0.0 if found.value > 0 else 1.0
    scale = max(map(abs, values))
    skew = _skewness([value / scale for value in values], found.value / scale) * (1 + 6 / found.n)
    t = found.value / error
    t = min(t, _transformed(t, skew, found.n))
    tail = beta_below((found.n - 1) / (found.n - 1 + t * t), (found.n - 1) / 2, 0.5) / 2
    return tail if t > 0 else 1 - tail


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p of each, in the order given: all that are at most a level hold together [Holm 1979]."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[at]))
        adjusted[at] = highest
    return adjusted


def standard_error(values: Sequence[float]) -> float | None:
    """Of a mean; None where `mean` gives none."""
    found = mean(values)
    if found is None:
        return None
    scale = max(map(abs, values)) or 1.0
    return scale * math.sqrt(fmean((one / scale - found.value / scale) ** 2 for one in values) / (len(values) - 1))


def _skewness(values: Sequence[float], middle: float) -> float:
    spread = math.sqrt(fmean((one - middle) ** 2 for one in values))
    return fmean(((one - middle) / spread) ** 3 for one in values) if spread > 1e-12 else 0.0


def _untransformed(t: float, skew: float, n: int) -> float:
    """The studentised mean whose Hall transform is `t`; `t` itself without skew."""
    bend = skew / math.sqrt(n)
    return t if abs(bend) < 1e-9 else 3 / bend * (math.cbrt(1 + bend * (t - bend / 6)) - 1)


def _transformed(t: float, skew: float, n: int) -> float:
    """The other way round: Hall's transform of a studentised mean."""
    bend = skew / math.sqrt(n)
    return t if abs(bend) < 1e-9 else ((1 + bend * t / 3) ** 3 - 1) / bend + bend / 6


def rate(hits: int, n: int) -> Interval | None:
    """A share and its exact bounds [Clopper & Pearson 1934]; None without trials."""
    if n <= 0 or not 0 <= hits <= n:
        return None
    low = beta_quantile(1 - LEVEL, hits, n - hits + 1) if hits else 0.0
    high = beta_quantile(LEVEL, hits + 1, n - hits) if hits < n else 1.0
    return Interval(hits / n, low, high, n)


@lru_cache(maxsize=512)
def t_quantile(p: float, freedom: int) -> float:
    """Of Student's t, for p above 1/2."""
    x = beta_quantile(2 * (1 - p), freedom / 2, 0.5)
    return math.sqrt(freedom * (1 - x) / x)


@lru_cache(maxsize=4096)
def beta_quantile(p: float, a: float, b: float) -> float:
    """Of the beta law, by bisection to the last digit that a float in [0, 1] has."""
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if beta_below(middle, a, b) < p else (low, middle)
    return high


def beta_below(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b) [Abramowitz & Stegun 26.5.8, continued fraction]."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1 - beta_below(1 - x, b, a)
    size = a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(size) * _fraction(x, a, b) / a


def _fraction(x: float, a: float, b: float) -> float:
    """Lentz's way from the front."""
    tiny = 1e-300
    c, d = 1.0, 1 / ((1 - (a + b) * x / (a + 1)) or tiny)
    whole = d
    for m in range(1, 10_000):
        for part in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / ((1 + part * d) or tiny)
            c = (1 + part / c) or tiny
            whole *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return whole


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, ties sharing their mean rank."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson's; of ranks it is Spearman's. None where one of the two does not vary."""
    middle_a, middle_b = (fmean(one) if one else 0.0 for one in (a, b))
    both = math.fsum((x - middle_a) * (y - middle_b) for x, y in zip(a, b, strict=True))
    size = math.sqrt(math.fsum((x - middle_a) ** 2 for x in a) * math.fsum((y - middle_b) ** 2 for y in b))
    return both / size if size > 0 else None
