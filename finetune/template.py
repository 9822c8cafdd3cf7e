"""A base's own chat template, run as transformers runs it, and where in its output each answer stands.

The template is a stranger's program: it runs in jinja's sandbox, and whatever it does to a conversation must be
provable from outside, or the conversation is refused by name. It is never read, patched or guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.conversation import Origin, Turn
from finetune.errors import UserError, refuse
from finetune.format import Segment, Special

_MARK = re.compile("(\ue000[0-9]+\ue001)")  # private use: no writer types it, no template knows it
_REMEDY = "Train in a format from `sft ls formats` instead, or shorten the example to one question and answer."


def from_template(turns: Sequence[Turn], special: Special, origin: Origin | None = None) -> list[Segment]:
    """The segments of a conversation, or of a prompt where it ends in a question; BOS left out.

    An earlier answer that is not in the loss is a text like the others; only the rest must be located.
    UserError (at `origin`) where there is no template, it refuses the conversation, or an answer cannot be located.
    """
    return _Filling(turns, special, origin).segments()


class _Generation(Extension):
    """`{% generation %}` marks answers for other trainers; here their places are proved, so only its body matters."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own declaration is a plain set)

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise ValueError(message)


def _today(pattern: str) -> str:
    """Rendering is pure, so a run that goes on tomorrow sees the same tokens: always Llama 3's own fallback day."""
    return datetime(2024, 7, 26).strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **rest: Any) -> str:
    """Jinja's own filter escapes HTML; transformers' does not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **rest)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """The environment of transformers' `chat_template_utils`."""
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals.update(raise_exception=_raise, strftime_now=_today)
    return sandbox.from_string(template)


class _Place(NamedTuple):
    """An answer in the marked text: `[start, mark)` is its lead, the mark ends at `after`, its ending at `stop`."""

    start: int
    mark: int
    after: int
    stop: int


class _Filling:
    """The template is run with a mark in place of each text, so each text's place is known whatever the template does.

    The texts then replace the marks, and the result must equal a run with the texts themselves.
    """

    def __init__(self, turns: Sequence[Turn], special: Special, origin: Origin | None) -> None:
        self.turns, self.special, self.origin = turns, special, origin
        self.marks = [f"\ue000{at}\ue001" for at in range(len(turns))]
        self.asks = turns[-1].role == "user"
        self.whole = self.run(self.marks, self.asks)
        self.texts = self.as_shown()

    def segments(self) -> list[Segment]:
        rows: list[Segment] = []
        cursor, last = 0, len(self.turns) - 1
        for at, turn in enumerate(self.turns):
            if turn.role != "assistant" or not (turn.loss or at == last):
                continue
            place = self.place(at)
            ending = self.whole[place.after : place.stop] or (self.special.eos or "")
            rows += self.plain(self.whole[cursor : place.start])
            rows.append(Segment(self.whole[place.start : place.mark], "lead", turn.loss))
            rows.append(Segment(self.texts[at], "answer", turn.loss))
            rows.append(Segment(ending, "end", turn.loss))
            cursor = place.stop
        return rows + (self.plain(self.whole[cursor:]) if self.turns[last].role == "user" else [])

    def place(self, at: int) -> _Place:
        """Found by the prefix property: the prompt before the answer begins the whole; so does the text to its end."""
        asked, told = self.run(self.marks[:at], True), self.run(self.marks[: at + 1], False)
        mark = self.whole.find(self.marks[at], len(asked))
        after = mark + len(self.marks[at])
        if not self.whole.startswith(asked) or not self.whole.startswith(told) or not len(asked) <= mark < len(told):
            raise self.refused(f"it rewrites earlier turns, so answer {self.number(at)} cannot be located.")
        ending = self.whole[after : len(told)].rstrip()
        if ending or at == len(self.turns) - 1:
            return _Place(len(asked), mark, after, after + len(ending))
        return _Place(len(asked), mark, after, len(told) + 1)  # no mark: on to the first token of the next turn

    def as_shown(self) -> list[str]:
        """The texts as the template shows them: untouched or trimmed."""
        real = self.run([turn.text for turn in self.turns], self.asks)
        for texts in ([turn.text for turn in self.turns], [turn.text.strip() for turn in self.turns]):
            shown = dict(zip(self.marks, texts, strict=True))
            if real == "".join(shown.get(part, part) for part in _MARK.split(self.whole)):
                return texts
        raise self.refused("it changes the texts, so they cannot be told from the template's own words.")

    def plain(self, marked: str) -> list[Segment]:
        """What is not an answer in the loss: scaffold and texts by turns."""
        shown = dict(zip(self.marks, self.texts, strict=True))
        rows = [Segment(shown[p], "text") if p in shown else Segment(p) for p in _MARK.split(marked)]
        return [row for row in rows if row.text]

    def run(self, texts: Sequence[str], asks: bool) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(self.turns, texts, strict=False)]
        given = {
            **self.special.special_tokens,
            "bos_token": self.special.bos or "",
            "eos_token": self.special.eos or "",
        }
        if not self.special.chat_template:
            what = "the base has no chat template of its own, so there is no format `native`."
            raise refuse(what, "Take `native` out of the recipe's formats; a base is usually trained without one.")
        try:
            template = _compiled(self.special.chat_template)
            text = template.render(messages=messages, add_generation_prompt=asks, tools=None, documents=None, **given)
        except Exception as error:  # a stranger's program: anything it raises is a refusal, to be told
            raise self.refused(f"{error}.") from None
        return text.removeprefix(self.special.bos) if self.special.bos else text

    def refused(self, why: str) -> UserError:
        place = self.origin or Origin("")
        line = place.line if self.origin else None
        return refuse(f"the base's own chat template cannot carry this: {why}", _REMEDY, place.file or None, line)

    def number(self, at: int) -> int:
        return sum(turn.role == "assistant" for turn in self.turns[: at + 1])
