"""Which training text an answer holds: its longest verbatim span, how much of it counts, where it was written.

What does not count: house style (spans that several examples share), spans that may be recited, and what the answer
quotes from its own prompt. It asks no model and gives no verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from finetune import almost, formula
from finetune.almost import Shared
from finetune.conversation import Conversation, Turn
from finetune.reading import parts
from finetune.runlength import Bools, Ints
from finetune.spans import Index, Matches

_SEED = 12  # signs in a row without which no altered copy is looked for
_TRIED = 3  # training texts that an answer is aligned with: those it shares most with
Windows = Mapping[int, frozenset[tuple[str, ...]]]  # by their number of words


@dataclass(frozen=True)
class Limits:
    """From where on a span is long: so many tokens, or so many characters that are no white space.

    `near`: edits a character that an altered copy may have.
    """

    tokens: int
    characters: int
    near: float

    def severity(self, tokens: int, characters: int) -> float:
        """A span's length as a share of a long one's; 1 and more is long."""
        return max(tokens / self.tokens, characters / self.characters)


@dataclass(frozen=True)
class Span:
    """A stretch of an answer that stands in training text. `tokens`, `characters`: those that count, without spaces.

    `edits`: 0 where it stands there verbatim. `line`: of the part of the example in which it begins.
    """

    text: str
    tokens: int
    characters: int
    example: str
    file: str
    line: int
    edits: int = 0

    @property
    def source(self) -> str:
        """file:line."""
        return f"{self.file}:{self.line}"


class Found(NamedTuple):
    """What an answer holds: the longest verbatim span by what counts of it; a long altered one, if that is not long."""

    span: Span | None
    near: Span | None


def style(
    answers: Mapping[str, Sequence[str]], shortest: int, longest: int, intended: Sequence[str] = ()
) -> dict[int, frozenset[tuple[str, ...]]]:
    """Windows of words that do not count, by size: of formulas (see `formula.masks`) and of spans meant to be recited.

    `answers`: of trained and held-out examples. A part of an intended span counts as little, from `shortest` words on.
    """
    found: defaultdict[int, set[tuple[str, ...]]] = defaultdict(set)
    for name, masks in formula.masks(answers, shortest, longest).items():
        for text, mask in zip(answers[name], masks, strict=True):
            words = formula.placed(text)[0] if mask.any() else []
            found[shortest].update(_windows(words, shortest, mask))
    for text in intended:
        words = formula.placed(text)[0]
        size = min(shortest, len(words))
        found[size].update(_windows(words, size, np.ones(len(words), dtype=bool)))
    return {size: frozenset(some) for size, some in found.items() if size and some}


def _windows(words: Sequence[str], size: int, mask: Bools) -> Iterator[tuple[str, ...]]:
    """Every `size` masked words in a row."""
    before = np.concatenate(([0], np.cumsum(mask)))
    starts = np.arange(max(0, len(words) - size + 1))
    for at in starts[before[starts + size] - before[starts] == size].tolist():
        yield tuple(words[at : at + size])


class Sources:
    """Training text that answers are searched for. `style`: as above; `quotes`: words of a prompt that are a quote.

    All turns of the trained examples count, questions too.
    """

    def __init__(
        self, trained: Iterable[Conversation], style: Windows, tokenizer: Tokenizer, limits: Limits, quotes: int = 8
    ) -> None:
        self._homes = [(one, turn) for one in trained for turn in one.turns]
        self._index = Index([turn.text for _, turn in self._homes])
        self._style, self._tokenizer, self.limits, self._quotes = style, tokenizer, limits, quotes

    def search(self, answers: Sequence[str], known: Sequence[Sequence[str]]) -> list[Found]:
        """What each answer holds. `known`: for each the texts it may quote."""
        matches = self._index.find(answers)
        cut = self._tokenizer.encode_batch(list(answers), add_special_tokens=False)
        quoted = [[self._style, self._quoted(texts)] for texts in known]
        return [self._found(_read(*one)) for one in zip(answers, quoted, matches, cut, strict=True)]

    def _found(self, one: _Read) -> Found:
        span = self._longest(one)
        long = span is not None and self.limits.severity(span.tokens, span.characters) >= 1
        return Found(span, None if long else self._altered(one))

    def _quoted(self, texts: Sequence[str]) -> Windows:
        words = [formula.placed(text)[0] for text in texts]
        windows = (_windows(some, self._quotes, np.ones(len(some), dtype=bool)) for some in words)
        return {self._quotes: frozenset(one for some in windows for one in some)}

    def _longest(self, one: _Read) -> Span | None:
        matches = one.matches
        starts = matches.starts(1)
        if not len(starts):
            return None
        tokens, signs = one.counted(starts, starts + matches.lengths[starts])
        best = int(np.maximum(tokens / self.limits.tokens, signs / self.limits.characters).argmax())
        if not signs[best]:
            return None
        start = int(starts[best])
        place = self._index.place(int(matches.homes[start]))
        return self._span(one, (start, start + int(matches.lengths[start])), place.text, place.character)

    def _altered(self, one: _Read) -> Span | None:
        by_text: defaultdict[int, list[Shared]] = defaultdict(list)
        for start in one.matches.starts(_SEED).tolist():
            place = self._index.place(int(one.matches.homes[start]))
            by_text[place.text].append(Shared(start, place.sign, int(one.matches.lengths[start])))
        most = sorted(by_text, key=lambda text: -sum(shared.size for shared in by_text[text]))[:_TRIED]
        found = [span for text in most if (span := self._copy(one, text, by_text[text]))]
        return max(found, key=lambda span: span.characters, default=None)

    def _copy(self, one: _Read, text: int, shared: list[Shared]) -> Span | None:
        copy = almost.copied(_signs(one.text), _signs(self._homes[text][1].text), shared, self.limits.near)
        if copy is None:
            return None
        place = self._index.within(text, copy.there)
        span = self._span(one, (copy.start, copy.stop), text, place.character, copy.edits)
        return span if self.limits.severity(span.tokens, span.characters) >= 1 else None

    def _span(self, one: _Read, signs: tuple[int, int], text: int, character: int, edits: int = 0) -> Span:
        start, stop = signs
        places = one.matches.places
        tokens, characters = one.counted(np.array([start]), np.array([stop]))
        conversation, turn = self._homes[text]
        return Span(
            text=one.text[places[start] : places[stop - 1] + 1],
            tokens=int(tokens[0]),
            characters=int(characters[0]),
            example=conversation.id,
            file=conversation.origin.file,
            line=_line(turn, character),
            edits=edits,
        )


class _Read(NamedTuple):
    """An answer looked up. Of its T tokens with signs: `first` sign, `after` the last. `free` (M + 1,), `tokens`
    (T + 1,): how many signs, tokens, before each count.
    """

    text: str
    matches: Matches
    free: Ints
    first: Ints
    after: Ints
    tokens: Ints

    def counted(self, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
        """How many tokens and signs count of the signs `[start, stop)`; a token that reaches beyond does not."""
        low, high = np.searchsorted(self.first, starts), np.searchsorted(self.after, stops, side="right")
        whole = np.maximum(self.tokens[np.maximum(high, low)] - self.tokens[low], 0)
        return whole, self.free[stops] - self.free[starts]


def _read(text: str, styles: Sequence[Windows], matches: Matches, cut: Encoding) -> _Read:
    free = ~_covered(text, styles)[matches.places]
    before = np.concatenate(([0], np.cumsum(free)))
    begins, ends = np.array(cut.offsets, dtype=np.int64).reshape(-1, 2).T
    first, after = np.searchsorted(matches.places, begins), np.searchsorted(matches.places, ends)
    spelt = first < after
    first, after = first[spelt], np.maximum.accumulate(after[spelt])
    counts = before[after] > before[first]
    return _Read(text, matches, before, first, after, np.concatenate(([0], np.cumsum(counts))))


def _covered(text: str, styles: Sequence[Windows]) -> Bools:
    """(characters,) whether one stands in a window of words that does not count."""
    words, places = formula.placed(text)
    found = np.zeros(len(text), dtype=bool)
    for size, windows in ((size, windows) for style in styles for size, windows in style.items()):
        for at in range(len(words) - size + 1) if windows else ():
            if tuple(words[at : at + size]) in windows:
                found[places[at, 0] : places[at + size - 1, 1]] = True
    return found


def _signs(text: str) -> str:
    return "".join(text.split())


def _line(turn: Turn, character: int) -> int:
    """Of the part in which a character of a turn stands, its heading included."""
    reached = 0
    for part in parts(turn):
        reached = max(turn.text.find(part.text, reached), reached) + len(part.text)
        if character < reached:
            return part.line
    return turn.line
