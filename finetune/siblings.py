"""A run's course as `trend` reads it: its rows, the order of its epochs, and runs that differ in their seed alone.

It opens other run folders beside the one it is asked about, without their weights, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from finetune import opened, recipe, runs
from finetune.errors import UserError
from finetune.opened import Opened
from finetune.plan import Plan
from finetune.trend import Course

Row = Mapping[str, Any]


class Rows(Protocol):
    """What a run folder holds."""

    @property
    def metrics(self) -> Sequence[Row]: ...
    @property
    def examples(self) -> Sequence[Row]: ...


def course(found: Opened, rows: Rows) -> Course:
    """Of one run, beside its siblings."""
    orders = [order(found.plan, rows.examples), *(_order_of(one) for one in siblings(found))]
    known = [one for one in orders if one]
    length, first = found.plan.length.per_epoch, found.plan.first_format
    return Course(rows.metrics, rows.examples, length, first, lambda epoch: places(found.plan, epoch), known)


def places(plan: Plan, epoch: int) -> dict[str, int] | None:
    """The step of an epoch (both from 0 and 1) at which each trained example comes; None where one comes twice."""
    found: dict[str, int] = {}
    for at, item in enumerate(plan.epochs.order(epoch)):
        if item.format and item.example in found:
            return None
        if item.format:
            found[item.example] = 1 + at // plan.recipe.batch_size
    return found


def order(plan: Plan, examples: Iterable[Row]) -> list[tuple[int, float]]:
    """(first-epoch step, newest excess bits) of every trained example; [] where that is not known."""
    first = places(plan, 0)
    rows = sorted((row for row in examples if _counts(row)), key=lambda row: int(row["step"]))
    bits = {row["id"]: float(row["excess_bits"]) for row in rows}
    if first is None or not bits or bits.keys() < first.keys():
        return []
    return [(at, bits[name]) for name, at in first.items()]


def _counts(row: Row) -> bool:
    return row["split"] == "train" and row["step"] > 0 and row.get("excess_bits") is not None


def siblings(found: Opened) -> Iterator[Opened]:
    """Finished runs beside this one with the same recipe, data and base, and another seed."""
    own, prints = found.recipe, found.facts.get("fingerprints", {})
    for path in sorted(found.run.path.resolve().parent.glob("*/run.json")):
        try:
            facts = runs.read_json(path)
            if path.parent == found.run.path.resolve() or facts.get("state") != "finished":
                continue
            other = recipe.load_resolved(path.parent / "recipe.yaml")
            alike = recipe.fingerprint(other.model_copy(update={"seed": own.seed})) == recipe.fingerprint(own)
            data = all(facts["fingerprints"].get(key) == prints.get(key) for key in ("dataset", "base"))
            if alike and data and other.seed != own.seed and other.epochs == own.epochs:
                yield opened.read(path.parent)
        except (UserError, KeyError, AttributeError):  # a damaged neighbour is none
            continue


def _order_of(other: Opened) -> list[tuple[int, float]]:
    path: Path = other.run.examples
    return order(other.plan, runs.read_lines(path))
