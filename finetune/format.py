"""What a prompt format is, and what a rendered text is: strings around the turns. Knows no tokenizer, renders nothing.

Filling a format in is `prompts`' work, turning the result into token ids `masks`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

SystemMode = Literal["before", "inside_first_user", "none"]
Role = Literal["scaffold", "text", "lead", "answer", "end"]


@dataclass(frozen=True)
class Format:
    """One prompt format as published by its source, byte for byte.

    `assistant_suffix` ends an answer in the history; `generation_prompt` is what a client sends last. `end` is the mark
    the model must emit to end its answer ("" where the format has none: the tokenizer's EOS is used). `indent` goes
    before every further line of a text. With `system_mode: none` the source drops a system text.
    """

    name: str
    family: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    assistant_suffix: str
    generation_prompt: str
    system_mode: SystemMode = "before"
    system_prefix: str = ""
    system_suffix: str = ""
    default_system: str = ""
    first_user_prefix: str | None = None
    bos: str = ""
    end: str = ""
    stop_strings: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    notes: str = ""
    aliases: tuple[str, ...] = field(default=())
    indent: str = ""


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered text. `text` and `answer` are a writer's words, all else is the format's.

    An answer is a row of three, any of them possibly empty: `lead` (the space after `ASSISTANT:`), `answer`, `end`.
    """

    text: str
    role: Role = "scaffold"
    trained: bool = False

    @property
    def is_content(self) -> bool:
        """Written by a person: no special token is recognised in it."""
        return self.role in ("text", "answer")


@dataclass(frozen=True)
class Stretch:
    """One answer, in characters of `Rendered.text` or in tokens: lead and words `[start, end)`, end `[end, stop)`."""

    start: int
    end: int
    stop: int
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """A whole example, or a prompt, in one format; the base's BOS is not part of it."""

    format: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """What the base reads, after its BOS."""
        return "".join(segment.text for segment in self.segments)

    @property
    def answers(self) -> tuple[Stretch, ...]:
        """Where each answer stands, in characters."""
        return tuple(self._answers())

    @property
    def prompt(self) -> int:
        """How many characters a client sends before the last answer; all of them where the text ends in a question."""
        if self.segments and self.segments[-1].role == "end":
            return self.answers[-1].start
        return len(self.text)

    def _answers(self) -> Iterator[Stretch]:
        at = start = end = 0
        for segment in self.segments:
            if segment.role == "lead":
                start = at
            at += len(segment.text)
            if segment.role == "answer":
                end = at
            if segment.role == "end":
                yield Stretch(start, end, at, segment.trained)


class Special(Protocol):
    """What rendering asks of a base: its document tokens as strings, None where it has none, and its chat template."""

    @property
    def bos(self) -> str | None: ...
    @property
    def eos(self) -> str | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def special_tokens(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Marks:
    """A `Special` in plain values, for where no base is at hand."""

    bos: str | None = "<s>"
    eos: str | None = "</s>"
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
