"""One look at a model: how well it knows given answers, split by split and format by format, in sums over tokens.

A look is a measurement only: it decides nothing and writes nothing. Losses are nats per supervised token, sizes UTF-8
bytes of the answers; the end mark is scored with the answer it ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from finetune.batches import Group

# where the best single temperature is looked for; 1 is among them
TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.6, 1.8, 2.0)
_NATS_PER_BIT = 0.6931471805599453


class Score(Protocol):
    """One text's measure, as speak gives it."""

    @property
    def nll(self) -> float: ...
    @property
    def hits(self) -> Any: ...
    @property
    def nll_at(self) -> Any: ...


class Movement(Protocol):
    """How far an adapter is from its start, as model counts it."""

    @property
    def share(self) -> float: ...
    @property
    def distance(self) -> float: ...


class Speaks(Protocol):
    """What a look asks of a model."""

    def score(
        self,
        ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
        temperatures: Sequence[float] = (),
        base: bool = False,
    ) -> Sequence[Score]: ...


@dataclass(frozen=True)
class Measure:
    """Token-weighted figures of a group. `nll_tstar`: at the best single temperature; None if not asked for."""

    nll: float
    nll_tstar: float | None
    accuracy: float
    bpb: float
    tokens: int


def measure(
    speaker: Speaks, group: Group, temperatures: Sequence[float] = TEMPERATURES, base: bool = False
) -> Measure | None:
    """Score a group; None, not zero, where nothing is supervised."""
    scores = speaker.score([i.ids for i in group.items], [i.trained for i in group.items], temperatures, base)
    return measured(scores, group.size)


def measured(scores: Iterable[Score], size: int) -> Measure | None:
    """Of texts that were scored. `size`: UTF-8 bytes of their answers. None where nothing is supervised."""
    scores = list(scores)
    tokens = sum(len(score.hits) for score in scores)
    if tokens == 0:
        return None
    total = sum(score.nll for score in scores)
    given = [score.nll_at for score in scores if score.nll_at is not None and len(score.nll_at)]
    at = [float(one) for one in sum(given[1:], start=given[0])] if given else []
    return Measure(
        nll=total / tokens,
        nll_tstar=min([*at, total]) / tokens if at else None,
        accuracy=sum(int(score.hits.sum()) for score in scores) / tokens,
        bpb=total / _NATS_PER_BIT / max(size, 1),
        tokens=tokens,
    )


@dataclass(frozen=True)
class Place:
    """Where in a run a look is taken. `kind`: light, full or closing."""

    kind: str
    step: int
    epoch: float
    travel: float


class Text(Protocol):
    """Whose text was scored."""

    @property
    def split(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def size(self) -> int: ...


def rows(
    scores: Iterable[Score], texts: Sequence[Text], place: Place, movement: Movement, seconds: float
) -> Iterator[dict[str, Any]]:
    """A row for metrics.jsonl, of one split in one format, with what it cost in seconds; none of nothing."""
    found = measured(scores, sum(one.size for one in texts))
    if found is not None:
        where = {**head(place), "split": texts[0].split, "format": texts[0].format}
        moved = {"moved": movement.share, "distance": movement.distance}
        yield {**where, **asdict(found), **moved, "seconds": seconds}


def head(place: Place) -> dict[str, Any]:
    """The keys every row of a look begins with."""
    return {"kind": "look", "look": place.kind, "step": place.step, "epoch": place.epoch, "travel": place.travel}


@dataclass(frozen=True)
class Alive:
    """Whether an adapter moved and is felt: the change of NLL it makes, in the run's precision and in fp32."""

    share: float  # of lora_A entries that differ from the start
    per_travel: float | None  # mean change of an entry / travel: at most about 1 for AdamW; None before any travel
    gradient_over_eps: float | None  # median rms(gradient) / eps; near 1 or below, eps swallows the step
    change: float | None  # nats per token, negative is better
    change_fp32: float | None  # None where the base itself is bf16 or int8: no fp32 forward can be had


def dead(share: float, gradient: float | None, steps: int) -> str | None:
    """Why an adapter is not worth a night, or None, by the share of lora_A that moved and rms(gradient) / eps."""
    if share >= 0.9:
        return None
    weak = gradient is not None and gradient < 10
    cause = f" The gradient is only {gradient:.1f} x eps: AdamW's eps swallows it." if weak else ""
    return f"After {steps} steps only {share:.1%} of lora_A has moved.{cause}"
