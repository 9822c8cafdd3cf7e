"""Formats at a full look: which strange ones each held-out example is met in, and what the look says of all of them.

The recipe's own formats are read whole at every full look. Of those that nobody trained, drawn from the grammar or
slips of the hand, each example meets a few, so that a night goes through all. One row for findings.jsonl, one line for
a screen; it asks no model and judges nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from finetune import grid, lineup, reach, robustness, transfer
from finetune.chance import Interval
from finetune.lineup import Gauge, Group, Suite
from finetune.looks import Place
from finetune.minutes import PROBE
from finetune.plan import Plan
from finetune.robustness import Known
from finetune.transfer import Cell, Sheet, Transfer

SUITE = "look"  # of its rows in findings.jsonl: a closing look writes others under the same probe
_POOLED: Mapping[Group, str] = {"sampled": "sampled formats", "slip": "slips of trained formats"}
_NAMED: Mapping[Group, str] = {"held_out": "formats never trained", "near": "never trained ones of a trained family"}
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rota:
    """`named`: the recipe's formats. `strange`: those that rotate. `ids`: of held-out examples."""

    suite: Suite
    named: tuple[Gauge, ...]
    strange: Mapping[str, Gauge]
    ids: tuple[str, ...]
    seed: int

    def met(self, look: int) -> Iterator[tuple[str, str]]:
        """(example, format) of every pair that full look number `look` reads beside the recipe's own, from 0."""
        found = lineup.rotation(self.seed, look, self.ids, [*self.strange], self.suite.each)
        return ((example, name) for example, names in found.items() for name in names)

    def finding(self, rows: Iterable[Row], place: Place) -> dict[str, Any] | None:
        """A row for findings.jsonl, of the rows of a look and of the base's; None where nothing can be compared.

        `score`: of the gain over the base in trained formats, the share that untouched ones keep, median over their
        families; None while that is not resolvable. `kept` says the same of other formats: strange ones pooled over
        the examples that met them, against what those gained in trained ones.
        """
        rows = list(rows)
        found = robustness.at_look(rows, place.step, self.named, self.suite)
        if not found.standings:
            return None
        kept: dict[str, Any] = {group: _headline(found, group) for group in _NAMED}
        kept |= {group: self._pooled(rows, place.step, group) for group in _POOLED}
        worst = found.worst
        return {
            **{"probe": PROBE, "suite": SUITE, "version": self.suite.version, "of": "look"},
            **{"step": place.step, "epoch": place.epoch, "travel": place.travel, "prompt": None, "answer": None},
            "score": None if kept["held_out"] is None else kept["held_out"]["median"],
            "why": " ".join(self._words(found, kept)),
            "source": "examples.jsonl",
            "gain": _bounds(found.reference),
            "resolvable": found.resolvable,
            "kept": kept,
            "worst": worst and {"format": worst.format, **(_bounds(worst.surest) or {}), "p": worst.p_worse},
            "below": [one.format for one in found.below],
        }

    def _pooled(self, rows: Sequence[Row], step: int, group: Group) -> dict[str, Any] | None:
        """Every example's mean over the formats of a group that it met here, beside its own in trained formats."""
        trained = {one.name: one for one in self.named if one.group == "trained"}
        met = [row for row in rows if row["step"] == step and self._is(row, group)]
        ids = {row["id"] for row in met}
        same = [row for row in rows if row["format"] in trained and row["id"] in ids]
        then = [{**row, "step": 0, "nll": row["base_nll"], "end_nll": row["base_end_nll"]} for row in met]
        tuned, base = (_joined(transfer.sheet([*same, *met, *then], at), trained, group) for at in (step, 0))
        gauges: list[Gauge | Known] = [*trained.values(), Known(group, group, group, "", "")]
        found = transfer.transfer(tuned, base, gauges, self.suite.chance, self.suite.standard_errors)
        if (head := found.headlines.get(group)) is None:
            return None
        return {**asdict(head.least.tau), "formats": len({row["format"] for row in met})}

    def _is(self, row: Row, group: str) -> bool:
        one = self.strange.get(row["format"])
        return one is not None and one.group == group and row.get("base_nll") is not None

    def _words(self, found: Transfer, kept: Mapping[str, Any]) -> Iterator[str]:
        yield grid.reference(found, self.suite.standard_errors)
        for group, name in _NAMED.items():
            if one := kept[group]:
                yield f"Kept of it in {name}: {_least(one, f', {_between(one)}')}."
        for group, name in _POOLED.items():
            if one := kept[group]:
                met = f"{one['n']} examples in {one['formats']} formats"
                yield f"In {name}, {met}: {one['value']:.2f} ({_between(one)})."
        yield from grid.worst(found)


