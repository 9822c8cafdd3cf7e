"""Which words of the answers are house style: spans that several examples share, and spans meant to be recited.

Exact, no hashing, about linear in words. It looks at words only: no tokens, no format, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from finetune import overlap
from finetune.runlength import Bools, Ints


def placed(text: str) -> tuple[list[str], Ints]:
    """The words of a text in one case, and (W, 2) their characters `[start, stop)`."""
    found = overlap.placed(text)
    places = np.array([place for _, *place in found], dtype=np.int64).reshape(-1, 2)
    return [word for word, *_ in found], places


def masks(
    answers: Mapping[str, Sequence[str]], shortest: int = 8, longest: int = 24, intended: Sequence[str] = ()
) -> dict[str, tuple[Bools, ...]]:
    """For each example and answer, (words,) whether a word lies in a formula. `answers`: trained *and* held-out ones.

    A formula is a span of `shortest` to `longest` words that two examples share. Both sides are treated alike, so that
    they stay exchangeable under the permutation test. A word of a longer shared span is a duplicate's, not a formula's:
    to hide it would hide what is learnt by heart first. `intended` spans may be of any length.
    """
    texts = [placed(text)[0] for of in answers.values() for text in of]
    owner = [number for number, of in enumerate(answers.values()) for _ in of]
    sizes = [len(words) for words in texts]
    known: dict[str, int] = {}
    ids = np.array([known.setdefault(word, len(known)) for words in texts for word in words], dtype=np.int64)
    parts, owners = np.repeat(np.arange(len(texts)), sizes), np.repeat(np.array(owner, dtype=np.int64), sizes)
    found = _covered(_shared(ids, parts, owners, shortest), shortest, len(ids))
    found &= ~_covered(_shared(ids, parts, owners, longest + 1), longest + 1, len(ids))
    for span in intended:
        words = [known.get(word, -1) for word in placed(span)[0]]
        found |= _covered(_occurrences(ids, parts, words), len(words), len(ids))
    pieces = iter(np.split(found, np.cumsum(sizes)[:-1]) if texts else [])
    return {name: tuple(next(pieces) for _ in of) for name, of in answers.items()}


def _shared(ids: Ints, parts: Ints, owners: Ints, size: int) -> Ints:
    """Where a span of `size` words starts that lies in one answer and stands in two examples or more."""
    names = _names(ids, size)
    starts = np.flatnonzero(parts[: len(names)] == parts[len(parts) - len(names) :])
    names, owners = names[starts], owners[starts]
    examples = int(owners.max(initial=0)) + 1
    pairs = np.unique(names * examples + owners)
    counts = np.bincount(pairs // examples, minlength=int(names.max(initial=0)) + 1)
    found: Ints = starts[counts[names] > 1]
    return found


def _names(ids: Ints, size: int) -> Ints:
    """A number for the `size` words from each offset, equal where the words are.

    By doubling: two names of w words make one of up to 2 w [Karp, Miller, Rosenberg 1972]. (max(0, W - size + 1),).
    """
    names, width = ids, 1
    while width < size:
        step = min(width, size - width)
        pairs = names[:-step] * (int(names.max(initial=0)) + 1) + names[step:]
        names, width = np.unique(pairs, return_inverse=True)[1], width + step
    return names


def _occurrences(ids: Ints, parts: Ints, words: Sequence[int]) -> Ints:
    """Where these words stand in a row inside one answer."""
    starts = np.arange(len(ids) - len(words) + 1) if words else np.zeros(0, dtype=np.int64)
    for offset, word in enumerate(words):
        starts = starts[ids[starts + offset] == word]
    found: Ints = starts[parts[starts] == parts[starts + len(words) - 1]]
    return found


def _covered(starts: Ints, size: int, total: int) -> Bools:
    """(total,) whether a word lies in one of these spans of `size` words."""
    edges = np.bincount(starts, minlength=total + 1) - np.bincount(starts + size, minlength=total + 1)
    found: Bools = np.cumsum(edges)[:total] > 0
    return found
