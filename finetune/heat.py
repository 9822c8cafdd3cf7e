"""Who recites since when: examples against looks, one level a cell, the strongest first. Reads rows; judges nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.evidence import Row
from finetune.gathered import Look, Run

COLUMNS = 80  # looks that are shown; more would be too narrow to click
UNKNOWN = "-"
LEVELS = (
    ("0", "recites nothing"),
    ("1", "under 10 % of its 8-word windows"),
    ("2", "10 to 30 %"),
    ("3", "30 % or more"),
    ("4", "a stretch of 50 tokens"),
    ("5", "the whole answer"),
    (UNKNOWN, "not measured"),
)


@dataclass(frozen=True)
class Line:
    """One example. `levels`: a sign of LEVELS a column. `share`: of its windows, now; `first`: epoch it recited at."""

    example: str
    split: str
    levels: str
    first: float | None
    share: float | None
    longest: int | None
    tokens: int | None

    @property
    def strength(self) -> tuple[float, float, float]:
        """For sorting: what is known by heart most, and first, comes first."""
        now = max((int(one) for one in self.levels if one != UNKNOWN), default=-1)
        return -now, -(self.share or 0.0), self.first if self.first is not None else float("inf")


@dataclass(frozen=True)
class Heat:
    """Trained examples, then held-out ones, each strongest first. `left_out`: looks for which there was no room."""

    columns: Sequence[Look]
    trained: Sequence[Line]
    held_out: Sequence[Line]
    left_out: int


def heat(run: Run) -> Heat | None:
    """None where echo was never measured."""
    if not run.heard:
        return None
    looks = [one for one in run.looks if one.step > 0]
    columns = _thinned(looks, run.chosen)
    own: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in run.heard:
        own[row["split"], row["id"]].append(row)
    lines = [_line(key, rows, columns) for key, rows in own.items() if key[0] != "twin"]
    lines.sort(key=lambda one: one.strength)
    sides = [[one for one in lines if one.split == split] for split in ("train", "held_out")]
    return Heat(columns, sides[0], sides[1], len(looks) - len(columns))


def firsts(run: Run) -> dict[str, Row]:
    """By trained example, the row in which it first recited; a look's where there is one, for it can be shown."""
    found: dict[str, Row] = {}
    for row in run.heard:
        if row["split"] == "train" and _level(row) not in (UNKNOWN, "0"):
            found.setdefault(row["id"], row)
    return found


def _line(key: tuple[str, str], rows: Sequence[Row], columns: Sequence[Look]) -> Line:
    levels, at = [], -1
    for look in columns:
        while at + 1 < len(rows) and rows[at + 1]["step"] <= look.step:
            at += 1
        levels.append(UNKNOWN if at < 0 else _level(rows[at]))
    first = next((float(row["epoch"]) for row in rows if _level(row) not in (UNKNOWN, "0")), None)
    last = rows[-1]
    return Line(key[1], key[0], "".join(levels), first, _share(last), last.get("run_max"), last.get("tokens"))


def _level(row: Row) -> str:
    share = _share(row)
    if row.get("echo_whole"):
        return "5"
    if row.get("long"):
        return "4"
    if share is None:
        return UNKNOWN if row.get("long") is None else "0"
    return "0" if share == 0 else "1" if share < 0.1 else "2" if share < 0.3 else "3"


def _share(row: Row) -> float | None:
    yes, of = row.get("windows") or (0, 0)
    return yes / of if of else None


def _thinned(looks: Sequence[Look], chosen: int | None) -> list[Look]:
    """The first, the last, the chosen one, full ones before light ones, evenly."""
    if len(looks) <= COLUMNS:
        return list(looks)
    kept = {looks[0], looks[-1], *(one for one in looks if one.step == chosen)}
    for some in ([one for one in looks if one.full], looks):
        room = COLUMNS - len(kept)
        left = [one for one in some if one not in kept]
        kept |= set(left if len(left) <= room else (left[i * len(left) // room] for i in range(room)))
    return sorted(kept, key=lambda one: one.step)
