"""Which example is trained when, and in which format: a pure function of (seed, epoch). No torch, no text, no clock.

Every example comes exactly once an epoch (once per format with `all`), the remainder included; nothing is cut.
Rows of one global batch are sorted by length, so that a micro-batch holds texts alike; the batches stay random.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Shuffle = Literal["each_epoch", "once", "never"]
_NO_LIMIT = 2**40  # tokens


@dataclass(frozen=True)
class Item:
    """One rendered text. `trained[t]`: token t is in the loss. `format` is empty for replayed text."""

    example: str
    format: str
    ids: tuple[int, ...]
    trained: tuple[bool, ...]

    @property
    def supervised(self) -> int:
        """How many tokens are in the loss."""
        return sum(self.trained)


@dataclass(frozen=True)
class Group:
    """Texts measured as one row: a split in one format. `size`: UTF-8 bytes of the answers in the loss."""

    split: str
    format: str
    items: tuple[Item, ...]
    size: int


def seeded(*parts: object) -> random.Random:
    """A generator that depends on nothing but `parts`, the same on every machine and Python."""
    return random.Random(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest())


class Epochs:
    """The order of an epoch's items. Two with equal arguments give equal orders.

    `formats`: what an example is met in, by epoch and example; `item`: a text, by example and format, made when its
    epoch is asked for. Both must be pure.
    """

    def __init__(
        self,
        item: Callable[[str, str], Item],
        examples: Sequence[str],
        formats: Callable[[int, str], Sequence[str]],
        seed: int,
        shuffle: Shuffle = "each_epoch",
        batch_size: int = 1,
        replay: Sequence[Item] = (),
        replay_share: float = 0.0,
    ) -> None:
        self._item, self._examples, self._formats = item, list(examples), formats
        self._seed, self._shuffle, self._batch_size = seed, shuffle, batch_size
        self._replay = list(replay)
        own = self._own(0)
        self._replayed = _replay_rows(own, self._replay, replay_share)
        self.size = len(own) + self._replayed
        self.order = lru_cache(maxsize=2)(self._order)

    def _own(self, epoch: int) -> list[Item]:
        return [self._item(example, name) for example in self._examples for name in self._formats(epoch, example)]

    def _order(self, epoch: int) -> list[Item]:
        """The items of an epoch, counted from 0, in training order."""
        rows = self._own(epoch) + _drawn(seeded(self._seed, "replay", epoch), self._replay, self._replayed)
        if self._shuffle != "never":
            seeded(self._seed, "order", 0 if self._shuffle == "once" else epoch).shuffle(rows)
            return [item for batch in _chunks(rows, self._batch_size) for item in sorted(batch, key=_length)]
        return rows


def _replay_rows(own: Sequence[Item], replay: Sequence[Item], share: float) -> int:
    """How many replayed texts an epoch takes, so that about `share` of its supervised tokens are theirs."""
    if not replay or share <= 0:
        return 0
    wanted = share / (1 - share) * sum(item.supervised for item in own)
    mean = sum(item.supervised for item in replay) / len(replay)
    return max(1, round(wanted / mean))


def _drawn(draw: random.Random, texts: Sequence[Item], count: int) -> list[Item]:
    """`count` texts: all of them as often as they fit in, then some; none comes twice before all have come once."""
    whole, rest = divmod(count, max(len(texts), 1))
    return [*texts] * whole + draw.sample(texts, rest)


def _length(item: Item) -> int:
    return len(item.ids)


def _chunks(rows: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def goldfish(item: Item, k: int, context: int = 13) -> Item:
    """Leave about one supervised token in `k` out of the loss, chosen by a hash of the `context` tokens before it.

    The same passage always drops the same tokens, so they are never learnt by heart [Hans et al. 2024, goldfish loss].
    The last supervised token, the end mark, always stays.
    """
    last = max((t for t, on in enumerate(item.trained) if on), default=-1)
    kept = tuple(
        on and (t == last or not _dropped(item.ids[max(0, t - context) : t], k)) for t, on in enumerate(item.trained)
    )
    return Item(item.example, item.format, item.ids, kept)


def _dropped(before: Sequence[int], k: int) -> bool:
    digest = hashlib.sha256(",".join(map(str, before)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % k == 0


@dataclass(frozen=True)
class Packing:
    """How a global batch is laid into micro-batches: at most `tokens` tokens, or one text, and at most `texts` texts.

    Nothing is padded, so tokens are all that a micro-batch costs.
    """

    tokens: int = 2048
    texts: int | None = None

    def packs(self, items: Sequence[Item]) -> list[list[Item]]:
        """Every item once, in order; at least one in each."""
        packs: list[list[Item]] = []
        room = 0
        for item in items:
            room -= len(item.ids)
            if room < 0 or len(packs[-1]) == self.texts:
                packs.append([])
                room = self.tokens - len(item.ids)
            packs[-1].append(item)
        return packs

    def steps(self, order: Sequence[Item], batch_size: int) -> list[list[int]]:
        """Tokens of every micro-batch, step by step."""
        return [[sum(map(_length, pack)) for pack in self.packs(batch)] for batch in _chunks(order, batch_size)]

    def most(self, longest: int, batch_size: int) -> int:
        """Tokens that no micro-batch of texts of up to `longest` exceeds."""
        return min(min(batch_size, self.texts or batch_size) * longest, max(self.tokens, longest))


def packing(micro_batch: int | Literal["auto"]) -> Packing:
    """As a recipe's `machine.micro_batch` says: so many texts, however long, or what fits 2,048 tokens."""
    return Packing() if micro_batch == "auto" else Packing(tokens=_NO_LIMIT, texts=micro_batch)
