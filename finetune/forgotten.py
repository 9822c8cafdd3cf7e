"""What rows of the drift probe amount to: each axis beside its base and its cut, facts kept, how answers are written.

Reads rows of findings.jsonl and nothing else; asks no model, and leaves to `verdict` whether it is harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from finetune import chance, facts, phrases
from finetune.chance import Interval
from finetune.overlap import words
from finetune.phrases import Manner
from finetune.tables import columns

Row = Mapping[str, Any]
NAMES = {  # of each axis, and its decimals
    "general": ("neutral text, bits per byte", 4),
    "kl": ("the base's surprise at the adapter, nats", 4),
    "script": ("foreign scripts in answers, at their likeliest, log10", 2),
    "script_neutral": ("foreign scripts in neutral text, the same", 2),
    "stock": ("stock openings, log-odds", 2),
    "facts": ("known facts, nats short of certain", 4),
}


@dataclass(frozen=True)
class Moved:
    """One axis over its texts: means, and the paired change with its bounds. Higher is worse.

    `cut`: the change that still counts as healthy; None where none was fitted for this base. `alarm`: the lower bound
    lies above it; None where it cannot be told.
    """

    axis: str
    n: int
    base: float
    now: float
    change: Interval | None
    cut: float | None
    alarm: bool | None

    @property
    def share(self) -> float | None:
        """The change as a share of the base's mean: what a cut is fitted to."""
        return None if self.change is None or self.base == 0 else self.change.value / abs(self.base)


@dataclass(frozen=True)
class Kept:
    """Facts. `sure`: known to the base; `kept` of those are still right. `wrong_share`: mean confidence where wrong."""

    asked: int
    base_right: int
    right: int
    sure: int
    kept: int
    base_map_3: float | None
    map_3: float | None
    base_wrong_share: float | None
    wrong_share: float | None


@dataclass(frozen=True)
class Spoken:
    """Answers beside the base's to the same. `distinct_2` of both over equally many words. `length`: median ratio."""

    answers: int
    wrong_script: int
    own: Manner
    base: Manner
    author_stock: float | None
    length: float | None


