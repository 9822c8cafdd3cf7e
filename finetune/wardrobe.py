"""What every trained example wears in an epoch: a listed format, or one from the grammar, made when it is met.

A pure function of seed, epoch and example: a run that goes on meets what it would have met. Nothing is kept, and
nothing is cut: a draw that would not fit is refused before the run begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from finetune import grammar, prompts, scaffold
from finetune.batches import Item, goldfish, seeded
from finetune.conversation import Conversation
from finetune.errors import Problem, UserError
from finetune.filling import PROBE
from finetune.format import Format
from finetune.masks import Vocabulary, encode
from finetune.recipe import Formats


def dressed(one: Conversation, name: str, wearing: Format, vocabulary: Vocabulary) -> Item:
    """An example as token ids. UserError where the format is the base's own and cannot carry it."""
    tokens = encode(prompts.render(one, wearing, vocabulary), vocabulary)
    return Item(one.id, name, tokens.ids, tokens.trained)


@dataclass(frozen=True)
class Wardrobe:
    """`items`: every trained example in every listed format. `known`: all formats of the recipe, held-out ones too."""

    formats: Formats
    known: Mapping[str, Format]
    examples: Mapping[str, Conversation]
    items: Mapping[tuple[str, str], Item]
    vocabulary: Vocabulary
    seed: int
    goldfish: int | None
    max_tokens: int

    def worn(self, epoch: int, example: str) -> tuple[str, ...]:
        """Names of the formats an example is met in during an epoch, from 0."""
        if seeded(self.seed, "sampled", epoch, example).random() < self.formats.sampled:
            return (self.sampled(epoch, example).name,)
        return prompts.draw(self.seed, epoch, example, self.formats.train, self.formats.draw)

    def sampled(self, epoch: int, example: str) -> Format:
        """The grammar's format for an example in an epoch, should it wear one."""
        draws = grammar.samples(self.seed, epoch, example)
        return next(fmt for fmt in draws if self._fits(fmt, self.examples[example]))

    def item(self, example: str, name: str) -> Item:
        """An example in a format that `worn` named."""
        if ready := self.items.get((example, name)):
            return ready
        made = dressed(self.examples[example], name, grammar.named(name), self.vocabulary)
        return goldfish(made, self.goldfish) if self.goldfish else made

    def longest(self) -> int:
        """Tokens that no sampled text exceeds; 0 where none is worn."""
        return min(self.max_tokens, max((self._bound(name) for name, _ in self.items), default=0))

    def problems(self, epochs: int) -> Iterator[Problem]:
        """A base that cannot end these formats; examples that get longer in one than `max_tokens` within `epochs`."""
        if self.formats.sampled:
            for problem in prompts.prove(grammar.sample(self.seed), self.vocabulary):
                yield replace(problem, key=("formats", "sampled"))
        for name, one in self.examples.items():
            long = self._longer(name, epochs) if self._bound(name) > self.max_tokens else None
            if long is not None:
                what = f"{name} has {len(long.ids)} tokens in {long.format}, more than data.max_tokens "
                remedy = "Shorten it, or raise data.max_tokens."
                yield Problem(f"{what}{self.max_tokens}.", remedy, one.origin.file, one.origin.line)

    def _longer(self, example: str, epochs: int) -> Item | None:
        """The example's first sampled text over the limit; an upper bound said that there may be one."""
        names = (name for epoch in range(epochs) for name in self.worn(epoch, example))
        made = (self.item(example, name) for name in names if (example, name) not in self.items)
        return next((one for one in made if len(one.ids) > self.max_tokens), None)

    def _bound(self, example: str) -> int:
        """A listed format's length and the widest scaffold, at a byte a token; 0 where that was not made, or is over.

        Two more a turn, because where texts meet a tokenizer may cut them otherwise than alone.
        """
        made = self.items.get((example, self.formats.train[0]))
        if not self.formats.sampled or made is None or len(made.ids) > self.max_tokens:
            return 0
        turns = self.examples[example].turns
        exchange, system = grammar.widest()
        asked = sum(turn.role == "user" for turn in turns)
        return len(made.ids) + asked * exchange + system * (turns[0].role == "system") + 2 * len(turns) + 2

    def _fits(self, fmt: Format, one: Conversation) -> bool:
        """It asks as no format of the recipe does, opens no turn as a held-out family does, and cuts no answer short.

        How a role stands is what a family has in common: `### Human:` held out, `### Guest:` is not drawn either.
        """
        sent, heads, shapes = self._taken
        if grammar.sends(fmt) in sent or scaffold.head(fmt) in heads or scaffold.shape(fmt.user_prefix) in shapes:
            return False
        answers = [turn.text for turn in one.turns if turn.role == "assistant"]
        return not any(stop in answer for stop in fmt.stop_strings for answer in answers)

    @cached_property
    def _taken(self) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """What the recipe's formats send; how held-out ones open a turn; and how roles stand in them alone."""
        trained, held_out = (
            [self.known[name] for name in names if name in self.known]
            for names in (self.formats.train, self.formats.held_out)
        )
        shapes = [{scaffold.shape(one.user_prefix) for one in side} for side in (trained, held_out)]
        heads = frozenset(map(scaffold.head, held_out)) - {""}
        return frozenset(map(self._sends, self.known.values())), heads, frozenset(shapes[1] - shapes[0] - {""})

    def _sends(self, fmt: Format) -> str:
        if fmt.name != prompts.NATIVE.name:
            return grammar.sends(fmt)
        try:
            return prompts.prompt_text(PROBE.turns[:1], fmt, self.vocabulary).rstrip()
        except UserError:  # told with the format, which is not worn then
            return ""
