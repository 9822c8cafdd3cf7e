"""What of a run goes to the Hub: adapter, card, recipe, verdict, and texts only where asked. Made whole, or refused.

Nothing pickled, no training text unless asked for, no secret, no personal data, no path of this machine, no token. It
sends nothing (see hub) and writes nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any

from finetune import byheart, card, disk, places, private, recipe, runs, yamlfile
from finetune.card import Run
from finetune.conversation import Conversation
from finetune.errors import Problem, UserError, refuse
from finetune.fields import Means
from finetune.recipe import Recipe
from finetune.recital import Library
from finetune.runs import RunFolder
from finetune.tables import harmless

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TEXTS = ("samples.jsonl", "findings.jsonl", "examples.jsonl", "split.json")


@dataclass(frozen=True)
class Wish:
    """What was asked for. `repo`: owner/name."""

    repo: str
    public: bool = False
    with_texts: bool = False
    anyway: bool = False


def wish(folder: RunFolder, to: str | None, public: bool, with_texts: bool, anyway: bool) -> Wish:
    """What is asked for; where nothing is said, as the run's recipe has it. Errors: UserError."""
    if not folder.run_json.is_file():
        raise refuse("is no run.", "Name a folder that `sft train` wrote, such as runs/quickstart.", folder.path)
    told = recipe.load_resolved(folder.recipe).hub
    repo = to or told.repo
    if repo is None:
        raise refuse("sft push needs --to and a name.", "--to user/name, or hub.repo in the recipe.")
    if not re.fullmatch(places.HUB_ID, repo):
        raise refuse(f"--to {harmless(repo)[:80]} is no name on the Hub.", "Write user/name.")
    return Wish(repo, public or (repo == told.repo and not told.private), with_texts, anyway)


@dataclass(frozen=True)
class Item:
    """One file by its name in the repository: bytes, or where they lie."""

    name: str
    of: bytes | Path

    def bytes(self) -> bytes:
        """Its content."""
        return self.of if isinstance(self.of, bytes) else self.of.read_bytes()

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.of) if isinstance(self.of, bytes) else self.of.stat().st_size

    def hashes(self) -> tuple[str, str]:
        """(sha256, git's blob id), as the Hub names large and small files."""
        large, small = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with _opened(self.of) as file:
            while piece := file.read(2**20):
                large.update(piece)
                small.update(piece)
        return large.hexdigest(), small.hexdigest()


@dataclass(frozen=True)
class Parcel:
    """Everything that is sent, and what should be said of it. `card`: text of README.md without kept metadata."""

    run: Run
    wish: Wish
    items: tuple[Item, ...]
    examples: tuple[Conversation, ...]
    remarks: tuple[str, ...]

    def readme(self, kept: Mapping[str, Any]) -> Item:
        """The card, with metadata that somebody wrote by hand."""
        return Item("README.md", card.text(self.run, self.wish.repo, self.examples, kept).encode())


def make(folder: RunFolder, wish: Wish, report: str | None = None) -> Parcel:
    """All files, checked. `report`: the page, made without training text unless texts were asked for.

    Errors: UserError with every reason not to send it.
    """
    run = allowed(folder, wish)
    examples = card.dataset(run.recipe)
    remarks = [] if examples else ["The dataset is not on this disk: it was not searched for secrets."]
    page = [] if report is None else [Item("report.html", report.encode())]
    items = [*_always(run, wish.with_texts), *page, *(_texts(run) if wish.with_texts else ())]
    parcel = Parcel(run, wish, tuple(items), tuple(examples), tuple(remarks))
    if problems := list(_faults(parcel)):
        raise UserError(problems)
    return parcel


def allowed(folder: RunFolder, wish: Wish) -> Run:
    """The run, where it may be sent at all. Errors: UserError."""
    if not folder.adapter.is_dir() or not folder.verdict.is_file():
        raise refuse("has no adapter or no verdict yet.", "Let it go on, or `sft eval` it.", folder.path)
    run = card.read(folder, recipe.load_resolved(folder.recipe))
    if run.verdict.get("verdict") == "overfit" and not wish.anyway:
        what = f"its verdict is overfit: {run.verdict.get('reason')}"
        raise refuse(what, "Choose an earlier epoch's run, or say --anyway; the card will say so.", folder.path)
    return run


# --- files


def _always(run: Run, texts: bool) -> Iterator[Item]:
    yield Item(_CONFIG, _config(run))
    yield Item(_WEIGHTS, run.folder.adapter / _WEIGHTS)
    yield Item("recipe.yaml", _shortened(run.recipe).encode())
    yield Item("verdict.json", run.folder.verdict.read_bytes() if texts else _wordless(run))
    for name in (*run.recipe.formats.train, *run.recipe.formats.held_out):
        if Path(name).is_absolute() and Path(name).is_file():
            yield Item(f"formats/{Path(name).name}", Path(name).read_bytes())


