"""A run folder as a page reads it: its files, its looks in order, what each example was heard to recite.

Reads the files of the contract and nothing else; a file that is not there yet is empty, what was not measured is None.
It judges nothing but through `verdict`, and writes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune import chance, disk, runs, verdict, yamlfile
from finetune.chance import Interval
from finetune.errors import refuse
from finetune.evidence import Count, Row, Setting
from finetune.runs import RunFolder


@dataclass(frozen=True)
class Look:
    """One stop. `train_loss`: mean of the epoch before it, nats a token; None at the base. `full`: not a light one."""

    step: int
    epoch: float
    travel: float
    full: bool
    train_loss: float | None


@dataclass(frozen=True)
class Tally:
    """What was known by heart at a look: each example's newest row, so some may be older.

    `windows`, `held_out_windows`: 8-word windows echoed in excess of the base, of how many.
    """

    look: Look
    whole: Count
    long: Count
    windows: Count
    held_out_windows: Count


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder, read once. `settings`: the resolved recipe; `verdicts`: by step, if somebody judged already."""

    folder: Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    split: Mapping[str, Any] | None = None
    verdict: Mapping[str, Any] | None = None
    metrics: Sequence[Row] = ()
    examples: Sequence[Row] = ()
    findings: Sequence[Row] = ()
    samples: Sequence[Row] = ()
    known_verdicts: Mapping[int, str] = field(default_factory=dict)

    # what it is

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def elsewhere(self) -> bool:
        """An adapter that was made by another program, or one whose run was not kept."""
        return not self.facts

    @property
    def running(self) -> bool:
        return self.facts.get("state") == "running"

    @property
    def trained_formats(self) -> tuple[str, ...]:
        return tuple(_at(self.settings, "formats", "train") or ())

    @property
    def held_out_formats(self) -> tuple[str, ...]:
        return tuple(_at(self.settings, "formats", "held_out") or ())

    @cached_property
    def first_format(self) -> str:
        """In which echo and held-out loss are judged."""
        seen = (row["format"] for row in (*self.metrics, *self.examples) if row.get("format"))
        return next(iter((*self.trained_formats, *seen)), "")

    @property
    def chosen(self) -> int | None:
        """The step of the run's adapter."""
        known = self.facts.get("chosen") or self.verdict or {}
        return int(known["step"]) if known.get("step") is not None else None

    @cached_property
    def per_epoch(self) -> int | None:
        """Steps an epoch has."""
        row = next((row for row in self.metrics if row["step"] and row["epoch"]), None)
        return max(1, round(row["step"] / row["epoch"])) if row else None

    # its course

    @cached_property
    def steps(self) -> list[Row]:
        """Training steps, in order."""
        return sorted((row for row in self.metrics if row["kind"] == "step"), key=lambda row: int(row["step"]))

    @cached_property
    def epochs(self) -> list[tuple[float, float, float]]:
        """(epoch, travel, mean loss of its steps) of every epoch that was ended, and of the last begun one."""
        found: dict[int, list[Row]] = defaultdict(list)
        for row in self.steps:
            found[(int(row["step"]) - 1) // (self.per_epoch or 1)].append(row)
        ends = [(some[-1], fmean(row["loss"] for row in some if row["loss"] is not None)) for some in found.values()]
        return [(float(last["epoch"]), float(last["travel"]), loss) for last, loss in ends]

    @cached_property
    def looks(self) -> list[Look]:
        """Those of the run, the base's first, without closing measurements; of an adapter alone, what was measured."""
        rows: dict[int, Row] = {}
        for row in self.metrics:
            if row["kind"] == "look" and (row["look"] != "closing" or self.elsewhere):
                rows[int(row["step"])] = row
        for row in self.examples if self.elsewhere else ():
            rows.setdefault(int(row["step"]), {**row, "look": "full"})
        losses = dict(self._losses(sorted(rows)))
        return [
            Look(step, float(row["epoch"]), float(row["travel"]), row["look"] == "full", losses[step])
            for step, row in sorted(rows.items())
        ]

    def _losses(self, steps: Sequence[int]) -> Iterator[tuple[int, float | None]]:
        by_step = {int(row["step"]): row["loss"] for row in self.steps}
        for step in steps:
            before = (by_step.get(one) for one in range(step - (self.per_epoch or 1) + 1, step + 1))
            known = [loss for loss in before if loss is not None]
            yield step, fmean(known) if known else None

    @cached_property
    def _measured(self) -> dict[tuple[str, str], dict[int, Row]]:
        """Rows of looks by split and format, then by step; a closing measurement stands where no look did."""
        found: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
        for row in self.metrics:
            if row["kind"] == "look":
                own = found[row["split"], row["format"]]
                if row["look"] != "closing" or int(row["step"]) not in own:
                    own[int(row["step"])] = row
        return found

    def series(self, split: str, measure: str, format_: str | None = None) -> list[tuple[int, float]]:
        """(step, measure) of a split in a format, the first by default, where it was measured."""
        rows = self._measured.get((split, format_ or self.first_format), {})
        return [(step, float(row[measure])) for step, row in sorted(rows.items()) if row.get(measure) is not None]

    # example by example

    @cached_property
    def _read(self) -> dict[tuple[str, str, int], dict[str, Row]]:
        """Rows of looks by split, format and step, then by example."""
        found: dict[tuple[str, str, int], dict[str, Row]] = defaultdict(dict)
        for row in self.examples:
            if row.get("map") != "free":
                found[row["split"], row["format"], int(row["step"])][row["id"]] = row
        return found

    def gain(self, step: int) -> Interval | None:
        """Base minus adapter over held-out examples, nats per token at T*; None where they were not read one by one."""
        now, base = (self._read.get(("held_out", self.first_format, at), {}) for at in (step, 0))
        both = [(_nll(base[name]), _nll(now[name])) for name in now if name in base]
        known = [then - here for then, here in both if then is not None and here is not None]
        return chance.mean(known) if len(known) == len(now) else None

    @cached_property
    def heard(self) -> list[Row]:
        """Rows in which echo was measured, in time; of one step the free map's first, for a look knows better."""
        keys = ("echo_whole", "long", "windows")
        rows = [row for row in self.examples if row["step"] > 0 and any(row.get(key) is not None for key in keys)]
        fits = [row for row in rows if row.get("map") == "free" or row["format"] == self.first_format]
        return sorted(fits, key=lambda row: (row["step"], row.get("map") != "free"))

    @cached_property
    def tallies(self) -> list[Tally]:
        """One for each look after which echo was measured at all."""
        newest: dict[str, dict[str, Row]] = {"train": {}, "held_out": {}, "twin": {}}
        rows, found = iter([*self.heard, None]), []
        row = next(rows)
        for look in self.looks:
            while row is not None and row["step"] <= look.step:
                newest[row["split"]][row["id"]] = row
                row = next(rows)
            train, held_out = list(newest["train"].values()), list(newest["held_out"].values())
            if train:
                counts = (_yes(train, "echo_whole"), _yes(train, "long"), _windows(train), _windows(held_out))
                found.append(Tally(look, *counts))
        return found

    # judged

    @cached_property
    def verdicts(self) -> dict[int, str]:
        """The word on every look, by step."""
        if {one.step for one in self.looks if one.step > 0} <= self.known_verdicts.keys():
            return dict(self.known_verdicts)
        setting = Setting(self.first_format, self.held_out_formats, self.elsewhere, self.running)
        rows = [row for row in self.metrics if row["kind"] != "look" or row["look"] != "closing"]
        return {one.facts.step: one.verdict for one in verdict.judgements(rows, self.examples, self.findings, setting)}


def _yes(rows: Sequence[Row], key: str) -> Count:
    asked = [bool(row[key]) for row in rows if row.get(key) is not None]
    return Count(sum(asked), len(asked))


def _windows(rows: Sequence[Row]) -> Count:
    pairs = [row["windows"] for row in rows if row.get("windows") is not None]
    return Count(sum(yes for yes, _ in pairs), sum(of for _, of in pairs))


def _nll(row: Row) -> float | None:
    value = row.get("nll_tstar") if row.get("nll_tstar") is not None else row.get("nll")
    return None if value is None else float(value)


def _at(settings: Mapping[str, Any], *keys: str) -> Any:
    for key in keys:
        settings = settings.get(key) or {} if isinstance(settings, Mapping) else {}
    return settings


# reading


def read(folder: Path | str, verdicts: Mapping[int, str] | None = None) -> Run:
    """A run folder, an adapter's, or one that `sft eval` wrote about an adapter. `verdicts`: known words, by step.

    Errors: UserError where the folder is neither, or where a file of it is damaged.
    """
    run = RunFolder(folder)
    marks = (run.run_json, run.path / "adapter_config.json", run.path / "eval.json")
    if not any(one.is_file() for one in marks):
        raise refuse("is no run and no adapter.", "Name a folder that `sft train` wrote, such as runs/mine.", run.path)
    settings = yamlfile.read(run.recipe).data if run.recipe.is_file() else {}
    return Run(
        folder=run.path,
        facts=_json(run.run_json) or {},
        settings=settings,
        split=_json(run.split),
        verdict=_json(run.verdict, "verdict", "reason", "next", "axes", "run"),
        metrics=_rows(run.metrics, "kind", "step", "epoch", "travel"),
        examples=_rows(run.examples, "id", "split", "format", "step", "epoch", "travel"),
        findings=_rows(run.findings, "probe", "step"),
        samples=_rows(run.samples, "step"),
        known_verdicts=verdicts or {},
    )


def _json(path: Path, *keys: str) -> Any:
    """An object with such keys; None where there is no file. Errors: UserError for anything else."""
    found = runs.read_json(path) if path.is_file() else None
    if found is not None and not (isinstance(found, dict) and found.keys() >= set(keys)):
        raise refuse("is not what sft writes there.", "It was changed by hand; put back what was there.", path)
    return found


def _rows(path: Path, *keys: str) -> list[Row]:
    """Rows that have such keys. Errors: UserError, with the line, for others."""
    rows: list[Row] = list(runs.read_lines(path))
    if all(row.keys() >= set(keys) for row in rows):
        return rows
    lines = disk.numbered_lines(path)
    line = next(number for number, _, row in lines if row is not None and not row.keys() >= set(keys))
    raise refuse("is no row that sft writes there.", "Remove this line.", path, line)
