"""Numbers known before the night: the rate of every step, travel, when to look, what a split can show. Arithmetic only.

The same functions drive training, so an estimate of travel is the travel. What it will not: measure a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_TREND = 5  # looks before which nothing can be said to have got worse
_FLOOR = 0.1  # cyclical: the share of the learning rate a cycle starts and ends at
_RISE, _START, _END = 0.3, 1 / 25, 1e-4 / 25  # one_cycle, as in torch's OneCycleLR: share rising, first and last factor


@dataclass(frozen=True)
class Length:
    """How long a run is, in optimizer steps."""

    per_epoch: int
    total: int
    warmup: int = 0


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps an epoch takes; the last batch may be smaller."""
    return math.ceil(rows / batch_size)


def lr_factor(schedule: str, step: int, length: Length) -> float:
    """Share of the learning rate used at `step`, counted from 0."""
    if schedule == "constant":
        return 1.0
    if schedule == "cyclical":
        return _triangle(step % length.per_epoch, length.per_epoch)
    if schedule == "one_cycle":
        return _one_cycle(step, length.total)
    if step < length.warmup:
        return step / max(1, length.warmup)
    return _DECAY[schedule]((step - length.warmup) / max(1, length.total - length.warmup))


_DECAY: dict[str, Callable[[float], float]] = {
    "constant_with_warmup": lambda _done: 1.0,
    "linear": lambda done: max(0.0, 1.0 - done),
    "cosine": lambda done: max(0.0, 0.5 * (1.0 + math.cos(math.pi * done))),
}


def _triangle(step: int, steps: int) -> float:
    """From 10 % up to 1 in the middle of an epoch and down again [Smith 2017, cyclical learning rates]."""
    return _FLOOR + (1 - _FLOOR) * (1 - abs(2 * (step + 0.5) / steps - 1))


def _one_cycle(step: int, total: int) -> float:
    """Cosine from 1/25 up to 1 over 30 % of the run, then down [Smith & Topin 2018; torch's OneCycleLR]."""
    top = max(_RISE * total - 1, 1e-9)
    if step <= top:
        return _cosine(_START, 1.0, step / top)
    return _cosine(1.0, _END, (step - top) / max(total - 1 - top, 1e-9))


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * min(done, 1.0)))


def travel(learning_rate: float, schedule: str, length: Length) -> float:
    """Sum of the learning rate over all steps: AdamW moves no weight further than about this."""
    if schedule == "constant":
        return learning_rate * length.total
    return learning_rate * math.fsum(lr_factor(schedule, step, length) for step in range(length.total))


@dataclass(frozen=True)
class Looks:
    """When a run is looked at: epochs of light and of full looks, and why. The base and the last epoch are always.

    `alarm`: how many full looks more the budget pays, should an example begin to echo.
    """

    light: tuple[int, ...]
    full: tuple[int, ...]
    reason: str
    alarm: int = 0


@dataclass(frozen=True)
class Cost:
    """Work in forward-equivalent tokens: one epoch of training, one light look, one full look."""

    epoch: float
    light: float
    full: float


def plan_looks(epochs: int, every: int | str, budget: float, cost: Cost) -> Looks:
    """Epochs to look at. `auto`: 1, 2, 5, 10, 20, 50, 100, ... full while the budget pays, light ones between."""
    purse = budget * epochs * cost.epoch - 2 * cost.full  # what is left beside the base and the last epoch
    if isinstance(every, int):
        full = (*range(every, epochs, every), epochs)
        spare = max(0, int((purse - (len(full) - 1) * cost.full) // cost.full))
        return Looks((), full, f"every {every} epochs, as the recipe says", spare)
    full_at = _affordable(_round_epochs(epochs), purse, cost.full)
    purse -= len(full_at) * cost.full
    alarm = _spared(purse, cost)
    count = max(0, int((purse - alarm * cost.full) // cost.light))
    light = sorted({round(epochs * (i + 1) / (count + 1)) for i in range(count)} - {0, epochs, *full_at})
    share = ((len(full_at) + 2 + alarm) * cost.full + len(light) * cost.light) / (epochs * cost.epoch)
    reason = f"{len(light)} light and {len(full_at) + 1} full looks, {alarm} more if an example begins to echo"
    reason += f", and one at the base: about {share:.1%} of the work of training"
    return Looks(tuple(light), (*full_at, epochs), reason, alarm)


def _spared(purse: float, cost: Cost) -> int:
    """Full looks put by for alarms: half of the purse; one, at least, where enough light looks for a trend are left."""
    return max(int(purse / 2 // cost.full), int(purse >= cost.full + _TREND * cost.light))


def _round_epochs(epochs: int) -> list[int]:
    return [m * 10**p for p in range(6) for m in (1, 2, 5) if m * 10**p < epochs]


def _affordable(wanted: list[int], purse: float, price: float) -> list[int]:
    """As many of the wanted epochs as the purse pays half of: late ones first, for there is the question."""
    count = max(0, min(len(wanted), int(purse / 2 // price)))
    return sorted(wanted[len(wanted) - count :])


def layers_below(layers: int, top: int | None, noise: float, prefix_gib: float) -> int:
    """Lower layers whose work is done once: all below the `top` trained ones, unless they are random (`noise`)."""
    return layers - top if top is not None and top < layers and not noise and prefix_gib > 0 else 0


# what so few held-out examples can show; 95 %, one-sided

# Student's t at 0.95 for 1 to 30 degrees of freedom; beyond, Cornish and Fisher's first term
_T95 = (
    *(6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812),
    *(1.796, 1.782, 1.771, 1.761, 1.753, 1.746, 1.740, 1.734, 1.729, 1.725),
    *(1.721, 1.717, 1.714, 1.711, 1.708, 1.706, 1.703, 1.701, 1.699, 1.697),
)


def none_seen(n: int) -> float:
    """How common something may still be that none of `n` examples showed [Clopper & Pearson 1934, upper bound at 0]."""
    return 1 - math.pow(0.05, 1 / n)


def paired_change(n: int) -> float | None:
    """Smallest mean of `n` paired differences whose lower bound is above 0, in their standard deviations [Student]."""
    if n < 2:
        return None
    t = _T95[n - 2] if n - 2 < len(_T95) else 1.645 + 1.524 / (n - 1)
    return t / math.sqrt(n)


def must_improve(n: int) -> int | None:
    """How many of `n` must improve to rule out chance [sign test]; None where even all of them would not."""
    return next((k for k in range(n + 1) if sum(math.comb(n, i) for i in range(k, n + 1)) <= 0.05 * 2**n), None)
