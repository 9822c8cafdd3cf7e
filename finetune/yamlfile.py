"""Read one small YAML file: the scalars of YAML 1.2, a line for every key, no surprises.

It knows no setting. What PyYAML would accept and a reader would not expect is refused with a line and a remedy, never a
traceback: anchors, tags, several documents, deep nesting, any encoding but UTF-8. Keys written twice are collected, not
raised, so that they can be told together with whatever else is wrong. `--set key=value` is laid over what was read.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import Problem, UserError, refuse

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
Key = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}
# no tokenizer, file system or terminal takes these; PyYAML lets them in through "\0" and "\ud800"
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Origin:
    """Where a value was written. `line` from 1, None for `--set`; `folder` is what its paths are relative to."""

    file: Path | str
    line: int | None
    folder: str


class Document:
    """What was written, before anyone judges it.

    `data`: dict, tuple, str, int, float, bool or None; `origins`: key path to origin; `problems`: what did not stop the
    reading and must still be told.
    """

    def __init__(self, file: Path | str, data: Any, origins: dict[Key, Origin], problems: list[Problem]) -> None:
        self.file, self.data, self.origins, self.problems = file, data, origins, problems

    @property
    def lines(self) -> dict[Key, int]:
        """The line of every key path that stands in the file, from 1."""
        return {key: origin.line for key, origin in self.origins.items() if origin.line is not None}

    def origin(self, key: Key) -> Origin:
        """Of the key, or of the nearest section around it; the file as a whole has no line."""
        tries = (self.origins[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.origins)
        return next(tries, Origin(self.file, None, "."))

    def refuse(self, key: Key, what: str, remedy: str) -> None:
        """Note a problem at the line of a key."""
        origin = self.origin(key)
        self.problems.append(Problem(what, remedy, origin.file, origin.line, tuple(key)))

    def set(self, text: str) -> None:
        """Enter one `section.key=value`, its value read as YAML; what is wrong with it is noted, not raised."""
        name, equals, value = text.partition("=")
        key, shown = tuple(name.strip().split(".")), f"--set {text if len(text) < 80 else text[:77] + '...'}"
        if not equals or not all(key) or len(key) > MAX_DEPTH:
            self.problems.append(Problem("this sets nothing.", "Write it like --set lora.rank=8.", shown))
            return
        try:
            read = parse(value, shown)
        except UserError as error:
            self.problems += [replace(problem, line=None) for problem in error.problems]
            return
        self.problems += [replace(problem, line=None) for problem in read.problems]
        self.put(key, read.data, Origin(shown, None, os.getcwd()))

    def put(self, key: tuple[str, ...], value: Any, origin: Origin) -> None:
        """Enter a value; a mapping is merged key by key, so that `lora={rank: 8}` leaves the other settings of lora."""
        mapping = isinstance(value, dict) and value
        if not mapping or not isinstance(at(self.data, key), dict):
            place = self.data
            for part in key[:-1]:
                place[part] = place[part] if isinstance(place.get(part), dict) else {}
                place = place[part]
            place[key[-1]] = {} if mapping else value
            self.origins = {old: one for old, one in self.origins.items() if old[: len(key)] != key} | {key: origin}
        for name, inner in value.items() if mapping else ():
            self.put((*key, name), inner, origin)


def at(data: Any, path: Sequence[str | int]) -> Any:
    """The value at a key path; None where there is none."""
    for part in path:
        if isinstance(data, tuple):
            data = data[part] if isinstance(part, int) and part < len(data) else None
        else:
            data = data.get(part) if isinstance(data, dict) else None
    return data


def read(path: Path, sets: Sequence[str] = ()) -> Document:
    """The settings in one file, after `--set`; UserError where it cannot be read, is no YAML, or holds no mapping."""
    document = parse(_text(path), path)
    if document.data is None:
        raise refuse("the file is empty.", "Write at least the settings that have no default.", path)
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, tuple) else "a single value"
        raise refuse(f"the file holds {kind}, not settings.", "Write one `key: value` a line.", path, 1)
    for text in sets:
        document.set(text)
    return document


def parse(text: str, file: Path | str, first_line: int = 1) -> Document:
    """One YAML document from text; `first_line` is where the text begins in `file`. UserError where it is no YAML."""
    return _Reading(file, first_line).document(text)


def scalar(text: str) -> str | int | float | bool | None:
    """What an unquoted word means in YAML 1.2's core schema: `1e-7` is a number, `no` is a word."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) > 100:  # Python refuses to read very long integers; as text they fail where a number is wanted
        return text
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def dump(data: Any) -> str:
    """YAML that `parse` reads back to the same data: strings that look like anything else are quoted."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 misreads; ours must also quote 1.2's numbers, and odd line ends."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if scalar(text) == text and text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise refuse("there is no such file.", "Check the name and the folder.", path) from None
    except IsADirectoryError:
        raise refuse("this is a folder.", "Name a .yaml file inside it.", path) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise refuse(f"the file cannot be read: {error}.", "Check the name and its permissions.", str(path)) from None
    if len(raw) > MAX_BYTES:
        raise refuse("the file is larger than 1 MiB.", "A recipe is a page; is this the right file?", path)
    return _decoded(raw, path)


def _decoded(raw: bytes, path: Path) -> str:
    remedy = "Save the file as UTF-8 without a byte order mark."
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("the file is UTF-16 or UTF-32.", remedy, path, 1)
    if raw.startswith(b"\xef\xbb\xbf"):
        raise refuse("the file begins with a byte order mark.", remedy, path, 1)
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise refuse("the file holds a zero byte.", "Is it a text file? " + remedy, path, line)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise refuse(f"byte 0x{raw[error.start]:02x} is not UTF-8.", remedy, path, line) from None


class _Reading:
    """One pass over PyYAML's events. Events, not nodes: depth and anchors are seen before anything is built."""

    def __init__(self, file: Path | str, first_line: int) -> None:
        self.file, self.first = file, first_line
        self.lines: dict[Key, int] = {}
        self.problems: list[Problem] = []
        self.loader: Any = None
        self.events: Iterator[yaml.Event] = iter(())

    def document(self, text: str) -> Document:
        if found := _UNPRINTABLE.search(text):
            line = self.first + text[: found.start()].count("\n")
            what = f"the character U+{ord(found.group()):04X} cannot stand in YAML."
            raise refuse(what, "Delete it; editors often hide it.", self.file, line)
        try:
            data, folder = self.only(text), os.path.dirname(os.path.abspath(self.file))
            origins = {key: Origin(self.file, line, folder) for key, line in self.lines.items()}
            return Document(self.file, data, origins, self.problems)
        except yaml.MarkedYAMLError as error:
            raise self.syntax(error) from None
        except (
            yaml.YAMLError,
            ValueError,
            OverflowError,
        ) as error:  # "\Uffffffff" and the like escape PyYAML's own net
            line = self.loader.line + self.first
            raise refuse(f"this is not YAML: {error}.", "Check quotes and escapes.", self.file, line) from None

    def only(self, text: str) -> Any:
        """The content of the one document; None where there is none."""
        self.loader = yaml.SafeLoader(text)  # the pure Python one: it knows its line even when it falls over
        self.events = iter(self.loader.get_event, None)
        data, seen = None, 0
        for event in self.events:
            seen += isinstance(event, yaml.DocumentStartEvent)
            if seen > 1:
                raise self.refuse(event, "a second document begins here.", "Keep one document a file: remove `---`.")
            if isinstance(event, yaml.NodeEvent):
                data = self.value(event, ())
        return data

    def value(self, event: yaml.Event, path: Key) -> Any:
        self.screen(event, path)
        self.lines.setdefault(path, self.line(event))
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return tuple(self.items(path))
        return self.mapping(path)

    def screen(self, event: yaml.Event, path: Key) -> None:
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self.refuse(event, "anchors and aliases (`&name`, `*name`) are not read.", "Write the value out.")
        if getattr(event, "tag", None):
            raise self.refuse(event, "tags (`!...`) are not read.", "Write the plain value; quotes make it text.")
        if len(path) > MAX_DEPTH:
            raise self.refuse(event, f"nested more than {MAX_DEPTH} deep.", "No setting is; check the brackets.")

    def scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        if _UNUSABLE.search(event.value):
            raise self.refuse(event, "this text holds a character no program can use.", "Remove the escape.")
        return scalar(event.value) if event.style is None else event.value

    def items(self, path: Key) -> Iterator[Any]:
        for number, event in enumerate(self.events):
            if isinstance(event, yaml.SequenceEndEvent):
                return
            yield self.value(event, (*path, number))

    def mapping(self, path: Key) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for event in self.events:
            if isinstance(event, yaml.MappingEndEvent):
                break
            name = self.key(event, path)
            known, line = name in data, self.line(event)
            first = self.lines.setdefault((*path, name), line)
            value = self.value(next(self.events), (*path, name))
            data.setdefault(name, value)
            if known:
                what = f"{'.'.join(map(str, (*path, name)))} is written twice, first on line {first}."
                self.problems.append(Problem(what, "Keep one of the two.", self.file, line))
        return data

    def key(self, event: yaml.Event, path: Key) -> str:
        """The key as written: `1` and `null` are names here, and simply no settings."""
        self.screen(event, path)
        if not isinstance(event, yaml.ScalarEvent):
            raise self.refuse(event, "a list or a mapping cannot be a key.", "Write a plain name before the colon.")
        self.scalar(event)
        return event.value

    def line(self, event: yaml.Event) -> int:
        return (event.start_mark.line if event.start_mark else 0) + self.first

    def refuse(self, event: yaml.Event, what: str, remedy: str) -> UserError:
        return refuse(what, remedy, self.file, self.line(event))

    def syntax(self, error: yaml.MarkedYAMLError) -> UserError:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + self.first
        said = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in said:
            return refuse("a tab where YAML wants spaces.", "Indent with spaces.", self.file, line)
        remedy = "Check indentation and brackets; put text that holds `: ` or ` #` in quotes."
        return refuse(f"this is not YAML: {said}.", remedy, self.file, line)
