"""A conversation as lint reads it, in trained pieces and in words, and what a finding is. Judges nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal

from finetune import overlap
from finetune.conversation import Conversation, Part, Turn
from finetune.errors import Problem

Kind = Literal["refuse", "warn"]
Rule = Literal[
    "both-sides",
    "debris",
    "dropped-system",
    "few-examples",
    "foreign",
    "near-copy",
    "no-conclusion",
    "one-perspective",
    "private",
    "same-opening",
    "scaffold",
    "secret",
    "shared-span",
    "short-answer",
    "similar-perspectives",
    "stock-phrase",
    "stop-string",
    "unequal-perspectives",
]


@dataclass(frozen=True)
class Finding:
    """One thing that lint saw. `example`: the id of the example it was seen in, "" where the dataset as a whole is."""

    kind: Kind
    rule: Rule
    problem: Problem
    example: str = ""

    def __str__(self) -> str:
        return str(self.problem)


class Example:
    """A conversation as lint reads it: the trained answers in pieces, everything in words."""

    def __init__(self, of: Conversation) -> None:
        self.of = of

    @cached_property
    def trained(self) -> list[Turn]:
        """The answers in the loss."""
        return [turn for turn in self.of.turns if turn.role == "assistant" and turn.loss]

    @cached_property
    def pieces(self) -> list[tuple[Part, list[str]]]:
        """The parts of all trained answers, each with its words; titles are left out."""
        return [(part, overlap.words(part.text)) for turn in self.trained for part in parts(turn)]

    @cached_property
    def words(self) -> list[str]:
        """The words of all trained answers."""
        return [word for _, some in self.pieces for word in some]

    @cached_property
    def questions(self) -> list[list[str]]:
        """The words of each question."""
        return [overlap.words(turn.text) for turn in self.of.turns if turn.role == "user"]

    @cached_property
    def asked(self) -> list[list[str]]:
        """The last question, its twin, and earlier ones from four words on, in words."""
        earlier = [some for some in self.questions[:-1] if len(some) >= 4]
        return [*earlier, *self.questions[-1:], *([overlap.words(self.of.twin)] if self.of.twin else [])]

    @cached_property
    def asked_triples(self) -> frozenset[tuple[str, ...]]:
        """Three neighbouring words of any question."""
        return frozenset(chain.from_iterable(map(overlap.shingles, self.questions)))

    @cached_property
    def triples(self) -> frozenset[tuple[str, ...]]:
        """Three neighbouring words of the trained answers."""
        return overlap.shingles(self.words)

    def told(self, kind: Kind, rule: Rule, what: str, remedy: str, line: int | None = None) -> Finding:
        """A finding about this example, at a line of its file."""
        place = self.of.origin
        return Finding(kind, rule, Problem(f"{self.of.id}: {what}", remedy, place.file, line or place.line), self.of.id)

    def line(self, word: int) -> int:
        """The line of the piece in which a word of the answer stands."""
        for part, some in self.pieces:
            if word < len(some):
                return part.line
            word -= len(some)
        return self.of.origin.line


def parts(turn: Turn) -> tuple[Part, ...]:
    """How a turn is written; one piece where nobody divided it."""
    return turn.parts or (Part("text", turn.text, line=turn.line),)


def line_of(text: str, turn: Turn) -> int:
    """The line of the part that holds a text; the turn's where none does."""
    return next((part.line for part in parts(turn) if text.strip() in part.text), turn.line)


def quoted(text: str) -> str:
    """A text as it is shown in a finding, on one line."""
    return "«" + text.replace("\n", "\\n") + "»"
