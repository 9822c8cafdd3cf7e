"""A run's examples as they are listened to: passages, house style, base readings, and the rows of one hearing.

From a Plan and a speaker to rows for examples.jsonl; the same during a run and after it. It decides nothing, and writes
only what a base said, which never changes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from finetune import echo, formula, heard, looks, passage, prompts
from finetune.asking import Scores
from finetune.byheart import Found, Kind, Limits, judge, suspect, unsuspected
from finetune.conversation import Conversation
from finetune.echo import Map, Measured
from finetune.format import Format
from finetune.heard import Reading
from finetune.looks import Place
from finetune.masks import encode
from finetune.odds import CUSTOMARY
from finetune.passage import Key, Passage, Split
from finetune.plan import Plan
from finetune.runlength import Bools, Floats
from finetune.runs import RunFolder

_PASSING = 256  # passages in formats that the recipe does not name
_NOISE_FROM = 4  # passages, the longest: noise grows with what lies beside a text


@dataclass(frozen=True, eq=False)
class Ear:
    """Every example of a plan as passages, made when they are asked for. `limits`: what counts as echo.

    Those in the recipe's formats are kept; of those in others, which may come once in a night, the last few.
    `formulas`: by example, a mask over the words of each trained answer; a twin takes its original's.
    """

    plan: Plan
    limits: Limits
    formulas: Mapping[str, tuple[Bools, ...]]
    _made: dict[Key, Passage] = field(default_factory=dict)
    _passing: dict[Key, Passage] = field(default_factory=dict)

    def ids(self, split: Split) -> tuple[str, ...]:
        """Examples of a split, in the order of the run."""
        if split == "twin":
            return tuple(name for name in self.plan.split.twins if name in self.plan.conversations)
        return self.plan.split.train if split == "train" else self.plan.split.held_out

    def passages(
        self, split: Split, format_: str | None = None, only: Collection[str] | None = None
    ) -> tuple[Passage, ...]:
        """A split in one format, the run's first by default; any format that `prompts.load` finds. `only`: some ids.

        Errors: UserError for a format that is none, or that cannot carry an example.
        """
        wanted = [name for name in self.ids(split) if only is None or name in only]
        return tuple(self.passage(split, name, format_ or self.plan.first_format) for name in wanted)

    def passage(self, split: Split, example: str, format_: str) -> Passage:
        """One example in one format. Errors as above."""
        key = split, example, format_
        kept = self._made if format_ in self.plan.formats else self._passing
        if key not in kept:
            one = self.plan.conversations[example]
            shown = one.asked(self.plan.split.twins[example]) if split == "twin" else one
            rendered = prompts.render(shown, self.format(format_), self.plan.vocabulary)
            made = passage.passage(
                example, split, rendered, encode(rendered, self.plan.vocabulary), self.formulas.get(example)
            )
            kept[key] = made if made.format == format_ else _renamed(made, format_)
            if len(self._passing) > _PASSING:
                del self._passing[next(iter(self._passing))]
        return kept[key]

    def format(self, name: str) -> Format:
        """A format of the plan, or any that can be found. Errors: UserError."""
        return self.plan.formats.get(name) or prompts.load([name])[0]

    def quote(self, row: Mapping[str, Any]) -> str:
        """The words of a row's longest run, formulas inside it included; "" where nothing was hit."""
        if row.get("run_start") is None or not row.get("run_max"):
            return ""
        one = self.passage(row["split"], row["id"], row["format"])
        counted = np.flatnonzero(one.counted)
        first = int(np.searchsorted(counted, row["run_start"]))
        last = int(counted[min(first + row["run_max"], len(counted)) - 1])
        ids = [token for token, read in zip(one.ids, one.read, strict=True) if read]
        text: str = self.plan.vocabulary.tokenizer.decode(ids[row["run_start"] : last + 1], skip_special_tokens=False)
        return text.strip()


def _renamed(made: Passage, format_: str) -> Passage:
    """Under the name the recipe gives a format: a path, where the file has a name of its own."""
    return replace(made, format=format_)


def ear(plan: Plan, limits: Limits | None = None) -> Ear:
    """The ear of a plan, with the limits that are shipped unless others are given. Errors: UserError for wrong ones."""
    limits = limits or echo.limits()
    names = (*plan.split.train, *plan.split.held_out)
    answers = {name: _answers(plan.conversations[name]) for name in names}
    formulas = formula.masks(answers, limits.shortest_formula, limits.longest_formula, plan.intended)
    return Ear(plan, limits, formulas)


def _answers(one: Conversation) -> list[str]:
    return [turn.text for turn in one.turns if turn.role == "assistant" and turn.loss]


# the base


@dataclass
class Base:
    """What the base says of passages: read once each, kept in the run, found again when it goes on.

    `seconds`: spent reading what was missing.
    """

    run: RunFolder
    readings: dict[Key, Reading] = field(default_factory=dict)
    seconds: float = 0.0

    def of(self, speaker: Scores, passages: Iterable[Passage]) -> Mapping[Key, Reading]:
        """Readings with the adapter off, of these passages and of all that came before."""
        missing = {one.key: one for one in passages if one.key not in self.readings}
        if missing:
            began = time.monotonic()
            self.keep(heard.read(speaker, list(missing.values()), base=True))
            self.seconds += time.monotonic() - began
        return self.readings

    def keep(self, found: Mapping[Key, Reading]) -> None:
        """Add readings of the base, to the bit as a run that goes on will find them."""
        self.readings.update(found)
        heard.save(self.run.tokens_at(0), self.readings)
        self.readings.update(heard.load(self.run.tokens_at(0)))


def base(run: RunFolder) -> Base:
    """What a run already knows of its base."""
    path = run.tokens_at(0)
    return Base(run, heard.load(path) if path.is_file() else {})


