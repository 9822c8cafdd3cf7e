"""One sitting with a run: who may answer, in which words they are named, and how a question is put and shown.

It reads no line and knows no command (see commands, chat).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune.errors import refuse
from finetune.opened import Opened
from finetune.pane import Pane
from finetune.recital import Library
from finetune.talk import Exchange, Talk
from finetune.voice import Voice, Who


@dataclass(frozen=True)
class Kept:
    """The adapters of a run that can be worn: their folders by step, the chosen one among them."""

    of: Opened
    folders: Mapping[int, Path]
    chosen: int

    @classmethod
    def by(cls, of: Opened) -> Kept:
        """Errors: UserError where there is none yet."""
        adapter, chosen = of.adapter, of.chosen
        assert chosen is not None  # `of.adapter` has refused that
        return cls(of, {**dict(of.kept()), chosen: adapter}, chosen)

    @property
    def steps(self) -> list[int]:
        """Oldest first."""
        return sorted(self.folders)

    def at(self, epoch: float) -> int:
        """The step of an epoch. Errors: UserError naming the epochs there are."""
        found = [step for step in self.steps if math.isclose(self.of.epoch(step), epoch, abs_tol=5e-3)]
        if not found:
            raise refuse(f"no adapter was kept at epoch {epoch:g}.", f"There is {self}.")
        return found[0]

    def __str__(self) -> str:
        names = [f"{self.of.epoch(step):g}{' (chosen)' if step == self.chosen else ''}" for step in self.steps]
        return ", ".join(names)


@dataclass
class Sitting:
    """A talk, whose it is, and where it is shown."""

    of: Opened
    pane: Pane
    talk: Talk
    voice: Voice
    kept: Kept

    def ask(self, question: str) -> None:
        """Put a question, show the answers as they come, write them down."""
        sent, answers = self.talk.ask(question)
        try:
            if len(answers) == 1:
                self.pane.stream(answers[0])
            else:
                titles = [self.name(who) for who in (self.talk.beside, self.talk.who) if who]
                self.pane.beside(titles, answers)
        except KeyboardInterrupt:
            if not answers[-1].said.text:
                self.pane.note("[stopped before the answer: the question is not kept]")
                return
        self._told(self.talk.keep(question, sent, answers))

    def _told(self, made: Exchange) -> None:
        for said in made.said:
            whose = f" {self.name(said.who)}" if len(made.said) > 1 else ""
            if said.ended == "limit":
                self.pane.note(f"[cut{whose} at {said.tokens} tokens; /max sets the limit]")
            elif said.ended == "interrupted":
                self.pane.note(f"[stopped{whose}]")
            elif not said.text:
                self.pane.note(f"[ended{whose} without a word]")

    def name(self, who: Who) -> str:
        """Of a voice, in words."""
        if who.step is None:
            return f"the base {self.of.base.name}"
        part = "" if who.scale == 1 else f" x {who.scale:g}"
        return f"epoch {self.of.epoch(who.step):g}{part}"

    def status(self) -> str:
        """One line about what a question would meet."""
        talk = self.talk
        beside = f" beside {self.name(talk.beside)}" if talk.beside else ""
        return f"{self.name(talk.who)}{beside} | {talk.format.name} | {self.sampler()} | {self.count()}"

    def sampler(self) -> str:
        """How answers are drawn, in words."""
        draw = self.talk.draw
        parts = {"temperature": draw.temperature, "top-k": draw.top_k, "top-p": draw.top_p, "min-p": draw.min_p}
        told = [f"{name} {value:g}" for name, value in parts.items() if value is not None]
        return f"{', '.join(told)}, seed {draw.seed}" if draw.temperature else "greedy"

    def count(self) -> str:
        """How long the talk is, in words."""
        number = len(self.talk.exchanges)
        return f"{number} exchange{'' if number == 1 else 's'}"

    def last(self) -> Exchange:
        """Errors: UserError before the first answer."""
        if not self.talk.exchanges:
            raise refuse("nothing was answered yet.", "Ask something first.")
        return self.talk.exchanges[-1]

    @cached_property
    def library(self) -> Library:
        """Every answer of the dataset, held-out ones too; what is meant to be recited counts as house style."""
        return Library(self.of.plan.conversations.values(), self.of.plan.intended)
