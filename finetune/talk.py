"""A talk with a run: what was said, what would be sent, and who answers how. Rendered as in training.

It prints and reads nothing (see pane, chat), and drops no turn: what does not fit into the base is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from finetune import prompts
from finetune.conversation import Turn
from finetune.errors import UserError, refuse
from finetune.format import Format
from finetune.masks import Vocabulary, encode
from finetune.until import Until
from finetune.voice import Draw, Voice, Who

Ended = Literal["stop", "limit", "interrupted"]


@dataclass(frozen=True)
class Said:
    """One answer. `ended`: by a stop string or EOS, at the limit of tokens, or by the person who asked.

    `drawn`: the tokens as they came, each with its text, what was cut off included.
    """

    who: Who
    text: str
    ended: Ended
    drawn: tuple[tuple[int, str], ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """How many were drawn, EOS not counted."""
        return len(self.drawn)


@dataclass(frozen=True)
class Exchange:
    """A question and what was answered, the last of `said` being what the talk goes on from.

    `sent`: token ids. `number`: of the draw from this seed.
    """

    question: str
    format: str
    system: str | None
    sent: tuple[int, ...]
    draw: Draw
    number: int
    said: tuple[Said, ...]

    @property
    def answer(self) -> str:
        """What the talk goes on from."""
        return self.said[-1].text

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        answers = [
            {"step": s.who.step, "scale": s.who.scale, "answer": s.text, "ended": s.ended, "tokens": s.tokens}
            | {"seconds": round(s.seconds, 3)}
            for s in self.said
        ]
        told = {
            "question": self.question,
            "format": self.format,
            "system": self.system,
            "prompt_tokens": len(self.sent),
        }
        return {**told, "sampler": {**asdict(self.draw), "draw": self.number}, "answers": answers}


class Answering:
    """One answer on its way: iterate for its text in pieces; `said` holds what has come so far."""

    def __init__(self, who: Who, pieces: Iterator[tuple[int, str]], stops: Sequence[str], indent: str, limit: int):
        self._pieces, self._gate = pieces, Until(stops)
        self._who, self._limit, self._indent = who, limit, indent
        self._text: list[str] = []
        self._drawn: list[tuple[int, str]] = []
        self._over, self._began = False, time.monotonic()

    def __iter__(self) -> Iterator[str]:
        for token, piece in self._pieces:
            self._drawn.append((token, piece))
            yield self._kept(self._gate.feed(piece))
            if self._gate.stopped:
                break
        yield self._kept(self._gate.rest())
        self._over = True

    def _kept(self, text: str) -> str:
        self._text.append(text)
        return text

    @property
    def said(self) -> Said:
        """As far as it got."""
        ended: Ended = "interrupted"
        if self._over:
            ended = "stop" if self._gate.stopped or len(self._drawn) < self._limit else "limit"
        text = "".join(self._text)
        text = text.replace(f"\n{self._indent}", "\n") if self._indent else text
        return Said(self._who, text, ended, tuple(self._drawn), time.monotonic() - self._began)


@dataclass
class Talk:
    """Everything a command may change. `beside`: who else answers; `draws`: answers drawn from this seed so far."""

    voice: Voice
    vocabulary: Vocabulary
    format: Format
    who: Who
    beside: Who | None = None
    draw: Draw = field(default_factory=Draw)
    system: str | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    draws: int = 0

    def turns(self, question: str | None = None) -> list[Turn]:
        """All that was said, and a question."""
        found = [Turn("system", self.system)] if self.system else []
        for one in self.exchanges:
            found += [Turn("user", one.question), Turn("assistant", one.answer)]
        return [*found, Turn("user", question)] if question is not None else found

    def ask(self, question: str) -> tuple[tuple[int, ...], list[Answering]]:
        """The ids that are sent, and the answers to come. Errors: UserError where they cannot be sent."""
        try:
            sent = encode(
                prompts.render_prompt(self.turns(question), self.format, self.vocabulary), self.vocabulary
            ).ids
            stops = prompts.stops(self.format, self.vocabulary)
        except UserError as fault:
            raise refuse(fault.problems[0].what, "Choose another one with /format.") from None
        draw = self._fitting(sent)
        everyone = [self.who] if self.beside is None else [self.beside, self.who]
        return sent, [
            Answering(who, self.voice.say(sent, who, draw), stops, self.format.indent, draw.limit) for who in everyone
        ]

    def keep(self, question: str, sent: Sequence[int], answers: Sequence[Answering]) -> Exchange:
        """Write down what was answered."""
        said = tuple(one.said for one in answers)
        made = Exchange(question, self.format.name, self.system, tuple(sent), self.draw, self.draws, said)
        self.exchanges.append(made)
        self.draws += 1
        return made

    def _seeded(self) -> Draw:
        """Every answer has dice of its own, so that a second try is another one; answers side by side share theirs."""
        return replace(self.draw, seed=(self.draw.seed << 20) + self.draws)

    def _fitting(self, sent: Sequence[int]) -> Draw:
        draw, room = self._seeded(), self.voice.room
        if room is None:
            return draw
        if len(sent) >= room:
            what = f"this talk has {len(sent)} tokens; the base was made for {room}."
            raise refuse(what, "Take turns back with /undo, or begin anew with /clear.")
        return replace(draw, limit=min(draw.limit, room - len(sent)))
