"""One look: which texts are read, their sums for metrics.jsonl and their rows for examples.jsonl.

A light look reads held-out examples and alarmed ones in one format; a full one all splits, held-out ones in every
format and each in a few strange ones, alarmed ones in every trained format. Of alarmed ones it reads the strongest, as
many as are held out: the free map hears every example every epoch. It decides nothing, and writes only per-token
numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from finetune import ear, heard, looks, prompts, runs
from finetune.ear import Base, Ear, Heard, Overheard
from finetune.errors import UserError
from finetune.looks import Movement, Place
from finetune.passage import Key, Passage
from finetune.prefix import NoRoom
from finetune.rota import Rota
from finetune.runs import RunFolder
from finetune.speak import Answer, Speaker

_ASKED = 8  # alarmed examples whose answer is written out at a full look; the likeliest ones: writing is dear

Row = dict[str, Any]


@dataclass(frozen=True)
class Taken:
    """The rows of one look."""

    metrics: list[Row]
    examples: list[Row]
    findings: list[Row] = field(default_factory=list)


@dataclass
class Hearing:
    """Takes the looks of one run. `noise`: logits by which margins move here; None until it was measured.

    `rota`: which strange formats full looks go through; without one they read the recipe's own alone.
    """

    run: RunFolder
    ear: Ear
    speaker: Speaker
    base: Base
    rota: Rota | None = None
    noise: float | None = None
    _readings: dict[Key, heard.Reading] = field(default_factory=dict)
    _mute: bool = False  # no answer can be written on this machine: said once

    def look(self, place: Place, movement: Movement, alarmed: Sequence[str], before: int = 0) -> Taken:
        """Measure at one place. `alarmed`: trained examples that were heard to echo, the strongest first.

        `before`: full looks that were taken since the base's.
        """
        self._readings = {}
        metrics: list[Row] = []
        examples: list[Row] = []
        for passages in self._groups(place, alarmed):
            began = time.monotonic()
            found = self._hear(passages, place)
            examples += found.rows
            if self._is_whole(passages):
                metrics += looks.rows(found.readings.values(), passages, place, movement, time.monotonic() - began)
        if place.kind == "light" or place.step == 0:
            return Taken(metrics, examples)
        strange = self._strange(place, before)
        heard.save(self.run.tokens_at(place.step), self._readings)
        said = self.rota.finding([*self._of_base, *examples, *strange], place) if self.rota else None
        return Taken(metrics, [*examples, *strange], [said] if said else [])

    def free(self, said: Sequence[Overheard], place: Place) -> list[Row]:
        """Rows of what the training forward said."""
        return list(ear.free(self.ear, self.speaker, self.base, said, place))

    def answers(self, prompts: Sequence[Sequence[int]], stops: Sequence[str], limit: int) -> list[Answer] | None:
        """Greedy answers; None, which the log tells once, where the model can be read here but cannot write."""
        try:
            return self.speaker.complete(prompts, stops, limit)
        except NoRoom as fault:
            if not self._mute:
                self.run.note(f"No answers are written at looks: {fault}.")
            self._mute = True
            return None

    def _groups(self, place: Place, alarmed: Sequence[str]) -> Iterator[Sequence[Passage]]:
        """Texts that are read together, each with the others of its split and format."""
        plan, hear = self.ear.plan, self.ear.passages
        full, first, alarmed = place.kind != "light", plan.first_format, alarmed[: plan.most_alarmed()]
        wanted = [hear("held_out"), hear("train", only=None if full or not plan.split.held_out else alarmed)]
        if full:
            wanted += [hear("twin"), *(hear("held_out", name) for name in plan.formats if name != first)]
            wanted += [hear("train", name, alarmed) for name in plan.recipe.formats.train if name != first]
        return (passages for passages in wanted if passages)

    def _is_whole(self, passages: Sequence[Passage]) -> bool:
        return len(passages) == len(self.ear.ids(passages[0].split))

    @cached_property
    def _of_base(self) -> list[Row]:
        """Held-out rows of the look at the base."""
        rows = runs.read_lines(self.run.examples)
        return [row for row in rows if row["step"] == 0 and row["split"] == "held_out"]

    def _strange(self, place: Place, number: int) -> list[Row]:
        """Rows of held-out examples in the formats whose turn it is, the base's loss in each. No temperature: the best
        one for a single answer would flatter it."""
        pairs = self.rota.met(number) if self.rota else ()
        passages = [one for pair in pairs if (one := self._carried(*pair))]
        if not passages:
            return []
        found = ear.hear(self.ear, self.speaker, self.base, passages, place, self.noise, temperatures=())
        self._readings.update(found.readings)
        rows = zip(found.rows, passages, strict=True)
        return [{**row, **_beside(one, self.base.readings[one.key])} for row, one in rows]

    def _carried(self, example: str, format_: str) -> Passage | None:
        """None where a format cannot carry an example."""
        try:
            return self.ear.passage("held_out", example, format_)
        except UserError:
            return None

    def _hear(self, passages: Sequence[Passage], place: Place) -> Heard:
        if place.step == 0:
            found = ear.begin(self.ear, self.speaker, self.base, passages, place)
            if self.noise is None:
                self.noise = ear.noise(self.speaker, passages)
            return found
        found = ear.hear(self.ear, self.speaker, self.base, passages, place, self.noise)
        if place.kind != "light" and passages[0].split == "train":
            found = self._asked(found, place)
        self._readings.update(found.readings)
        return found

    def _asked(self, found: Heard, place: Place) -> Heard:
        """Let those write who hit long runs and not all: an answer that is almost the trained one counts as whole."""
        pairs = zip(found.passages, found.measured.found, strict=True)
        likely = [(one.hits / one.tokens, passage) for passage, one in pairs if one.long and one.whole is False]
        asked = [one for _, one in sorted(likely, key=lambda pair: pair[0], reverse=True) if one.asked][:_ASKED]
        greedy = self._greedy(asked) if asked else None
        return found if greedy is None else ear.again(self.ear, found, self.base, greedy, place)

    def _greedy(self, asked: Sequence[Passage]) -> Mapping[Key, str] | None:
        """Answers to the bare prompts of passages in one format; None where none can be written."""
        format_, vocabulary = self.ear.format(asked[0].format), self.ear.plan.vocabulary
        limit = 1 + max(5 * sum(one.read) // 4 for one in asked)
        stops = prompts.stops(format_, vocabulary)
        answers = self.answers([one.asked for one in asked], stops, limit)
        if answers is None:
            return None
        return {one.key: answer.text for one, answer in zip(asked, answers, strict=True)}


def _beside(one: Passage, base: heard.Reading) -> Row:
    """The base's loss and that of its end marks, as the row has the adapter's: no look at the base has read it."""
    return {"base_nll": -float(base.log_p.mean()), "base_end_nll": -float(base.log_p[one.ends].sum())}