def _wordless(run: Run) -> bytes:
    """The verdict: who recites how much, and not the words."""
    said = runs.read_json(run.folder.verdict)
    for one in (*said.get("recited", ()), *(said.get("run") or {}).get("recited", ())):
        one.pop("words", None)
    return (disk.to_json(said, 2) + "\n").encode()


def _config(run: Run) -> bytes:
    """PEFT's, naming the base as others find it."""
    config = runs.read_json(run.folder.adapter / _CONFIG)
    config["base_model_name_or_path"] = run.base_name
    if run.hub_base and run.facts.get("commit"):
        config["revision"] = run.facts["commit"]
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def _shortened(told: Recipe) -> str:
    """The resolved recipe; of every path of this machine the last name."""
    data = told.model_dump(mode="json")
    for name, field in recipe.SHAPE.leaves.items():
        if any(isinstance(one, Means) and one.place for one in field.metadata):
            *way, last = name.split(".")
            section = yamlfile.at(data, way)
            if isinstance(section, dict) and last in section:
                section[last] = _named(section[last])
    return "# As it was trained; paths are shortened to names.\n" + yamlfile.dump(data)


def _named(value: Any) -> Any:
    if isinstance(value, list):
        return [_named(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _texts(run: Run) -> Iterator[Item]:
    """The dataset, and what the looks wrote down."""
    for name in _TEXTS:
        if (path := run.folder.path / name).is_file():
            yield Item(name, path.read_bytes())
    for place in (run.recipe.data.train, run.recipe.data.held_out):
        if isinstance(place, str) and os.path.exists(place):
            yield from _dataset(Path(place))


def _dataset(path: Path) -> Iterator[Item]:
    files, folder = (sorted(path.iterdir()), f"dataset/{path.name}") if path.is_dir() else ([path], "dataset")
    for file in files:
        if file.is_file() and file.suffix.lower() in (".md", ".jsonl", ".json"):
            yield Item(f"{folder}/{file.name}", file.read_bytes())


# --- what may not be sent


def _faults(parcel: Parcel) -> Iterator[Problem]:
    ours = [parcel.readme({}), *(item for item in parcel.items if item.name != _WEIGHTS)]
    library = None if parcel.wish.with_texts else Library(parcel.examples)
    for item in ours:
        text = item.bytes().decode("utf-8", errors="replace")
        shown = _visible(text) if item.name.endswith(".html") else text
        yield from _private(item, shown, text)
        if not item.name.startswith(("dataset/", *_TEXTS)):
            yield from _of_this_machine(item, text, parcel.run)
        if library is not None:
            yield from _recited(item, shown, library)
    if not parcel.wish.with_texts:
        yield from _learned(parcel.examples)


def _private(item: Item, shown: str, raw: str) -> Iterator[Problem]:
    """Secrets anywhere, personal data in what a reader sees."""
    found = [(one, shown) for one in private.find(shown)]
    if raw is not shown:
        found += [(one, raw) for one in private.find(raw) if one.kind == "secret" and one.what[:8] != "a random"]
    for one, text in found:
        line = text.count("\n", 0, one.start) + 1 if text is raw else None
        remedy = "Take it out and train anew; it must not leave this machine."
        yield Problem(f"{one.what} ({one.shown}) would be sent.", remedy, item.name, line)


def _learned(examples: Sequence[Conversation]) -> Iterator[Problem]:
    """A model may say what it was trained on: secrets in the dataset leave with the adapter."""
    for one in examples:
        for turn in one.turns:
            for found in private.find(turn.text):
                if found.kind == "secret":
                    what = f"{one.id} holds {found.what} ({found.shown}), which the adapter may say."
                    yield Problem(what, "Take it out and train anew.", one.origin.file, turn.line)


def _of_this_machine(item: Item, text: str, run: Run) -> Iterator[Problem]:
    folders = {Path.home(), Path.cwd(), run.folder.path.resolve(), run.folder.path.resolve().parent}
    folders |= {Path(run.recipe.data.train)} if os.path.isabs(run.recipe.data.train) else set()
    named = [str(one) for one in folders if len(one.parts) > 2 or one == Path.home()]
    for path in named:
        if re.search(re.escape(path) + r"(?![\w.-])", text) and len(path) > 1:
            yield Problem(f"it names a folder of this machine ({path}).", "This is a fault of sft.", item.name)


def _recited(item: Item, shown: str, library: Library) -> Iterator[Problem]:
    spans = [one for one in library.recited(shown) if one.own >= byheart.limits().words]
    if longest := max(spans, key=lambda one: one.words, default=None):
        what = f"it holds {longest.words} words of {longest.example.id}, training text."
        yield Problem(what, "Say --with-texts if it may be sent.", item.name)


class _Words(HTMLParser):
    """What a reader of a page can see, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        self.found += [value for name, value in attrs if value and name in ("title", "alt", "aria-label", "data-text")]

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.found.append(data)


def _visible(page: str) -> str:
    reader = _Words()
    reader.feed(page)
    return "\n".join(reader.found)


def _opened(of: bytes | Path) -> IO[bytes]:
    return io.BytesIO(of) if isinstance(of, bytes) else of.open("rb")
