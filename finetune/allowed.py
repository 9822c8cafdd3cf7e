"""Spans that a model may recite, from the file of `data.intended`: a motto, a greeting, a licence.

One a line. Lines without an empty one between them are also taken together, so that a wrapped text counts as one span;
a single word in such a block is no span of its own. It looks at words only, as echo does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import Problem, refuse
from finetune.formula import placed


@dataclass(frozen=True)
class Span:
    """What may be recited, and where that was written."""

    text: str
    file: str
    line: int


def read(path: Path | str) -> tuple[Span, ...]:
    """The spans of a file. Errors: UserError where it cannot be read as text, or holds no words."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise refuse(f"data.intended: {path} cannot be read ({why}).", "Name a text file, one span a line.") from None
    found = tuple(_spans(lines, str(path)))
    if not found:
        raise refuse("data.intended: there are no words in it.", "Write one span a line, or leave it out.", str(path))
    return found


def _spans(lines: list[str], file: str) -> Iterator[Span]:
    for block in _blocks(lines):
        first, texts = block[0][0], [text for _, text in block]
        if len(block) > 1:
            yield Span("\n".join(texts), file, first)
        yield from (Span(text, file, line) for line, text in block if _long_enough(text, alone=len(block) == 1))


def _long_enough(text: str, alone: bool) -> bool:
    return len(placed(text)[0]) >= (1 if alone else 2)


def _blocks(lines: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Lines that hold words, with their numbers, until an empty one."""
    block: list[tuple[int, str]] = []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            block.append((number, line))
        elif block:
            yield block
            block = []


def strangers(spans: Iterable[Span], answers: Iterable[str]) -> Iterator[Problem]:
    """Spans that stand in no answer, whole or in part: probably mistyped. A line of a block that stands is none."""
    texts = [f" {' '.join(placed(answer)[0])} " for answer in answers]
    ends = 0
    for span in spans:
        words = " ".join(placed(span.text)[0])
        if any(f" {words} " in text for text in texts):
            ends = max(ends, span.line + span.text.count("\n"))
        elif "\n" not in span.text and span.line > ends:
            what = f"data.intended: no answer holds «{_short(span.text)}»."
            yield Problem(what, "Write it word for word as the answers have it.", span.file, span.line)


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
