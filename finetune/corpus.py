"""Markdown and JSONL to conversations, every fault at once; and the split, drawn before training and recorded.

Refuses what is broken and drops nothing. Does not judge style (see lint), count tokens, or reach the network.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune import draw, markdown, rows
from finetune.conversation import Conversation, Origin, Part, Turn
from finetune.errors import Problem, UserError, refuse

_MIB = 2**20
_LIMITS = {".md": 10 * _MIB, ".jsonl": 256 * _MIB, ".json": 256 * _MIB}
_FRONT_KEYS = ("id", "tags", "twin")
_FRONT_LIMIT = 2**16
_MOST_PER_FILE = 100
_ALMOST = {".markdown": ".md", ".mdown": ".md", ".ndjson": ".jsonl", ".json": ".jsonl"}


def read(path: Path | str, parts: Literal["bold", "plain"] = "bold") -> list[Conversation]:
    """Every example of a folder (its .md and .jsonl, by name), or of one file. Raises UserError with all faults."""
    faults: list[Problem] = []
    found: list[Conversation] = []
    for file in _files(Path(path), faults):
        mine: list[Problem] = []
        found += _read_file(file, parts, mine)
        faults += _at_most(mine, str(file))
    return _sound(found, faults, str(path))


def rows_to_conversations(numbered: Iterable[tuple[int, object]], file: str) -> list[Conversation]:
    """Parsed rows, each with its line from 1, of a dataset that is no file. Raises UserError with all faults."""
    faults: list[Problem] = []
    found = _from_rows((rows.Text(line, row) for line, row in numbered), file, faults)
    return _sound(found, _at_most(faults, file), file)


def _sound(found: list[Conversation], faults: list[Problem], where: str) -> list[Conversation]:
    """The conversations, if nothing is wrong with them one by one or together."""
    faults += _repeats(found)
    if not found and not faults:
        faults.append(Problem("no examples here.", "Put .md or .jsonl files there, one conversation each.", where))
    if faults:
        raise UserError(faults)
    return found


def _at_most(faults: list[Problem], file: str) -> list[Problem]:
    if len(faults) <= _MOST_PER_FILE:
        return faults
    more = Problem(f"{len(faults) - _MOST_PER_FILE} more faults in this file.", "Fix these first.", file)
    return [*faults[:_MOST_PER_FILE], more]


# files


def _files(path: Path, faults: list[Problem]) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in _LIMITS:
            faults.append(Problem("not a dataset file.", "Give a folder, or one .md, .jsonl or .json file.", str(path)))
            return []
        return [path]
    try:
        names = sorted(path.iterdir(), key=lambda file: file.name)
    except OSError as error:
        faults.append(_unreadable(path, error))
        return []
    here = [file for file in names if not file.name.startswith(".") and file.is_file()]
    for file in here:
        if right := _ALMOST.get(file.suffix.lower()):
            faults.append(Problem("is not read from a folder.", f"Rename it to {right}, or move it away.", str(file)))
    return [f for f in here if f.suffix.lower() in (".md", ".jsonl") and f.name.lower() != "readme.md"]


def _unreadable(path: Path, error: OSError) -> Problem:
    if isinstance(error, FileNotFoundError):
        try:
            beside = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
        except OSError:
            beside = []
        remedy = (
            f"Did you mean {path.parent / beside[0]}?" if beside else "A path in a recipe is relative to the recipe."
        )
        return Problem("does not exist.", remedy, str(path))
    return Problem(f"cannot be read ({error.strerror or error}).", "Check its permissions.", str(path))


def _read_file(file: Path, parts: markdown.PartsStyle, faults: list[Problem]) -> list[Conversation]:
    text = _text(file, faults)
    if text is None:
        return []
    if file.suffix.lower() == ".md":
        return _from_markdown(text, file, parts, faults)
    is_array = file.suffix.lower() == ".json"
    if not is_array and text.lstrip().startswith("[") and not text.splitlines()[0].rstrip().endswith("]"):
        faults.append(Problem("one JSON array, not one row a line.", "Name it .json.", str(file), 1))
        return []
    return _from_rows(rows.array(text) if is_array else rows.lines(text), str(file), faults)


def _text(file: Path, faults: list[Problem]) -> str | None:
    """The text of a file with newlines as `\\n`; None and a fault where it is no text."""
    limit = _LIMITS[file.suffix.lower()]
    try:
        size = file.stat().st_size
        raw = file.read_bytes() if size <= limit else b""
    except OSError as error:
        faults.append(_unreadable(file, error))
        return None
    if size > limit:
        remedy = "One conversation a file." if file.suffix.lower() == ".md" else "Split it into several files."
        faults.append(Problem(f"{size / _MIB:.0f} MiB, more than {limit // _MIB}.", remedy, str(file)))
        return None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        faults.append(Problem("not UTF-8 text.", "Save it as UTF-8 in your editor.", str(file), line))
        return None
    return _plain(text.replace("\r\n", "\n").replace("\r", "\n"), file, faults)


def _plain(text: str, file: Path, faults: list[Problem]) -> str | None:
    if (nul := text.find("\0")) >= 0:
        line = text.count("\n", 0, nul) + 1
        faults.append(Problem("a NUL character: this is no text file.", "Save it as UTF-8 text.", str(file), line))
    elif not text.strip():
        faults.append(Problem("the file is empty.", "Write an example in it, or remove it.", str(file)))
    else:
        return text
    return None


# rows and sheets to conversations


def _from_rows(texts: Iterable[rows.Text], file: str, faults: list[Problem]) -> list[Conversation]:
    found = []
    for number, text in enumerate(texts, 1):
        try:
            if text.wrong:
                raise rows.Wrong((f"not JSON: {text.wrong}.", "Write one JSON object a row."))
            row = rows.read(text.value)
        except rows.Wrong as error:
            faults += [Problem(what, remedy, file, text.line) for what, remedy in error.faults]
            continue
        turns = tuple(
            Turn(said.role, said.text, text.line, said.loss, (Part("text", said.text, line=text.line),))
            for said in row.said
        )
        name = row.id or f"{Path(file).stem}-{number}"
        found.append(Conversation(name, turns, Origin(file, text.line), row.tags, row.twin, row.extra))
        faults += _turn_faults(found[-1])
    return found


def _from_markdown(text: str, file: Path, parts: markdown.PartsStyle, faults: list[Problem]) -> list[Conversation]:
    sheet = markdown.read(text)
    mine = [Problem(fault.what, fault.remedy, str(file), fault.line) for fault in sheet.faults]
    front = _front(sheet, str(file), mine)
    turns = tuple(
        Turn(
            section.role,
            markdown.show(section.pieces, parts),
            section.line,
            section.loss,
            tuple(Part(piece.kind, piece.text, piece.title, piece.line) for piece in section.pieces),
        )
        for section in sheet.sections
    )
    line = turns[0].line if turns else 1
    tags, name, twin = front.get("tags", ()), front.get("id", ()), front.get("twin", ())
    found = Conversation("".join(name) or file.stem, turns, Origin(str(file), line), tags, "".join(twin) or None)
    faults += sorted([*mine, *_turn_faults(found)], key=lambda problem: problem.line or 0)
    return [found]


def _front(sheet: markdown.Sheet, file: str, faults: list[Problem]) -> dict[str, tuple[str, ...]]:
    """The front matter, each value as its words; YAML's own types are not applied: `id: 007` and `id: no` are text."""

    def fault(what: str, remedy: str, mark: Any = None) -> None:
        faults.append(Problem(what, remedy, file, sheet.front_line + (mark.line if mark else 0)))

    found: dict[str, tuple[str, ...]] = {}
    if len(sheet.front or "") > _FRONT_LIMIT:
        fault("the front matter is longer than 64 KiB.", "Keep id, tags and twin; move text below.")
        return found
    try:
        root = yaml.compose(sheet.front or "", Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        marked = error if isinstance(error, yaml.MarkedYAMLError) else None
        why = (marked and marked.problem) or "cannot be read"
        fault(
            f"the front matter is not YAML: {why}.",
            'Put quotes around a value: twin: "..."',
            marked and marked.problem_mark,
        )
        return found
    if root is not None and not isinstance(root, yaml.MappingNode):
        fault("the front matter holds no keys.", "Write `id: name`.", root.start_mark)
        return found
    for key, value in root.value if root is not None else ():
        _front_key(key, value, found, fault)
    return found


def _front_key(key: yaml.Node, value: yaml.Node, found: dict[str, tuple[str, ...]], fault: Any) -> None:
    name = key.value if isinstance(key, yaml.ScalarNode) else ""
    if name not in _FRONT_KEYS:
        near = difflib.get_close_matches(name[:40].lower(), _FRONT_KEYS, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else "Known keys: id, tags, twin."
        fault(f"`{name[:40]}` is not a key of the front matter.", remedy, key.start_mark)
    elif name in found:
        fault(f"`{name}` stands twice.", "Keep one of them.", key.start_mark)
    elif (words := _words(value)) is None or (name != "tags" and isinstance(value, yaml.SequenceNode)):
        fault(f"`{name}` is not {'a list of words' if name == 'tags' else 'text'}.", "Write text.", value.start_mark)
    else:
        found[name] = words


def _words(node: yaml.Node) -> tuple[str, ...] | None:
    """A scalar or a flat list as words; None for anything else. Null is nothing."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    scalars = [item for item in nodes if isinstance(item, yaml.ScalarNode)]
    if len(scalars) < len(nodes):
        return None
    words = (" ".join(item.value.split()) for item in scalars if item.style or item.value not in ("null", "~"))
    return tuple(word for word in words if word)


# what must hold for every conversation, and for all of them together


def _turn_faults(one: Conversation) -> Iterator[Problem]:
    at, expected = one.origin, "user"
    for text in (one.id, one.twin or "", *one.tags, *(turn.text for turn in one.turns)):
        if re.search("[\0\ud800-\udfff]", text):
            yield Problem("a NUL or half a surrogate pair in the text.", "Remove it.", at.file, at.line)
    if not one.id.isprintable() or len(one.id) > 200:
        yield Problem("an id with control characters or over 200 long.", "Choose a short one.", at.file, at.line)
    for i, turn in enumerate(one.turns):
        if turn.role == "system" and i == 0:
            continue
        if turn.role != expected:
            what = f"{turn.role} speaks where {expected} should."
            yield Problem(what, "Write [system], user, assistant, user, assistant ...", at.file, turn.line)
        expected = "user" if turn.role == "assistant" else "assistant"
    for turn in one.turns:
        if not turn.text.strip():
            yield Problem(f"an empty {turn.role} turn.", "Write its text, or remove it.", at.file, turn.line)
    if not one.turns or one.turns[-1].role != "assistant":
        line = one.turns[-1].line if one.turns else at.line
        yield Problem("no assistant answer at the end.", "End the conversation with the answer.", at.file, line)
    elif not any(turn.loss for turn in one.turns if turn.role == "assistant"):
        yield Problem("every answer is kept out of the loss.", "Train one of them, or remove it.", at.file, at.line)


def _repeats(found: list[Conversation]) -> list[Problem]:
    """The same id twice, or the same questions and answer twice."""
    faults = []
    ids: dict[str, Origin] = {}
    texts: dict[tuple[str, ...], Origin] = {}
    for one in found:
        first = ids.setdefault(one.id, one.origin)
        if first is not one.origin:
            what = f"the id `{one.id}` is taken by {first}."
            faults.append(Problem(what, "Give it another id.", one.origin.file, one.origin.line))
        said = (*(turn.text for turn in one.turns if turn.role == "user"), one.turns[-1].text if one.turns else "")
        first = texts.setdefault(said, one.origin)
        if first is not one.origin and any(said):
            faults.append(Problem(f"the same example as {first}.", "Remove it.", one.origin.file, one.origin.line))
    return faults


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """sha256 of ids, turns, losses and twins, in id order; where an example was written does not count."""
    content = [
        [one.id, one.twin, [[turn.role, turn.text, turn.loss] for turn in one.turns]]
        for one in sorted(conversations, key=lambda one: one.id)
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# the split


@dataclasses.dataclass(frozen=True)
class Split:
    """Which examples are trained and which are only measured; ids in order. `twins` are of both sides."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]
    twins: dict[str, str]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """As split.json holds it."""
        return {"train": list(self.train), "held_out": list(self.held_out), "twins": self.twins, "seed": self.seed}

    @classmethod
    def from_json(cls, value: Any) -> Split:
        """Read back. Raises UserError where it is no split."""
        try:
            train, held_out, twins, seed = value["train"], value["held_out"], value["twins"], value["seed"]
            if not all(isinstance(name, str) for name in (*train, *held_out, *twins, *twins.values())):
                raise TypeError
            return cls(tuple(train), tuple(held_out), dict(twins), int(seed))
        except (TypeError, KeyError, ValueError, AttributeError):
            raise refuse("is not a recorded split.", "Start a new run with --fresh.", "split.json") from None


def split(conversations: Sequence[Conversation], held_out: Literal["auto"] | float, seed: int) -> Split:
    """Draw by hash, not by order: a file more or another order moves no other example further than it must.

    Examples that ask the same question fall on one side. Raises UserError where nothing can be held out.
    """
    n = len(conversations)
    if n < 3:
        raise refuse(f"{n} examples are too few to hold any out.", "Write at least 3, or give data.held_out a path.")
    goal = _goal(n, held_out)
    groups = _same_question(conversations)
    taken = draw.draw(groups, goal, seed)
    if not taken:
        smallest = min(len(group) for group in groups)
        what = f"{smallest} examples or more ask the same question; {goal} may be held out."
        raise refuse(what, "Write examples with other questions, or raise data.held_out.")
    ids = sorted(one.id for one in conversations)
    held = tuple(name for name in ids if name in taken)
    return Split(tuple(name for name in ids if name not in taken), held, _twins(conversations), seed)


def split_given(train: Sequence[Conversation], held_out: Sequence[Conversation], seed: int) -> Split:
    """The split where the user gave both sides. Raises UserError for every example that stands on both."""
    faults = _repeats([*train, *held_out])
    sides = {one.id: one for one in held_out}
    for group in _same_question([*train, *held_out]) if not faults else ():
        kept, held = [name for name in group if name not in sides], [name for name in group if name in sides]
        for name in held if kept else ():
            at, what = sides[name].origin, f"asks the question of the trained example `{kept[0]}`."
            faults.append(Problem(what, "Remove one of the two.", at.file, at.line))
    if faults:
        raise UserError(faults)
    both = [tuple(sorted(one.id for one in side)) for side in (train, held_out)]
    return Split(both[0], both[1], _twins([*train, *held_out]), seed)


def _goal(n: int, held_out: Literal["auto"] | float) -> int:
    if held_out == "auto":
        return min(max(10, math.ceil(Fraction(n, 5))), n // 3)
    if not 0 < float(held_out) < 1:
        raise refuse(f"data.held_out is {held_out}.", "Write auto, a share between 0 and 1, or a path.")
    return min(math.ceil(Fraction(str(held_out)) * n), n - 1)  # as decimals: 0.1 of 30 is 3, in floats it is 4


def _twins(conversations: Iterable[Conversation]) -> dict[str, str]:
    return {one.id: one.twin for one in sorted(conversations, key=lambda one: one.id) if one.twin}


def _same_question(conversations: Iterable[Conversation]) -> list[list[str]]:
    return draw.alike({one.id: _questions(one) for one in conversations})


def _questions(one: Conversation) -> set[str]:
    """The last question, its twin, and earlier ones from four words on: «Go on» would tie too many together."""
    *earlier, last = (draw.normal(turn.text) for turn in one.turns if turn.role == "user")
    return {last, *(text for text in earlier if text.count(" ") >= 3), *([draw.normal(one.twin)] if one.twin else [])}
