"""What one example is: turns, parts, and where each was written. Frozen; knows no file format, no prompt format."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
PartKind = Literal["text", "perspective", "conclusion", "correction"]


@dataclass(frozen=True)
class Origin:
    """Where an example was written. `line` counts from 1."""

    file: str
    line: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Part:
    """A stretch of an answer. `title` names a perspective; plain text before the first heading has kind `text`."""

    kind: PartKind
    text: str
    title: str = ""
    line: int = 1


@dataclass(frozen=True)
class Turn:
    """One message. `text` is what is trained or shown, part headings rendered; `parts` is how it was written."""

    role: Role
    text: str
    line: int = 1
    loss: bool = True
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One example: an optional system turn, then user and assistant turns in alternation, ending with the assistant."""

    id: str
    turns: tuple[Turn, ...]
    origin: Origin
    tags: tuple[str, ...] = ()
    twin: str | None = None
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def system(self) -> str | None:
        """The system text, or None."""
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else None

    @property
    def question(self) -> str:
        """The last user text."""
        return next(turn.text for turn in reversed(self.turns) if turn.role == "user")

    @property
    def answer(self) -> str:
        """The last assistant text."""
        return self.turns[-1].text

    def asked(self, question: str) -> Conversation:
        """The same example with another last question: how a twin is rendered."""
        last = max(i for i, turn in enumerate(self.turns) if turn.role == "user")
        turns = tuple(Turn("user", question, t.line) if i == last else t for i, t in enumerate(self.turns))
        return Conversation(self.id, turns, self.origin, self.tags, None, self.extra)
