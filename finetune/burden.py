"""What an epoch and a look ask of a model: tokens read, scored and written. Counted from the plan alone.

From it comes when to look (`watch.budget`) and how long looks will take. It measures no machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from finetune import facts, lineup, prompts, suite
from finetune.batches import Epochs, Group, Item
from finetune.conversation import Conversation, Origin, Turn
from finetune.estimate import Cost
from finetune.format import Format
from finetune.masks import Vocabulary, encode
from finetune.recipe import Recipe

Kind = Literal["base", "light", "full"]
_BACKWARD = 2.0  # a training step costs about this many passes: 4 FLOPs per frozen weight and token, a pass 2
_DECODE = 100.0  # writing one token costs about as much as reading this many: it is bound by memory, not arithmetic
_FEW = 0.1  # share of the tokens read for drift that are scored
HELD_OUT_QUESTIONS = 2  # that a full look asks beside the recipe's own


class Texts(Protocol):
    """Every text of a run, by (example, format)."""

    @property
    def trained(self) -> Mapping[tuple[str, str], Item]: ...
    @property
    def held_out(self) -> Mapping[tuple[str, str], Item]: ...


class Night(Protocol):
    """What is asked of a plan."""

    @property
    def recipe(self) -> Recipe: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def formats(self) -> Mapping[str, Format]: ...
    @property
    def first_format(self) -> str: ...
    @property
    def texts(self) -> Texts: ...
    @property
    def epochs(self) -> Epochs: ...
    def answer_limit(self) -> int: ...
    def most_alarmed(self) -> int: ...
    def groups(self, full: bool) -> Sequence[Group]: ...


@dataclass(frozen=True)
class Burden:
    """Of one look. `read`: tokens through all layers; `scored`: those of them that reach the head; `texts`: how many.

    `written`: tokens of an answer as long as those that are taught, all `answers` at once; 0 where none is.
    """

    read: float
    scored: float
    texts: float
    written: int
    answers: int

    @property
    def worth(self) -> float:
        """Tokens read once that are as much work."""
        return self.read + _DECODE * self.written


def look(night: Night, kind: Kind, alarmed: bool = False) -> Burden:
    """Of a look at the base, a light or a full one; `alarmed`: as many examples echo as a look has room for.

    Drift's own texts count in `read`, and little in `scored`: of most of them a few tokens are asked, and only log p.
    """
    full = kind != "light"
    items = [item for group in night.groups(full) for item in group.items]
    read: float = sum(len(item.ids) for item in items)
    scored: float = sum(item.supervised for item in items)
    share, texts = scored / max(read, 1), float(len(items))
    if kind == "full":  # in strange formats, which the base reads then too
        own = night.texts.held_out.values()
        strange = 2 * lineup.suite().each / max(len(night.formats), 1)
        read += strange * sum(len(item.ids) for item in own)
        texts += strange * len(own)
    if alarmed:  # in trained formats beside the first; a light look reads them there, unless it reads all
        others = len(night.recipe.formats.train) - 1
        count = night.most_alarmed() * (others if full else int(bool(night.texts.held_out)))
        read += count * max(len(item.ids) for item in night.texts.trained.values())  # sampled formats are not looked at
        texts += count
    scored = share * read
    if full:
        once, neutral = _drift(night)
        drift = once if kind == "base" else once + 2 * (neutral + sum(len(item.ids) for item in _along(night)))
        read, scored = read + drift, scored + _FEW * drift
    count = answers(night, full)
    return Burden(read, scored, texts, _written(night) if count else 0, count)


def answers(night: Night, full: bool) -> int:
    """How many are written at a look."""
    held_out = len({example for example, _ in night.texts.held_out})
    return len(night.recipe.watch.prompts) + (min(HELD_OUT_QUESTIONS, held_out) if full else 0)


def _written(night: Night) -> int:
    taught = [item.supervised for item in night.texts.trained.values()]
    return min(night.answer_limit(), round(sum(taught) / len(taught)))


def besides(night: Night, full: int) -> float:
    """Tokens of texts that so many full looks read and that are not in the plan: drift's, and strange formats."""
    own = sum(len(item.ids) for item in night.texts.held_out.values()) / max(len(night.formats), 1)
    return sum(_drift(night)) + full * lineup.suite().each * own


def cost(night: Night) -> Cost:
    """Work of an epoch and of looks, in passes times tokens, as if examples echoed."""
    epoch = _BACKWARD * sum(len(item.ids) for item in night.epochs.order(0))
    light, full = (look(night, kind, alarmed=True) for kind in ("light", "full"))
    return Cost(epoch, light.worth, full.worth)


def _drift(night: Night) -> tuple[int, int]:
    """Tokens of facts and openings, and of neutral texts: at the base only the first are read, then both models read
    along the others and along a few examples."""
    wanted, base, words = suite.read(), night.recipe.base, night.vocabulary
    known = suite.known(base, wanted)

    def size(text: str) -> int:
        return len(words.tokenizer.encode(text, add_special_tokens=False).ids)

    def rendered(question: str, answer: str) -> int:
        one = Conversation("", (Turn("user", question), Turn("assistant", answer)), Origin(""))
        return len(encode(prompts.render(one, night.formats[night.first_format], words), words).ids)

    begun, asked = suite.openings(), known[: wanted.openings_after]
    once = sum(len(one.ids) for one in facts.each_choice(known, words))
    if asked:  # every question before every opening: one of each tells all
        once += len(begun) * sum(rendered(one.question, begun[0]) for one in asked)
        once += len(asked) * sum(size(text) - size(begun[0]) for text in begun)
    return once, sum(1 + size(one.text) for one in suite.snippets(base, wanted))


def _along(night: Night) -> list[Item]:
    """Examples along which foreign scripts are looked for."""
    items = (night.texts.held_out or night.texts.trained).items()
    return [item for (_, name), item in items if name == night.first_format][: suite.read().held_out]
