"""The handwritten form of an example, as headings: front matter, turns, and the parts of an answer.

Finds them and shows parts as they are trained, never as `#`. Opens no file, reads no YAML, judges no style.
"""

from __future__ import annotations

import difflib
import re
from typing import Literal, NamedTuple, TypeVar

PartsStyle = Literal["bold", "plain"]
PieceKind = Literal["text", "perspective", "conclusion", "correction"]
SheetRole = Literal["system", "user", "assistant"]

_Name = TypeVar("_Name", bound=str)

_ROLES: tuple[SheetRole, ...] = ("system", "user", "assistant")
_PARTS: tuple[PieceKind, ...] = ("perspective", "conclusion", "correction")
_ALIASES: dict[str, SheetRole] = {"human": "user", "question": "user", "gpt": "assistant", "answer": "assistant"}
_HEADING = re.compile(r" {0,3}(#{2,3})(?!#)([ \t]*)(.*?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
_NO_LOSS = re.compile(r"<!--\s*no-loss\s*-->", re.IGNORECASE)
_NEARLY_NO_LOSS = re.compile(r"<!--\s*no[\s_]*loss\s*-->", re.IGNORECASE)


class Fault(NamedTuple):
    """One thing wrong with a sheet. `line` counts from 1."""

    line: int
    what: str
    remedy: str


class Piece(NamedTuple):
    """A stretch of a turn. `title` names a perspective."""

    kind: PieceKind
    title: str
    text: str
    line: int


class Section(NamedTuple):
    """One turn as written; `line` is that of its heading."""

    role: SheetRole
    line: int
    loss: bool
    pieces: tuple[Piece, ...]


class Sheet(NamedTuple):
    """A whole file. `front` is the YAML between the `---` lines, starting at `front_line`; None where there is none."""

    front: str | None
    front_line: int
    sections: tuple[Section, ...]
    faults: tuple[Fault, ...]


def read(text: str) -> Sheet:
    """Every section and every fault of a file's text; newlines are already `\\n`."""
    lines = text.split("\n")
    faults: list[Fault] = []
    front, front_line, first = _front_matter(lines, faults)
    reader = _Reader(faults)
    fenced = _fenced(lines, first, faults)
    for number in range(first, len(lines)):
        reader.take(number + 1, lines[number], number in fenced)
    return Sheet(front, front_line, tuple(reader.sections()), tuple(sorted(faults)))


def show(pieces: tuple[Piece, ...], style: PartsStyle) -> str:
    """The text that is trained: part titles bold or plain on a line of their own, parts a blank line apart."""
    return "\n\n".join(_shown(piece, style) for piece in pieces)


def _shown(piece: Piece, style: PartsStyle) -> str:
    if piece.kind == "text":
        return piece.text
    title = piece.title or piece.kind
    title = title[:1].upper() + title[1:]
    colon = "" if title.endswith((".", "!", "?", ":")) else ":"
    heading = f"**{title}**" if style == "bold" else title + colon
    return f"{heading}\n{piece.text}"


def _front_matter(lines: list[str], faults: list[Fault]) -> tuple[str | None, int, int]:
    """(YAML or None, its first line from 1, index of the first line after it)."""
    start = next((i for i, line in enumerate(lines) if line.strip()), 0)
    if lines[start].rstrip() != "---":
        return None, 1, 0
    for end in range(start + 1, len(lines)):
        if lines[end].rstrip() in ("---", "..."):
            return "\n".join(lines[start + 1 : end]), start + 2, end + 1
    faults.append(Fault(start + 1, "the front matter is never closed.", "Write a line `---` after its last key."))
    return None, 1, len(lines)


def _fenced(lines: list[str], first: int, faults: list[Fault]) -> set[int]:
    """Indices of the lines inside ``` or ~~~ fences, the fences themselves included."""
    inside: set[int] = set()
    fence, opened = "", 0
    for i in range(first, len(lines)):
        mark = _FENCE.match(lines[i])
        if not fence and mark:
            fence, opened = mark[1], i
        elif fence and mark and lines[i].strip().startswith(fence) and not lines[i].strip().strip(fence[0]):
            inside.add(i)
            fence = ""
        if fence:
            inside.add(i)
    if fence:
        faults.append(
            Fault(opened + 1, "this code fence is never closed.", f"Write a line {fence} where the code ends.")
        )
    return inside


class _Reader:
    """Collects lines into pieces and pieces into sections. Line by line, in order."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        self._done: list[Section] = []
        self._role: SheetRole | None = None
        self._line = 1
        self._loss = True
        self._pieces: list[Piece] = []
        self._kind: PieceKind = "text"
        self._title = ""
        self._at = 1
        self._text: list[str] = []
        self._stray = False

    def take(self, line: int, text: str, fenced: bool) -> None:
        """One line of the file."""
        heading = None if fenced else _HEADING.match(text)
        if fenced:
            self._content(line, text)
        elif heading and self._is_heading(line, heading):
            return
        elif _NO_LOSS.fullmatch(text.strip()) and self._role:
            self._loss = False
        else:
            if _NO_LOSS.search(text) or _NEARLY_NO_LOSS.search(text):
                self._fault(line, "a no-loss mark inside text.", "Write <!-- no-loss --> on a line of its own.")
            self._content(line, text.rstrip())

    def sections(self) -> list[Section]:
        """All sections; call once, after the last line."""
        self._close_section()
        return self._done

    def _fault(self, line: int, what: str, remedy: str) -> None:
        self.faults.append(Fault(line, what, remedy))

    def _content(self, line: int, text: str) -> None:
        if self._role is None:
            if text.strip() and not self._stray:
                self._stray = True
                self._fault(line, "text before the first turn.", "Write `## user` above the question.")
            return
        self._text.append(text)

    def _is_heading(self, line: int, match: re.Match[str]) -> bool:
        """True where the line opened a section or part; an unknown heading is a fault and stays content."""
        marks, gap, words = match[1], match[2], match[3]
        known = _ROLES if marks == "##" else _PARTS
        if words and not gap:
            if not _nearest(words, known):
                return False
            self._fault(line, f"`{marks}{words}` is not a heading.", f"Write `{marks} {words}`, with a space.")
        return self._open_role(line, words) if marks == "##" else self._open_part(line, words)

    def _open_role(self, line: int, words: str) -> bool:
        name, count = _NO_LOSS.subn("", words)
        name = name.strip().rstrip(":").strip()
        near = _nearest(name, _ROLES)
        if name.lower() not in _ROLES:
            self._unknown(line, f"## {name}", f"## {near}" if near else "", "a turn")
        if near is None:
            return False
        self._close_section()
        self._role, self._line, self._loss, self._at = near, line, not count, line
        return True

    def _open_part(self, line: int, words: str) -> bool:
        name, _, title = words.partition(":")
        name, title = name.strip(), title.strip()
        near = _nearest(name, _PARTS)
        if name.lower() not in _PARTS:
            self._unknown(line, f"### {words}", _spelt(near) if near else "", "a part of an answer")
        elif self._role != "assistant":
            self._fault(line, f"`### {words}` outside an answer.", "Parts stand under `## assistant`.")
        elif near == "perspective" and not title:
            self._fault(line, "a perspective without a title.", "Write `### perspective: the cautious one`.")
        elif near != "perspective" and title:
            self._fault(line, f"`### {words}` takes no title.", f"Write `### {near}` and the text below it.")
        if near is None or self._role is None:
            return False
        self._close_piece()
        self._kind, self._title, self._at = near, title, line
        return True

    def _unknown(self, line: int, heading: str, near: str, what: str) -> None:
        content = "Inside text write `####`, or put it in a ``` fence."
        remedy = f"Did you mean `{near}`? {content}" if near else content
        self._fault(line, f"`{heading.strip()}` is not {what}.", remedy)

    def _close_piece(self) -> None:
        text = "\n".join(self._text).strip("\n")
        if text.strip():
            self._pieces.append(Piece(self._kind, self._title, text, self._at))
        elif self._kind != "text":
            self._fault(self._at, f"the {self._kind} is empty.", "Write its text below the heading, or remove it.")
        self._text, self._kind, self._title = [], "text", ""

    def _close_section(self) -> None:
        self._close_piece()
        if self._role is not None:
            self._done.append(Section(self._role, self._line, self._loss, tuple(self._pieces)))
        self._pieces = []


def _spelt(kind: PieceKind) -> str:
    return "### perspective: title" if kind == "perspective" else f"### {kind}"


def _nearest(words: str, known: tuple[_Name, ...]) -> _Name | None:
    """The known name that a heading is, or was meant to be, judged by its first word."""
    word = (re.findall(r"[^\W\d_]+", words.lower()) or [""])[0]
    alias = _ALIASES.get(word)
    by_name: dict[str, _Name] = {name: name for name in known}
    close = difflib.get_close_matches(alias or word[:40], by_name, n=1, cutoff=0.7)
    return by_name[close[0]] if close else None