@dataclass(frozen=True)
class Summary:
    """Of one step."""

    step: int
    moved: tuple[Moved, ...]
    facts: Kept | None
    spoken: Spoken | None

    @property
    def alarms(self) -> tuple[str, ...]:
        """Axes beyond their cut, and `script` where an answer is already written in one."""
        found = [one.axis for one in self.moved if one.alarm]
        said = self.spoken is not None and self.spoken.wrong_script > 0
        return tuple(dict.fromkeys([*found, *(["script"] if said else [])]))

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the page."""
        return {**asdict(self), "alarms": list(self.alarms)}


def summary(rows: Iterable[Row], step: int | None = None) -> Summary | None:
    """Of a step, by default the newest that was measured; None where none was."""
    own = once(row for row in rows if row["probe"] == "drift")
    steps = {row["step"] for row in own}
    if not steps or (step is not None and step not in steps):
        return None
    at = max(steps) if step is None else step
    here = [row for row in own if row["step"] == at]
    axes = [axis for axis in NAMES if any(row.get("axis") == axis for row in here)]
    moved = tuple(_moved(axis, [row for row in here if row.get("axis") == axis]) for axis in axes)
    return Summary(at, moved, _kept([row for row in here if "fact" in row]), _spoken(here))


def once(rows: Iterable[Row]) -> list[Row]:
    """Each text and answer of a step once, as it was read last: a closing measurement reads what a look had read."""
    keys = ("step", "axis", "id", "prompt", "fact")
    return list({tuple(row.get(key) for key in keys): row for row in rows}.values())


def _moved(axis: str, rows: Sequence[Row]) -> Moved:
    base, now = (fmean(float(row[key]) for row in rows) for key in ("base", "score"))
    change = chance.mean([float(row["score"]) - float(row["base"]) for row in rows])
    share = rows[-1].get("cut")
    cut = None if share is None else float(share) * abs(base)
    alarm = None if cut is None or change is None else change.low > cut
    return Moved(axis, len(rows), base, now, change, cut, alarm)


def _kept(rows: Sequence[Row]) -> Kept | None:
    if not rows:
        return None
    sure = [row for row in rows if row["sure"]]

    def of(rank: str, share: str) -> tuple[int, float | None, float | None]:
        wrong = [float(row[share]) for row in rows if row[rank] > 1]
        map_3 = facts.map_at_3([row[rank] for row in rows])
        return sum(row[rank] == 1 for row in rows), map_3, fmean(wrong) if wrong else None

    (right, map_3, wrong), (base_right, base_map_3, base_wrong) = of("rank", "share"), of("base_rank", "base_share")
    kept = sum(row["rank"] == 1 for row in sure)
    return Kept(len(rows), base_right, right, len(sure), kept, base_map_3, map_3, base_wrong, wrong)


def _spoken(rows: Sequence[Row]) -> Spoken | None:
    said = [row for row in rows if row.get("wrong_script") is not None]
    if not said:
        return None
    own, base = ([str(row[key]) for row in said] for key in ("answer", "base_answer"))
    first = min(phrases.pairs(own), phrases.pairs(base))
    sizes = [(len(words(one)), len(words(other))) for one, other in zip(own, base, strict=True)]
    ratios = [one / other for one, other in sizes if other]
    return Spoken(
        answers=len(said),
        wrong_script=sum(bool(row["wrong_script"]) for row in said),
        own=phrases.manner_of(own, first),
        base=phrases.manner_of(base, first),
        author_stock=said[-1].get("author_stock"),
        length=median(ratios) if ratios else None,
    )


# in words


def lines(found: Summary) -> Iterator[str]:
    """For a terminal."""
    if found.moved:
        yield from columns([["", "base", "now", "change", "healthy up to", "texts"], *map(_line, found.moved)])
        if all(one.cut is None for one in found.moved):
            yield "No cuts are fitted for this base: this is told, and decides nothing."
    if found.facts is not None:
        yield from _facts_told(found.facts)
    if found.spoken is not None:
        yield from _spoken_told(found.spoken)


def brief(rows: Iterable[Row]) -> str:
    """The newest step of these rows in a few words; "" where nothing was read along and no answer went astray."""
    found = summary(rows)
    if found is None or not (found.moved or found.alarms):
        return ""
    changes = {one.axis: one.change for one in found.moved}
    told = []
    if (general := changes.get("general")) is not None:
        told.append(f"neutral text {general.value:+.4f} bits/byte")
    if found.facts is not None and found.facts.sure:
        told.append(f"{found.facts.kept} of {found.facts.sure} facts kept")
    if found.alarms:
        told.append(f"beyond what is healthy: {', '.join(NAMES[one][0].split(',')[0] for one in found.alarms)}")
    else:
        told.append("within cuts" if any(one.cut is not None for one in found.moved) else "no cuts for this base")
    return " · ".join(told)


def _line(one: Moved) -> list[str]:
    name, digits = NAMES[one.axis]
    between = "-" if one.change is None else f"{one.change.value:+.{digits}f} ({one.change.low:+.{digits}f} at least)"
    cut = "not fitted" if one.cut is None else f"{one.cut:+.{digits}f}{'  ALARM' if one.alarm else ''}"
    return [name, f"{one.base:.{digits}f}", f"{one.now:.{digits}f}", between, cut, str(one.n)]


def _facts_told(one: Kept) -> Iterator[str]:
    yield f"Facts the base is sure of: {one.kept} of {one.sure} still right."
    ranked = _beside("MAP@3", one.map_3, one.base_map_3, 3)
    yield f"All {one.asked} facts: {one.right} right, the base {one.base_right}; {ranked}."
    yield f"{_beside('Mean confidence where wrong', one.wrong_share, one.base_wrong_share)}."


def _spoken_told(one: Spoken) -> Iterator[str]:
    script = f"{one.wrong_script} in a script that neither data, prompt nor base has"
    yield f"{one.answers} answers: {script}; {one.own.looped} loop, the base's {one.base.looped}."
    stock = _beside("Stock phrases per 1,000 words", one.own.stock, one.base.stock, 1)
    yield f"{stock}, the author {_told(one.author_stock, 1)}."
    pairs = _beside("Different pairs of words", one.own.distinct_2, one.base.distinct_2)
    yield f"{pairs}; length {_told(one.length, 2)} times the base's."


def _beside(name: str, own: float | None, base: float | None, digits: int = 2) -> str:
    return f"{name} {_told(own, digits)}, the base {_told(base, digits)}"


def _told(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
