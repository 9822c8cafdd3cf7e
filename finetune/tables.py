"""Rows of words as lines of text that fit a terminal. It knows no meaning, prints nothing, and drops no row."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

_NARROW = 80  # columns below which a reason stands under its number, not beside it
_INDENT = "  "
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def columns(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Cells under one another, two spaces apart; with a `width`, what is over it is cut with `…`."""
    cells = [[harmless(cell).replace("\n", " ") for cell in row] for row in rows]
    sizes = [max(map(wide, column)) for column in zip(*cells, strict=True)]
    lines = (_INDENT.join(_padded(cell, size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in cells)
    return [line if width is None else _cut(line, width) for line in lines]


def told(rows: Sequence[tuple[str, str, str]], width: int) -> list[str]:
    """(name, value, reason) below one another; on a narrow terminal the reason has lines of its own."""
    rows = [(harmless(name), harmless(value), harmless(reason)) for name, value, reason in rows]
    names = max((wide(name) for name, _, _ in rows), default=0)
    values = min(max((wide(value) for _, value, _ in rows), default=0), 18)
    lines: list[str] = []
    for name, value, reason in rows:
        head = f"{_INDENT}{_padded(name, names)}{_INDENT}{_padded(value, values)}"
        if width >= _NARROW and wide(value) <= values:
            lines += _hung(f"{head}{_INDENT}", reason, width)
        else:
            lines += [head.rstrip(), *_hung(_INDENT * 2, reason, width)]
    return lines


def wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """A paragraph in lines, each begun by `indent`."""
    return _hung(indent, harmless(text), width)


def harmless(text: str) -> str:
    """What a terminal would obey instead of showing, made visible: control characters, lone surrogates, bidi marks."""
    return _HARMFUL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def wide(text: str) -> int:
    """Columns of a terminal: two for East Asian wide letters, none for combining marks."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _hung(head: str, text: str, width: int) -> list[str]:
    """Text after a head, its further lines under its first."""
    room = max(20, width - wide(head))
    first, *more = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
    return [f"{head}{first}".rstrip(), *(" " * wide(head) + line for line in more)]


def _padded(text: str, size: int) -> str:
    return text + " " * (size - wide(text))


def _cut(line: str, width: int) -> str:
    if wide(line) <= width:
        return line
    return "".join(_within(line, width - 1)).rstrip() + "…"


def _within(letters: Iterable[str], width: int) -> Iterator[str]:
    for letter in letters:
        width -= wide(letter)
        if width < 0:
            return
        yield letter