def of(plan: Plan) -> Rota:
    """Of a run, from its plan alone."""
    suite, recipe = lineup.suite(), robustness.asked_of(plan)
    strange = {one.name: one for one in lineup.strange(recipe, suite)}
    return Rota(suite, tuple(lineup.listed_ones(recipe)), strange, plan.split.held_out, recipe.seed)


def texts(plan: Plan, looks: int) -> Iterator[tuple[int, ...]]:
    """Token ids of all that so many full looks will read in strange formats, each once."""
    ready = of(plan)
    for example, name in dict.fromkeys(pair for look in range(looks) for pair in ready.met(look)):
        yield from (
            one.ids for one in reach.texts([plan.conversations[example]], [ready.strange[name]], plan.vocabulary)
        )


def brief(rows: Iterable[Row]) -> str:
    """The newest of these findings in a few words; "" where none is about formats at a look."""
    own = [row for row in rows if row["probe"] == PROBE and row["suite"] == SUITE]
    if not own:
        return ""
    kept, told = own[-1]["kept"], []
    for group, name in (("held_out", "kept"), ("near", "near ones")):
        told += [f"{name} {_least(one)}"] if (one := kept[group]) else []
    told += [
        f"{name} {one['value']:.2f}"
        for group, name in (("sampled", "sampled"), ("slip", "slips"))
        if (one := kept[group])
    ]
    told += [] if own[-1]["resolvable"] else ["what is kept is not resolvable"]
    if below := own[-1]["below"]:
        told.append(f"below the base: {', '.join(below)}")
    return " · ".join(told)


def _headline(found: Transfer, group: str) -> dict[str, Any] | None:
    head = found.headlines.get(group)
    if head is None:
        return None
    own = [one.format for one in found.standings if (one.group, one.family) == (group, head.least.name)]
    least = own[0] if len(own) == 1 else head.least.name  # a recipe names formats, not families
    return {"median": head.median, "families": len(head.reaches), "least": least, **asdict(head.least.tau)}


def _least(one: Mapping[str, Any], more: str = "") -> str:
    least = f"{one['value']:.2f} ({one['least']}{more})"
    return f"{one['median']:.2f} median, least {least}" if one["families"] > 1 else least


def _joined(sheet: Sheet, known: Collection[str], name: str) -> dict[str, Mapping[str, Cell]]:
    """All formats that are not known as one: of each example the mean, so that who met more of them counts no more."""
    met: dict[str, list[Cell]] = defaultdict(list)
    for cells in (some for format_, some in sheet.items() if format_ not in known):
        for example, cell in cells.items():
            met[example].append(cell)
    own = {format_: cells for format_, cells in sheet.items() if format_ in known}
    return {**own, name: {example: _mean(cells) for example, cells in met.items()}}


def _mean(cells: Sequence[Cell]) -> Cell:
    tokens, hits, size = (round(fmean(getattr(one, key) for one in cells)) for key in ("tokens", "hits", "size"))
    return Cell(fmean(one.nats for one in cells), tokens, hits, size)


def _bounds(found: Interval | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _between(one: Mapping[str, Any]) -> str:
    return f"between {one['low']:.2f} and {one['high']:.2f}"
