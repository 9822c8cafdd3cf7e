"""The answers of one example in one format, as a model's reading of them is judged: tokens, words, what counts.

Whole answers, end marks included, also where training leaves tokens out. It asks no model, and judges nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from finetune.format import Rendered, Stretch
from finetune.formula import placed
from finetune.masks import Tokens
from finetune.runlength import Bools, Ints, Windows

Split = Literal["train", "held_out", "twin"]
Key = tuple[str, str, str]  # split, example, format


@dataclass(frozen=True, eq=False)
class Passage:
    """T tokens are read, K of them counted: those in no formula and no end mark. `read` is a mask over `ids`.

    `parts` (T,): which answer. `counted` (T,). `signs` (T,): non-space characters. `words` (W, 3): the first and the
    last + 1 read token of each word outside formulas, and its answer. `size`: UTF-8 bytes of the answers. `asked`: the
    ids before the last answer, `answer` its text; both empty where that is not in the loss. `ends` (T,): end marks.
    """

    example: str
    split: Split
    format: str
    ids: tuple[int, ...]
    read: tuple[bool, ...]
    parts: Ints
    counted: Bools
    signs: Ints
    words: Ints
    template_share: float | None
    size: int
    asked: tuple[int, ...]
    answer: str
    ends: Bools

    @property
    def key(self) -> Key:
        """What its rows are found by."""
        return self.split, self.example, self.format

    def word_windows(self, size: int) -> Windows:
        """Every `size` words in a row, formulas skipped, in counted tokens."""
        before = np.concatenate(([0], np.cumsum(self.counted)))
        first, last = self.words[: max(0, len(self.words) - size + 1)], self.words[size - 1 :]
        kept = first[:, 2] == last[:, 2]
        return Windows(before[first[kept, 0]], before[last[kept, 1]])


def passage(
    example: str, split: Split, rendered: Rendered, tokens: Tokens, formulas: Sequence[Bools] | None = None
) -> Passage:
    """From an example as rendered and encoded. `formulas`: a mask over the words of each trained answer, in order.

    ValueError where a mask has another number of words than its answer.
    """
    both = [pair for pair in zip(rendered.answers, tokens.answers, strict=True) if pair[1].trained]
    given = list(formulas) if formulas is not None else [None] * len(both)
    pieces = [_piece(rendered.text, *pair, tokens, mask) for pair, mask in zip(both, given, strict=True)]
    read = np.zeros(len(tokens.ids), dtype=bool)
    for _, at in both:
        read[at.start : at.stop] = True
    starts = np.cumsum([0, *(len(piece.counted) for piece in pieces)])
    words = [np.insert(piece.words + start, 2, n, axis=1) for n, (piece, start) in enumerate(_zip(pieces, starts))]
    last = tokens.answers[-1].trained
    texts = [segment.text for segment in rendered.segments if segment.role == "answer" and segment.trained]
    return Passage(
        example=example,
        split=split,
        format=rendered.format,
        ids=tokens.ids,
        read=tuple(read.tolist()),
        parts=np.repeat(np.arange(len(pieces)), [len(piece.counted) for piece in pieces]),
        counted=np.concatenate([piece.counted for piece in pieces]),
        signs=np.concatenate([piece.signs for piece in pieces]),
        words=np.concatenate(words),
        template_share=_template_share(pieces),
        size=sum(len(text.encode()) for text in texts),
        asked=tokens.ids[: tokens.prompt] if last else (),
        answer=texts[-1] if last else "",
        ends=np.concatenate([np.arange(len(piece.counted)) >= piece.content for piece in pieces]),
    )


class _Piece(NamedTuple):
    """One answer; tokens counted from its first."""

    counted: Bools
    signs: Ints
    words: Ints  # (W, 2)
    content: int  # tokens before the end mark


def _zip(pieces: list[_Piece], starts: Ints) -> zip[tuple[_Piece, int]]:
    return zip(pieces, starts[:-1].tolist(), strict=True)


def _template_share(pieces: list[_Piece]) -> float | None:
    content = sum(piece.content for piece in pieces)
    return 1 - sum(int(piece.counted.sum()) for piece in pieces) / content if content else None


def _piece(text: str, chars: Stretch, at: Stretch, tokens: Tokens, mask: Bools | None) -> _Piece:
    found, places = placed(text[chars.start : chars.end])
    starts, stops = (places + chars.start).T
    mask = np.zeros(len(found), dtype=bool) if mask is None else mask
    if len(mask) != len(found):
        raise ValueError(f"a mask of {len(mask)} words for an answer of {len(found)}")
    begins, ends = np.array(tokens.places[at.start : at.end], dtype=np.int64).reshape(-1, 2).T
    counted = np.zeros(at.stop - at.start, dtype=bool)
    counted[: at.end - at.start] = ~_masked(starts, stops, begins, ends, mask)
    first, after = np.searchsorted(ends, starts, side="right"), np.searchsorted(begins, stops)
    kept = ~mask & (first < after)
    signs = np.zeros(at.stop - at.start, dtype=np.int64)
    signs[: at.end - at.start] = _signs(text, chars, begins, ends)
    return _Piece(counted, signs, np.stack((first[kept], after[kept]), axis=1), at.end - at.start)


def _masked(starts: Ints, stops: Ints, begins: Ints, ends: Ints, mask: Bools) -> Bools:
    """(tokens,) whether a token touches masked words only; one between words, whether the words beside it are."""
    if not len(mask):
        return np.zeros(len(begins), dtype=bool)
    low, high = np.searchsorted(stops, begins, side="right"), np.searchsorted(starts, ends)
    before = np.concatenate(([0], np.cumsum(mask)))
    beside = mask[np.maximum(low - 1, 0)] & mask[np.minimum(low, len(mask) - 1)]
    return np.where(high > low, before[np.maximum(low, high)] - before[low] == high - low, beside)


def _signs(text: str, chars: Stretch, begins: Ints, ends: Ints) -> Ints:
    """(tokens,) non-space characters, each counted once where several tokens spell it."""
    before = np.concatenate(([0], np.cumsum([not sign.isspace() for sign in text[chars.start : chars.end]])))
    reached = np.clip(np.maximum.accumulate(ends) - chars.start, 0, len(before) - 1)
    start = np.clip(begins[:1] - chars.start, 0, len(before) - 1)
    found: Ints = np.diff(before[np.concatenate((start, reached))])
    return found


def edits(one: str, other: str) -> float:
    """Levenshtein distance in characters as a share of the longer text [Lee et al. 2022]; 0 for two empty ones.

    Bit-parallel over Python's integers [Myers 1999; Hyyro 2003]: two texts of 3,000 characters take milliseconds.
    """
    if not one or not other:
        return float(bool(one or other))
    where: dict[str, int] = {}
    for place, sign in enumerate(one):
        where[sign] = where.get(sign, 0) | 1 << place
    full, top = (1 << len(one)) - 1, 1 << (len(one) - 1)
    rises, falls, distance = full, 0, len(one)  # vertical steps of +1 and -1 in the column before
    for sign in other:
        same = where.get(sign, 0)
        diagonal = (((same & rises) + rises) ^ rises) | same | falls
        right, left = falls | (full & ~(diagonal | rises)), diagonal & rises
        distance += bool(right & top) - bool(left & top)
        right, left = (right << 1) | 1, left << 1
        rises, falls = full & (left | ~(diagonal | right)), full & right & diagonal
    return distance / max(len(one), len(other))
