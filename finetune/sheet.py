"""A talk as a dataset file: the handwritten form that `corpus` reads, parts of answers as headings, to be edited.

What it writes is read back before it is kept, so that `sft check` accepts it. It judges no style, overwrites nothing.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune import corpus, disk
from finetune.conversation import Conversation, Turn
from finetune.errors import UserError, refuse
from finetune.markdown import PartsStyle

_BOLD = re.compile(r"\*\*(.+?):?\*\*:?\s*")
_PARTS = ("conclusion", "correction")
_HEADING = re.compile(r"^( {0,3})(#{2,3})(?!#)")
_FENCE = re.compile(r"^ {0,3}(?:`{3,}|~{3,})")
_NO_LOSS = re.compile(r"<!--(\s*no[\s_-]*loss\s*)-->", re.IGNORECASE)


def write(path: Path, turns: Sequence[Turn], parts: PartsStyle = "bold") -> tuple[Path, Conversation]:
    """Write turns that end with an answer; returns where, and the example as it will be read.

    `####` stands for a heading inside a text and other words for what would be markup; the caller may compare. Errors:
    UserError, and nothing is written.
    """
    path = path if path.suffix.lower() == ".md" else path.with_name(f"{path.name}.md")
    if os.path.lexists(path):
        raise refuse("is there already.", "Choose another name; nothing is overwritten.", path)
    if any(not turn.text.strip() for turn in turns):
        raise refuse("a turn of this talk is empty.", "An example needs words: /retry, or take it back with /undo.")
    with tempfile.TemporaryDirectory() as aside:
        draft = Path(aside) / path.name
        draft.write_text(text(turns, parts), encoding="utf-8")
        try:
            read = corpus.read(draft, parts)[0]
        except UserError as fault:
            what = f"this talk cannot be written as an example: {fault.problems[0].what}"
            raise refuse(what, "Write it by hand.") from None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(path, draft.read_bytes())
        except OSError as fault:
            raise refuse(f"cannot be written ({fault.strerror}).", "Choose another place.", path) from None
    return path, read


def text(turns: Sequence[Turn], parts: PartsStyle = "bold") -> str:
    """The file's text; its id is the file's own name."""
    return "\n".join(line for turn in turns for line in (f"## {turn.role}", *_body(turn, parts))) + "\n"


def _body(turn: Turn, parts: PartsStyle) -> Iterator[str]:
    text = turn.text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").strip("\n")
    lines = list(_plain(text.split("\n")))
    bold = parts == "bold" and turn.role == "assistant"
    titles = [_title(line) if bold and not is_code else None for line, is_code in lines]
    for number, ((line, _), title) in enumerate(zip(lines, titles, strict=True)):
        follows = next((other for other in range(number + 1, len(lines)) if lines[other][0].strip()), None)
        if title is not None and follows is not None and titles[follows] is None:
            yield f"### {title.lower()}" if title.lower() in _PARTS else f"### perspective: {_lower(title)}"
        else:
            yield line


def _title(line: str) -> str | None:
    """Of a line that is nothing but a bold heading, as the parts of an answer are trained."""
    found = _BOLD.fullmatch(line.strip())
    return found[1].strip() if found and "*" not in found[1] and found[1].strip() else None


def _lower(title: str) -> str:
    """`The traveller` as authors write it; it is shown with a capital again. `IT people` keeps its own."""
    return title[:1].lower() + title[1:] if title[1:2].islower() or title[1:2] == " " else title


def _plain(lines: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(line, whether it is code) without markup of ours: headings one level lower, fences closed, no no-loss mark."""
    fence = ""
    for line in lines:
        mark, is_code = _FENCE.match(line), bool(fence)
        if mark and not fence:
            fence, is_code = mark.group().strip(), True
        elif mark and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        yield line if is_code else _HEADING.sub(r"\1####", _NO_LOSS.sub(r"(\1)", line)), is_code
    if fence:
        yield fence, True
