"""An example's answers token by token, as the adapter and its base read them, in few enough bytes for a page.

It finds the examples and the vocabulary of a run again, and says why where it cannot. It asks no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune import allowed, bases, byheart, corpus, formula, heard, passage, plan, prompts, recipe
from finetune.conversation import Conversation
from finetune.errors import UserError
from finetune.evidence import Row
from finetune.format import Rendered
from finetune.gathered import Run
from finetune.heard import Reading
from finetune.masks import Tokens, Vocabulary, encode
from finetune.passage import Passage
from finetune.runlength import Bools
from finetune.runs import RunFolder

_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"  # as page.js reads them
_FINEST = 2  # levels a bit of surprise is told in
_MOST = 31


@dataclass(frozen=True, eq=False)
class Texts:
    """What a run was trained on, read again. `root`: from where files are told; no path of the machine in a page."""

    root: Path
    conversations: Mapping[str, Conversation]
    vocabulary: Vocabulary
    formulas: Mapping[str, tuple[Bools, ...]]
    _formats: dict[str, Any] = field(default_factory=dict)
    _known: dict[tuple[str, str], tuple[Passage, list[str]]] = field(default_factory=dict)

    def place(self, one: Conversation) -> str:
        """file:line of an example."""
        file = Path(one.origin.file)
        near = file.relative_to(self.root) if file.is_relative_to(self.root) else Path(file.name)
        return f"{near}:{one.origin.line}"

    def passage(self, split: Any, example: str, format_: str) -> tuple[Passage, list[str]]:
        """An example in a format, and the text of each token that is read. UserError for a format that is none."""
        if (example, format_) in self._known:
            return self._known[example, format_]
        if format_ not in self._formats:
            self._formats[format_] = prompts.load([format_])[0]
        rendered = prompts.render(self.conversations[example], self._formats[format_], self.vocabulary)
        tokens = encode(rendered, self.vocabulary)
        found = passage.passage(example, split, rendered, tokens, self.formulas.get(example))
        self._known[example, format_] = found, list(_spelled(rendered, tokens, found.read, self.vocabulary))
        return self._known[example, format_]


def _spelled(rendered: Rendered, tokens: Tokens, read: Sequence[bool], vocabulary: Vocabulary) -> Iterator[str]:
    """Characters of each token that is read; where several share one, the first has it. End marks by name."""
    special, end = {mark.id for mark in vocabulary.marks.values()}, 0
    for id, wanted, (start, stop) in zip(tokens.ids, read, tokens.places, strict=True):
        if wanted:
            named = id in special or start == stop
            yield (vocabulary.tokenizer.id_to_token(id) or "") if named else rendered.text[max(start, end) : stop]
        end = max(end, stop)


def find(run: Run) -> Texts | str:
    """The texts of a run, or in words why they cannot be shown."""
    try:
        wanted = recipe.load_resolved(RunFolder(run.folder).recipe)
        examples, _ = plan.examples(wanted)
        known = bases.look_up(wanted.base, run.facts.get("commit") or wanted.revision)
        spans = [] if wanted.data.intended is None else [one.text for one in allowed.read(wanted.data.intended)]
    except UserError as error:
        return f"The texts cannot be read: {error.problems[0]}"
    if not known.counted:
        return f"The tokenizer of {wanted.base} is not on this machine."
    was = (run.facts.get("fingerprints") or {}).get("dataset")
    if was is not None and was != corpus.fingerprint(examples):
        return "The dataset changed since this run began, so what was measured belongs to other texts."
    limits = byheart.limits()
    answers = {one.id: [turn.text for turn in one.turns if turn.role == "assistant" and turn.loss] for one in examples}
    formulas = formula.masks(answers, limits.shortest_formula, limits.longest_formula, spans)
    return Texts(Path(wanted.data.train).parent, {one.id: one for one in examples}, known.vocabulary, formulas)


@dataclass(frozen=True, eq=False)
class Reader:
    """Packs examples. `first`: by example, the row in which it was first heard to recite."""

    run: Run
    texts: Texts
    first: Mapping[str, Row]

    @cached_property
    def _base(self) -> Mapping[Any, Reading]:
        return _load(RunFolder(self.run.folder).tokens_at(0))

    @cached_property
    def _looks(self) -> list[tuple[float, Mapping[Any, Reading]]]:
        """(epoch, readings) of the chosen look and of the last one; the full look before it where it kept none."""
        folder = RunFolder(self.run.folder)
        there = [one for one in self.run.looks if one.step > 0 and folder.tokens_at(one.step).is_file()]
        chosen = [one for one in there if self.run.chosen is None or one.step <= self.run.chosen]
        wanted = dict.fromkeys([*chosen[-1:], *there[-1:]])
        return [(one.epoch, _load(folder.tokens_at(one.step))) for one in wanted]

    def packed(self, split: str, example: str) -> dict[str, Any] | None:
        """One example for page.js; None where its text is not known."""
        one, key = self.texts.conversations.get(example), (split, example, self.run.first_format)
        if one is None:
            return None
        about = {"split": split, "place": self.texts.place(one), "asked": one.question, "looks": []}
        known = [(epoch, some[key]) for epoch, some in self._looks if key in some]
        if not known:
            return {**about, "text": one.answer}
        found, pieces = self.texts.passage(*key)
        known = [(epoch, some) for epoch, some in known if len(some.hits) == len(pieces)]
        base = self._base.get(key)
        return {
            **about,
            "text": "".join(pieces),
            "sizes": "".join(map(_size, pieces)),
            "starts": np.flatnonzero(np.diff(found.parts, prepend=-1)).tolist(),
            "style": _stretches(~found.counted),
            "base": None if base is None or len(base.hits) != len(pieces) else _levels(base),
            "looks": [[epoch, _levels(some)] for epoch, some in known],
            "first": self._first(found, example),
        }

    def _first(self, found: Passage, example: str) -> list[float] | None:
        """[first token, last + 1, epoch] of what was recited first, if it was heard in the format shown."""
        row = self.first.get(example)
        if row is None or row.get("run_start") is None or not row.get("run_max") or row["format"] != found.format:
            return None
        counted = np.flatnonzero(found.counted)
        begin = int(np.searchsorted(counted, row["run_start"]))
        last = counted[min(begin + int(row["run_max"]), len(counted)) - 1]
        return [int(row["run_start"]), int(last) + 1, float(row["epoch"])]


def _load(path: Path) -> Mapping[Any, Reading]:
    return heard.load(path) if path.is_file() else {}


def _levels(reading: Reading) -> str:
    """A sign a token: whether it was the first choice, and its surprise in half bits, at most 15.5."""
    surprise = np.clip(np.rint(-reading.log_p / np.log(2) * _FINEST), 0, _MOST).astype(int)
    return "".join(_DIGITS[level + (_MOST + 1) * bool(hit)] for level, hit in zip(surprise, reading.hits, strict=True))


def _size(piece: str) -> str:
    """Characters of a piece; the last digit stands for «so many and more to come»."""
    whole, rest = divmod(len(piece), len(_DIGITS) - 1)
    return _DIGITS[-1] * whole + _DIGITS[rest]


def _stretches(mask: Bools) -> list[int]:
    """First and last + 1 of every stretch, flat."""
    edges: list[int] = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)).tolist()
    return edges
