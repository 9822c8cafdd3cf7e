"""Questions with choices: which one a model holds for right, and how surely. By log p of the choices' own text.

No letters A to D, whose order a model may like better than the answers. It asks a speaker and keeps nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finetune.asking import Scores
from finetune.errors import Problem, UserError
from finetune.format import Rendered, Segment
from finetune.masks import Tokens, Vocabulary, encode

_ASKED = "Question: {}\nAnswer:"  # plain text continues so in any base, chat-tuned or not


@dataclass(frozen=True)
class Fact:
    """`choices[right]` is the only right answer. `source`: where it stands."""

    id: str
    question: str
    choices: tuple[str, ...]
    right: int
    source: str = ""


@dataclass(frozen=True)
class Held:
    """What a model makes of one fact. `shares`: of the choices' probability, in their order, summing to 1."""

    shares: tuple[float, ...]
    right: int

    @property
    def rank(self) -> int:
        """1 where the right choice is the likeliest; a tie counts against it."""
        return sum(share >= self.shares[self.right] for share in self.shares)

    @property
    def best(self) -> int:
        """The likeliest choice; where the right one ties with another, the other."""
        order = sorted(range(len(self.shares)), key=lambda i: (-self.shares[i], i == self.right))
        return order[0]

    @property
    def surprise(self) -> float:
        """Nats by which the right choice falls short of certain, among the choices."""
        return -float(np.log(max(self.shares[self.right], 1e-12)))

    def sure(self, least: float) -> bool:
        """Right, with at least this share."""
        return self.rank == 1 and self.shares[self.right] >= least


def read(path: Path) -> list[Fact]:
    """Rows of `id`, `question`, `choices` and `right` (its text). UserError with every row that is not."""
    found, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            fact = _fact(line, f"{path.parent.name}/{path.name}:{number}")
            found += [fact] if fact else []
            problems += [] if fact else [Problem("this is no question with choices.", _REMEDY, path, number)]
    if problems:
        raise UserError(problems)
    return found


_REMEDY = 'Write {"id": "...", "question": "...", "choices": ["...", "..."], "right": "one of them"}.'


def _fact(line: str, source: str) -> Fact | None:
    try:
        row = json.loads(line)
        choices, right = tuple(row["choices"]), row["choices"].index(row["right"])
        texts = [row["id"], row["question"], *choices]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    sound = all(isinstance(text, str) and text.strip() for text in texts) and len(set(choices)) == len(choices) > 1
    return Fact(row["id"], row["question"], choices, right, source) if sound else None


def asked(question: str, answer: str, vocabulary: Vocabulary) -> Tokens:
    """Plain text, the answer in the loss, without an end mark."""
    lead, end = Segment(" ", "lead", True), Segment("", "end", True)
    parts = (Segment(_ASKED.format(question)), lead, Segment(answer, "answer", True), end)
    return encode(Rendered("", parts), vocabulary)


def ask(speaker: Scores, facts: Sequence[Fact], vocabulary: Vocabulary, base: bool = False) -> list[Held]:
    """One pass over every choice of every fact, in order."""
    texts = list(each_choice(facts, vocabulary))
    scores = speaker.score([one.ids for one in texts], [one.trained for one in texts], base=base) if texts else []
    each = iter([-float(score.nll) for score in scores])
    return [_held([next(each) for _ in fact.choices], fact.right) for fact in facts]


def _held(log_p: Sequence[float], right: int) -> Held:
    odds = np.exp(np.array(log_p) - max(log_p))
    return Held(tuple((odds / odds.sum()).tolist()), right)


def each_choice(facts: Sequence[Fact], vocabulary: Vocabulary) -> Iterator[Tokens]:
    """The texts that one pass reads: every choice of every fact, in order."""
    return (asked(one.question, choice, vocabulary) for one in facts for choice in one.choices)


def map_at_3(ranks: Sequence[int]) -> float | None:
    """Mean of 1 / rank of the right choice, 0 beyond the third; None of nothing."""
    return sum(1 / rank if rank <= 3 else 0.0 for rank in ranks) / len(ranks) if ranks else None


def told(fact: Fact, held: Held) -> Iterator[str]:
    """What a finding says of it."""
    verdict = "right" if held.rank == 1 else f"wrong, for {fact.choices[fact.right]}"
    yield f"{verdict}, with {held.shares[held.best]:.0%} of the choices' probability"
