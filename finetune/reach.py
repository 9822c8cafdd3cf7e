"""The same given answers read in many formats, adapter and base: what `transfer` compares, and how far formats differ.

Teacher-forced passes only, nothing is generated. The base's figures never change, so a run folder keeps them.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune import chance, prompts, runs
from finetune.asking import Compares
from finetune.chance import Interval
from finetune.conversation import Conversation
from finetune.errors import UserError
from finetune.lineup import Gauge
from finetune.masks import Vocabulary, encode
from finetune.speak import Pass
from finetune.transfer import Cell, Sheet

NAME = "formats-base.json"  # in the run's folder `tokens`


@dataclass(frozen=True)
class Text:
    """One example in one format, as tokens. `words`: which are read, the words of answers in the loss.

    `end`: tokens `[start, stop)` of what ends the last answer. `places`: of the last answer's tokens, where in its
    words each stands, `{(first character, after the last, id): token}`. `size`: UTF-8 bytes of the words that are read.
    """

    example: str
    format: str
    ids: tuple[int, ...]
    words: tuple[bool, ...]
    end: tuple[int, int]
    places: Mapping[tuple[int, int, int], int]
    size: int

    @property
    def key(self) -> str:
        """The same for the same tokens, read in the same places."""
        told = repr((self.ids, [t for t, on in enumerate(self.words) if on], self.end))
        return hashlib.sha256(told.encode()).hexdigest()[:32]


def texts(examples: Iterable[Conversation], gauges: Iterable[Gauge], vocabulary: Vocabulary) -> list[Text]:
    """Every example in every format; where the base's own template cannot carry one, not that pair."""
    found = (_text(one, gauge, vocabulary) for gauge in gauges for one in examples)
    return [one for one in found if one is not None]


def _text(one: Conversation, gauge: Gauge, vocabulary: Vocabulary) -> Text | None:
    try:
        rendered = prompts.render(one, gauge.format, vocabulary)
    except UserError:
        return None
    tokens = encode(rendered, vocabulary)
    answers = [row.text for row in rendered.segments if row.role == "answer"]
    read, size = [False] * len(tokens.ids), 0
    for found, shown, words in zip(tokens.answers, rendered.answers, answers, strict=True):
        if found.trained and found.end > found.start:
            read[found.start : found.end] = [True] * (found.end - found.start)
            stop = tokens.places[found.end - 1][1]  # a mark's first token may hold the last full stop
            size += len(rendered.text[shown.end - len(words) : stop].encode())
    last, begins = tokens.answers[-1], rendered.answers[-1].end - len(answers[-1])
    spots = ((t, tokens.places[t]) for t in range(last.start, last.end))
    places = {(start - begins, stop - begins, tokens.ids[t]): t for t, (start, stop) in spots if start >= begins}
    return Text(one.id, gauge.name, tokens.ids, tuple(read), (last.end, last.stop), places, size)


# --- loss


def read(speaker: Compares, some: Sequence[Text], base: bool = False) -> dict[str, Cell]:
    """One pass over each text; cells by `Text.key`. Nothing is asked for nothing."""
    if not some:
        return {}
    masks = [_with_end(one) for one in some]
    scores = speaker.score([one.ids for one in some], masks, (), base)
    return {one.key: _cell(one, mask, score) for one, mask, score in zip(some, masks, scores, strict=True)}


def _with_end(one: Text) -> list[bool]:
    start, stop = one.end
    return [on or start <= t < stop for t, on in enumerate(one.words)]


def _cell(one: Text, mask: Sequence[bool], score: Any) -> Cell:
    """The scores of the words apart from those of the end; the first token of a text is never scored."""
    at = [t for t in range(1, len(mask)) if mask[t]]
    words = [k for k, t in enumerate(at) if one.words[t]]
    ends = [k for k, t in enumerate(at) if one.end[0] <= t < one.end[1]]
    log_p = score.log_p.double()
    end = -float(log_p[ends].sum()) if ends else None
    return Cell(-float(log_p[words].sum()), len(words), int(score.hits[words].sum()), one.size, end)


def sheet(some: Iterable[Text], cells: Mapping[str, Cell]) -> Sheet:
    """By format and example."""
    found: dict[str, dict[str, Cell]] = defaultdict(dict)
    for one in some:
        found[one.format][one.example] = cells[one.key]
    return dict(found)


# --- how far two formats lie apart


@dataclass(frozen=True)
class Apart:
    """KL(first trained format || this one) along the same answer, nats a token: (tuned, base) of each example."""

    format: str
    pairs: tuple[tuple[float, float], ...]

    @property
    def tuned(self) -> float:
        return fmean(pair[0] for pair in self.pairs)

    @property
    def base(self) -> float:
        return fmean(pair[1] for pair in self.pairs)

    @property
    def lost(self) -> Interval | None:
        """Tuned - base, over examples."""
        return chance.mean([tuned - base for tuned, base in self.pairs])


def apart(speaker: Compares, some: Sequence[Text], first: str, kept: dict[str, Cell]) -> list[Apart]:
    """Every format against the first, at the tokens that both cut alike. `kept`: of the base, read and added to."""
    by = {(one.format, one.example): one for one in some}
    names = dict.fromkeys(one.format for one in some if one.format != first)
    found = []
    for name in names:
        pairs = [
            (by[first, example], one) for (of, example), one in by.items() if of == name and (first, example) in by
        ]
        both = [(_kl(speaker, *pair), _base_kl(speaker, *pair, kept)) for pair in pairs]
        known = tuple((tuned, base) for tuned, base in both if tuned is not None and base is not None)
        found += [Apart(name, known)] if known else []
    return found


def _kl(speaker: Compares, one: Text, other: Text, base: bool = False) -> float | None:
    shared = sorted(place for place in one.places if place in other.places)
    if not shared:
        return None
    passes = (Pass(text.ids, [text.places[place] for place in shared], base) for text in (one, other))
    return float(speaker.kl(*passes).double().mean())


def _base_kl(speaker: Compares, one: Text, other: Text, kept: dict[str, Cell]) -> float | None:
    key = f"{one.key}|{other.key}"
    if key not in kept:
        found = _kl(speaker, one, other, base=True)
        if found is None:
            return None
        kept[key] = Cell(found, 1, 0, one.size)
    return kept[key].nats


# --- what a run folder keeps


def load(path: Path, about: str) -> dict[str, Cell]:
    """The base's cells that `save` wrote about the same base; {} where there are none, or of another base."""
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        if told["about"] != about:
            return {}
        return {key: Cell(**cell) for key, cell in told["cells"].items()}
    except (ValueError, KeyError, TypeError):  # another version's: read again, at the cost of a pass
        return {}


def save(path: Path, about: str, cells: Mapping[str, Cell]) -> None:
    """`about`: what tells this base from another. UserError on a full disk."""
    document = {"about": about, "cells": {key: asdict(cell) for key, cell in cells.items()}}
    runs.write_atomic(path, json.dumps(document).encode())
