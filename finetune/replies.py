"""The same questions asked in many formats, and what came of each: ended, too early, the next turn, or no end at all.

It writes down every answer with its prompt and why it was judged so; formats are compared in robustness. It renders
nothing of its own: what is asked is what a client sends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finetune import chance, likeness, prompts, scaffold
from finetune.asking import Completes
from finetune.chance import Interval
from finetune.conversation import Conversation
from finetune.errors import UserError
from finetune.filling import mapped
from finetune.format import Format
from finetune.likeness import Consistency, House
from finetune.lineup import Gauge
from finetune.masks import Vocabulary, encode
from finetune.overlap import words
from finetune.scaffold import Detector

Outcome = Literal["ended", "early", "next turn", "ran on"]


@dataclass(frozen=True)
class Judge:
    """By what answers are judged. `limit`: tokens an answer may have; `early`: share of the shortest taught answer."""

    vocabulary: Vocabulary
    house: House
    detector: Detector
    limit: int
    early: float


@dataclass(frozen=True)
class Reply:
    """One answer. `draw`: 0 greedy, from 1 sampled. `leaks`: marks of other formats; `in_house`: None if unmeasured."""

    format: str
    group: str
    example: str
    kind: str
    question: str
    text: str
    tokens: int
    outcome: Outcome
    stop: str | None
    leaks: tuple[str, ...]
    in_house: bool | None
    base: bool
    draw: int

    @property
    def why(self) -> str:
        """The judgement in words."""
        told = {
            "ended": "ended where an answer of this format ends",
            "early": f"ended after {len(words(self.text))} words",
            "next turn": f"went on to the next turn: {(self.stop or '').strip()}",
            "ran on": f"no end within {self.tokens} tokens",
        }[self.outcome]
        leaks = f"; holds {', '.join(self.leaks)} of another format" if self.leaks else ""
        return told + leaks + {True: "", None: "", False: "; not built like the taught answers"}[self.in_house]


def ask(
    speaker: Completes,
    examples: Sequence[tuple[str, Conversation]],
    gauges: Sequence[Gauge],
    judge: Judge,
    base: bool = False,
    sampler: Any = None,
    draws: int = 1,
) -> Iterator[Reply]:
    """The last question of every (kind, example) in every format, history before it. Greedy unless sampled.

    An example that the base's own template cannot carry is left out of that format alone.
    """
    for gauge in gauges:
        asked = [(kind, one, ids) for kind, one in examples if (ids := _prompt(one, gauge.format, judge)) is not None]
        stops = _stops(gauge.format, judge.vocabulary)
        for draw in range(1 if sampler else 0, draws + 1 if sampler else 1):
            told = speaker.complete([ids for *_, ids in asked], stops, judge.limit, base, sampler, draw)
            for (kind, one, _), answer in zip(asked, told, strict=True):
                yield _judged(gauge, kind, one, answer, judge, (base, draw))


def _prompt(one: Conversation, fmt: Format, judge: Judge) -> tuple[int, ...] | None:
    try:
        return encode(prompts.render_prompt(one.turns[:-1], fmt, judge.vocabulary), judge.vocabulary).ids
    except UserError:
        return None


def _stops(fmt: Format, vocabulary: Vocabulary) -> tuple[str, ...]:
    """What ends an answer, and what would open another turn."""
    more = scaffold.turn_stops(fmt, vocabulary.bos, vocabulary.eos) if fmt != prompts.NATIVE else ()
    return tuple(dict.fromkeys((*prompts.stops(fmt, vocabulary), *more)))


def ends(fmt: Format, vocabulary: Vocabulary) -> frozenset[str]:
    """What may rightly end an answer: the format's mark and the base's EOS ("" as speak tells it)."""
    if fmt == prompts.NATIVE:
        return frozenset({"", *prompts.stops(fmt, vocabulary)})
    return frozenset({"", vocabulary.eos or "", mapped(fmt, vocabulary.bos, vocabulary.eos).end})


def _judged(gauge: Gauge, kind: str, one: Conversation, answer: Any, judge: Judge, how: tuple[bool, int]) -> Reply:
    text = answer.text.strip()
    outcome: Outcome = "ended"
    if answer.stop is None:
        outcome = "ran on"
    elif answer.stop not in ends(gauge.format, judge.vocabulary):
        outcome = "next turn"
    elif len(words(text)) < judge.early * judge.house.fewest_words or not text:
        outcome = "early"
    return Reply(
        format=gauge.name,
        group=gauge.group,
        example=one.id,
        kind=kind,
        question=one.question,
        text=text,
        tokens=answer.tokens,
        outcome=outcome,
        stop=answer.stop,
        leaks=judge.detector.leaks(text, gauge.format),
        in_house=judge.house.kept(text),
        base=how[0],
        draw=how[1],
    )


# --- counted


@dataclass(frozen=True)
class Tally:
    """Answers counted: `ended` rightly, `early`, into the `turn` of the user, `ran_on`; with `leaks` of other formats.

    `in_house`: of the `shaped` ones, where taught answers have a shape at all. `stop`: share that ended rightly.
    """

    n: int
    ended: int
    early: int
    turn: int
    ran_on: int
    leaks: int
    in_house: int
    shaped: int
    words: float | None

    @property
    def stop(self) -> Interval | None:
        return chance.rate(self.ended, self.n)

    @property
    def kept(self) -> Interval | None:
        return chance.rate(self.in_house, self.shaped)


def tally(replies: Iterable[Reply]) -> Tally:
    """Of any answers; shares of nothing are None."""
    some = list(replies)
    counts = Counter(one.outcome for one in some)
    shaped = [one.in_house for one in some if one.in_house is not None]
    mean = sum(len(words(one.text)) for one in some) / len(some) if some else None
    return Tally(
        n=len(some),
        ended=counts["ended"],
        early=counts["early"],
        turn=counts["next turn"],
        ran_on=counts["ran on"],
        leaks=sum(bool(one.leaks) for one in some),
        in_house=shaped.count(True),
        shaped=len(shaped),
        words=mean,
    )


def by(replies: Iterable[Reply], key: Literal["format", "group", "kind"]) -> dict[str, Tally]:
    """Tallies by format, by group of formats or by kind of example."""
    found: dict[str, list[Reply]] = defaultdict(list)
    for one in replies:
        found[{"format": one.format, "group": one.group, "kind": one.kind}[key]].append(one)
    return {name: tally(some) for name, some in found.items()}


def consistency(replies: Iterable[Reply]) -> Consistency:
    """Of the drawn answers, over questions."""
    draws: dict[tuple[str, str], list[str]] = defaultdict(list)
    for one in replies:
        if one.draw:
            draws[one.example, one.format].append(one.text)
    return likeness.consistency(draws)
