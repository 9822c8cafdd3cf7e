"""How alike two answers are, and whether one keeps the shape of the house: perspectives, then a conclusion.

Alike is the F1 of two bags of words [ROUGE-1; Lin 2004]: no model, no order, and so no judgement of meaning. What two
answers to different questions have in common is the floor it is read against. Words only; nothing is generated here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Literal

from finetune import chance
from finetune.chance import Interval
from finetune.overlap import words

PartsStyle = Literal["bold", "plain"]
_HEADINGS: dict[PartsStyle, re.Pattern[str]] = {
    "bold": re.compile(r"^[ \t]*\*\*([^*\n]{1,80})\*\*[ \t]*$", re.MULTILINE),
    "plain": re.compile(r"^[ \t]*([^\W\d_][^:.!?\n]{0,79}):[ \t]*$", re.MULTILINE),
}
_CONCLUSION, _CORRECTION = "conclusion", "correction"
_MOSTLY = 0.5  # share of taught answers that must have a shape before it is the house's


def alike(one: str, other: str) -> float:
    """F1 of the two bags of words, in [0, 1]; two empty answers are alike."""
    bags = Counter(words(one)), Counter(words(other))
    total = bags[0].total() + bags[1].total()
    return 2 * (bags[0] & bags[1]).total() / total if total else 1.0


# --- the house's shape


@dataclass(frozen=True)
class Shape:
    """What an answer is made of. `voices`: perspectives that say something; `concluded`: it ends with a conclusion."""

    voices: int
    concluded: bool


def shape(text: str, style: PartsStyle) -> Shape:
    """By the headings that `data.parts` makes; one with nothing below it does not count."""
    found = [*_HEADINGS[style].finditer(text)]
    ends = [*(one.start() for one in found[1:]), len(text)]
    titles = [
        one.group(1).strip().rstrip(":").casefold()
        for one, end in zip(found, ends, strict=False)
        if text[one.end() : end].strip()
    ]
    voices = sum(title not in (_CONCLUSION, _CORRECTION) for title in titles)
    return Shape(voices, bool(titles) and titles[-1] == _CONCLUSION)


@dataclass(frozen=True)
class House:
    """How the taught answers are built: how many voices at least, whether they conclude, words of the shortest."""

    style: PartsStyle
    voices: int
    concludes: bool
    fewest_words: int

    def kept(self, text: str) -> bool | None:
        """Whether an answer is built so; None where most taught answers have neither voices nor a conclusion."""
        if not self.voices and not self.concludes:
            return None
        own = shape(text, self.style)
        return own.voices >= self.voices and (own.concluded or not self.concludes)


def house(taught: Sequence[str], style: PartsStyle) -> House:
    """Of the answers that were trained: what most of them have, and the fewest voices of those that have any."""
    shapes = [shape(text, style) for text in taught]
    voices = [one.voices for one in shapes if one.voices]
    enough = _MOSTLY * len(shapes)
    return House(
        style,
        min(voices) if len(voices) > enough else 0,
        bool(shapes) and sum(one.concluded for one in shapes) > enough,
        min((len(words(text)) for text in taught), default=0),
    )


# --- the same question, asked in other formats


@dataclass(frozen=True)
class Consistency:
    """How alike answers are, means over questions: `across` formats, `within` one, `unrelated` questions in one format.

    `lost`: within - across, question by question: what another format costs beyond another draw.
    """

    across: Interval | None
    within: Interval | None
    unrelated: float | None
    lost: Interval | None

    @property
    def share(self) -> float | None:
        """Across as a share of within, both above the floor of unrelated questions; None where within is no higher."""
        if self.across is None or self.within is None or self.unrelated is None:
            return None
        room = self.within.value - self.unrelated
        return (self.across.value - self.unrelated) / room if room > 0 else None


def consistency(draws: Mapping[tuple[str, str], Sequence[str]]) -> Consistency:
    """Of two draws or more for each (question, format), all drawn alike; greedy answers have no within."""
    asked: dict[str, dict[str, Sequence[str]]] = {}
    for (question, name), texts in draws.items():
        asked.setdefault(question, {})[name] = texts
    across = {question: _mean(_pairs_across(by)) for question, by in asked.items()}
    within = {question: _mean(_pairs_within(by)) for question, by in asked.items()}
    both = [(within[name], across[name]) for name in asked]
    lost = [one - other for one, other in both if one is not None and other is not None]
    return Consistency(
        chance.mean([one for one in across.values() if one is not None]),
        chance.mean([one for one in within.values() if one is not None]),
        _mean(_unrelated(asked)),
        chance.mean(lost),
    )


def _pairs_across(by: Mapping[str, Sequence[str]]) -> list[float]:
    return [alike(a, b) for one, other in combinations(by.values(), 2) for a, b in zip(one, other, strict=False)]


def _pairs_within(by: Mapping[str, Sequence[str]]) -> list[float]:
    return [alike(a, b) for texts in by.values() for a, b in combinations(texts, 2)]


def _unrelated(asked: Mapping[str, Mapping[str, Sequence[str]]]) -> list[float]:
    names = dict.fromkeys(name for by in asked.values() for name in by)
    first = {name: [by[name][0] for by in asked.values() if by.get(name)] for name in names}
    return [alike(a, b) for texts in first.values() for a, b in combinations(texts, 2)]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