def noise(speaker: Scores, passages: Sequence[Passage]) -> float | None:
    """Logits by which a margin moves on this machine, from a few of these; None where there are none."""
    few = sorted(passages, key=lambda one: len(one.ids))[-_NOISE_FROM:]
    return heard.noise(speaker, few) if few else None


# one hearing


@dataclass(frozen=True)
class Heard:
    """Passages measured at one place. `alarms`: trained examples that echo, and how far; see `echo.alarms`."""

    passages: tuple[Passage, ...]
    measured: Measured
    rows: list[dict[str, Any]]

    @property
    def alarms(self) -> set[tuple[str, Kind]]:
        return echo.alarms(self.measured.found)

    @property
    def readings(self) -> Mapping[Key, Reading]:
        return self.measured.readings


def hear(
    ear: Ear,
    speaker: Scores,
    base: Base,
    passages: Sequence[Passage],
    place: Place,
    noise: float | None = None,
    temperatures: Sequence[float] = looks.TEMPERATURES,
) -> Heard:
    """One pass over passages of any split and format, and their rows for examples.jsonl."""
    known = base.of(speaker, passages)
    measured = echo.measure(speaker, passages, known, ear.limits, noise, CUSTOMARY, temperatures)
    return Heard(tuple(passages), measured, list(rows(measured, place)))


def begin(ear: Ear, speaker: Scores, base: Base, passages: Sequence[Passage], place: Place) -> Heard:
    """The same before the first step, with the adapter off: one pass gives the base's readings and its own rows."""
    readings = heard.read(speaker, passages, True, CUSTOMARY, looks.TEMPERATURES)
    base.keep(readings)
    found = tuple(judge(one, readings[one.key], readings[one.key], ear.limits) for one in passages)
    measured = Measured(found, readings)
    return Heard(tuple(passages), measured, list(rows(measured, place)))


def again(ear: Ear, found: Heard, base: Base, greedy: Mapping[Key, str], place: Place) -> Heard:
    """The same once alarmed examples answered greedily: almost verbatim counts as whole. `greedy`: answers by key."""
    measured = echo.nearly(found.measured, found.passages, base.readings, greedy, ear.limits)
    return Heard(found.passages, measured, list(rows(measured, place)))


def rows(measured: Measured, place: Place) -> Iterator[dict[str, Any]]:
    """Rows for examples.jsonl, each with `nll_tstar`: at the best single temperature of its split and format."""
    of: Map = "light" if place.kind == "light" else "full"
    at = _best_temperatures(measured.found, measured.readings)
    for found, row in zip(measured.found, echo.rows(measured.found, place, of), strict=True):
        sums, best = measured.readings[found.key].nll_at, at.get(_group(found))
        total = None if sums is None or best is None or not found.tokens else float(sums[best])
        yield {**row, "nearly": found.nearly, "nll_tstar": None if total is None else total / found.tokens}


def _best_temperatures(found: Iterable[Found], readings: Mapping[Key, Reading]) -> dict[tuple[str, str], int]:
    """Which temperature gives a split in a format the lowest NLL, summed over tokens."""
    sums: dict[tuple[str, str], Any] = {}
    for one in found:
        if one.tokens and (nll_at := readings[one.key].nll_at) is not None:
            sums[_group(one)] = sums.get(_group(one), 0.0) + nll_at
    return {group: int(np.argmin(total)) for group, total in sums.items()}


def _group(one: Found) -> tuple[str, str]:
    return one.key[0], one.key[2]


# what training heard


@dataclass(frozen=True, eq=False)
class Overheard:
    """What the training forward said of one trained text: of the tokens where `trained`, one step before its row."""

    example: str
    format: str
    trained: Sequence[bool]  # over the text's ids
    log_p: Floats
    hits: Bools


def free(ear: Ear, speaker: Scores, base: Base, said: Iterable[Overheard], place: Place) -> Iterator[dict[str, Any]]:
    """Rows of the free map: a lower estimate, in train mode and in the format the example wore.

    Dropout and skipped layers make it miss more. Tokens that goldfish left out of the loss were not heard: then runs
    are counted between them and no window is judged (`echo_whole`, `long` and `windows` are null). The base is asked
    only where it could decide.
    """
    pairs = [(ear.passage("train", one.example, one.format), one) for one in said]
    whole = [(passage, Reading(one.log_p, one.hits)) for passage, one in pairs if _all_heard(passage, one)]
    loud = [passage for passage, reading in whole if suspect(passage, reading, ear.limits)]
    known = base.of(speaker, loud)
    found = [
        judge(passage, reading, known[passage.key], ear.limits)
        if passage in loud  # not: in known, which after a kill holds what was asked later
        else unsuspected(passage, reading, ear.limits)
        for passage, reading in whole
    ]
    found += [_in_part(passage, one, ear.limits) for passage, one in pairs if not _all_heard(passage, one)]
    for row in echo.rows(found, place, "free"):
        yield {**row, "nll_tstar": None}


def _all_heard(passage: Passage, one: Overheard) -> bool:
    return tuple(one.trained) == passage.read


def _in_part(passage: Passage, one: Overheard, limits: Limits) -> Found:
    """Tokens that were not heard count as missed, and in no sum."""
    heard_at = np.array(one.trained)[np.array(passage.read)]
    hits = np.zeros(len(heard_at), dtype=bool)
    hits[heard_at] = one.hits
    found = judge(passage, Reading(np.zeros(len(hits)), hits), None, limits)
    nll = -float(one.log_p.mean()) if len(one.log_p) else None
    return replace(found, nll=nll, tokens=len(one.hits), log10_pz=None, end_nll=None)
