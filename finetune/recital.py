"""Which words of one answer stand, in the same order, in an answer of the dataset, and where it was written.

Words only: it asks no model and gives no verdict. House style, as `formula` knows it, is found too and called so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from finetune import formula
from finetune.conversation import Conversation, Turn
from finetune.reading import line_of
from finetune.runlength import Bools, Ints

_SHORTEST = 3  # words; below it almost everything is shared


@dataclass(frozen=True)
class Span:
    """Characters `[start, stop)` of the answer, and whose words they are. `own`: of `words`, those in no formula."""

    start: int
    stop: int
    words: int
    own: int
    example: Conversation
    line: int


@dataclass(frozen=True, eq=False)
class _Home:
    """One answer of an example: its words, where each stands, and which of them are house style."""

    example: Conversation
    turn: Turn
    words: Sequence[str]
    places: Ints
    style: Bools

    def line(self, word: int, size: int) -> int:
        """In the example's file, of so many words from one on: of the part that they begin in, its title aside."""
        text = self.turn.text[self.places[word, 0] : self.places[word + size - 1, 1]]
        known = (line_of(piece, self.turn) for piece in text.split("\n") if piece.strip())
        return next((line for line in known if line != self.turn.line), self.turn.line)


class Library:
    """The answers of a dataset, to be searched for. `intended`: spans that are meant to be recited."""

    def __init__(self, examples: Iterable[Conversation], intended: Sequence[str] = ()) -> None:
        told = {one.id: (one, [turn for turn in one.turns if turn.role == "assistant"]) for one in examples}
        answers = {name: [turn.text for turn in turns] for name, (_, turns) in told.items()}
        masks = formula.masks(answers, intended=intended)
        self._homes = [
            _Home(one, turn, *formula.placed(turn.text), style)
            for name, (one, turns) in told.items()
            for turn, style in zip(turns, masks[name], strict=True)
        ]
        self._where: defaultdict[tuple[str, ...], list[tuple[_Home, int]]] = defaultdict(list)
        for home in self._homes:
            for at, words in enumerate(zip(*(home.words[skip:] for skip in range(_SHORTEST)), strict=False)):
                self._where[words].append((home, at))

    def recited(self, answer: str) -> list[Span]:
        """Stretches of three words or more, from the left, each the longest that begins there; they do not overlap."""
        words, places = formula.placed(answer)
        found: list[Span] = []
        at = 0
        while at < len(words):
            size, home, there = max(self._shared(words, at), key=lambda one: one[0], default=(1, None, 0))
            if home is not None:
                own = int(np.count_nonzero(~home.style[there : there + size]))
                start, stop = int(places[at, 0]), int(places[at + size - 1, 1])
                found.append(Span(start, stop, size, own, home.example, home.line(there, size)))
            at += size
        return found

    def _shared(self, words: Sequence[str], at: int) -> Iterator[tuple[int, _Home | None, int]]:
        """(words, where, from which word on) of every stretch that begins at a word."""
        for home, there in self._where.get(tuple(words[at : at + _SHORTEST]), ()):
            pairs = zip(words[at:], home.words[there:], strict=False)
            yield sum(1 for _ in takewhile(lambda two: two[0] == two[1], pairs)), home, there
