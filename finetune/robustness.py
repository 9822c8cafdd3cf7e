"""Same question, other formats: does it hold? Everything about formats that is measured of one adapter, in one call.

Losses of given answers in every format of the lineup, answers written in the recipe's own and some sampled ones. The
speaker is passed in, and the base's figures are kept beside the run. It judges nothing: goals are told with what was
measured (see grid).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

from finetune import chance, grammar, likeness, lineup, prompts, reach, replies, transfer
from finetune.chance import Interval
from finetune.conversation import Conversation
from finetune.format import Format
from finetune.likeness import Consistency
from finetune.lineup import Gauge, Group, Suite
from finetune.odds import Sampler
from finetune.plan import Plan
from finetune.reach import Apart
from finetune.replies import Judge, Reply, Tally
from finetune.scaffold import Detector
from finetune.shelf import SHELF, read, shipped
from finetune.transfer import Sheet, Transfer

SINGLE, LONG, TURNS = "single", "long", "multi-turn"
_DRAWS = 2  # the fewest that say how alike a model is to itself


@dataclass(frozen=True)
class Kind:
    """Held-out examples of one kind: gain over the base in bits per byte, in trained formats and in untouched ones."""

    name: str
    n: int
    trained: Interval | None
    held_out: Interval | None


@dataclass(frozen=True)
class Known:
    """A measured format by name: see lineup.Gauge. `side`: equal for two that send the same first question."""

    name: str
    group: Group
    family: str
    of: str
    side: str


@dataclass(frozen=True)
class Robustness:
    """All that was found. `sides`: different prompt sides of each untouched family. Without answers `replies` is empty.

    `formats`: all that was measured, in the order of the lineup. `tuned`, `base`: what was read of each example.
    `kinds`: of every held-out example. `replies`: the adapter's greedy ones, its draws (`draw` from 1), and the base's
    greedy ones (`base`).
    """

    suite: Suite
    step: int
    formats: tuple[Known, ...]
    tuned: Sheet
    base: Sheet
    apart: tuple[Apart, ...]
    kinds: Mapping[str, str]
    replies: tuple[Reply, ...]

    @cached_property
    def transfer(self) -> Transfer:
        return transfer.transfer(self.tuned, self.base, self.formats, self.suite.chance, self.suite.standard_errors)

    @property
    def sides(self) -> Mapping[str, int]:
        """How many different prompt sides of each untouched family were measured."""
        found: dict[str, set[str]] = {}
        for one in self.formats:
            if one.group == "held_out":
                found.setdefault(one.family, set()).add(one.side)
        return {family: len(some) for family, some in found.items()}

    @cached_property
    def by_kind(self) -> tuple[Kind, ...]:
        """Kinds of examples that there are."""
        return tuple(_kinds(self.tuned, self.base, self.formats, self.kinds))

    @property
    def consistency(self) -> Consistency:
        """Of the adapter's draws."""
        return replies.consistency(one for one in self.replies if not one.base)

    @cached_property
    def tallies(self) -> Mapping[tuple[str, bool], Tally]:
        """Greedy answers by format, and whether the base's."""
        sides = {base: [one for one in self.replies if one.base is base and not one.draw] for base in (False, True)}
        return {(name, base): one for base, some in sides.items() for name, one in replies.by(some, "format").items()}

    def greedy(self, base: bool = False) -> list[Reply]:
        return [one for one in self.replies if one.base is base and not one.draw]

    @property
    def written(self) -> Tally:
        """All the adapter wrote, draws included."""
        return replies.tally(one for one in self.replies if not one.base)


@dataclass(frozen=True)
class Store:
    """Where the base's figures are kept, and what tells this base from another."""

    path: Path
    about: str


def measure(
    speaker: Any,
    plan: Plan,
    wanted: Suite,
    step: int = 0,
    store: Store | None = None,
    own: Sequence[Format] = (),
    write: bool = True,
) -> Robustness:
    """Of the adapter that the speaker wears, on the plan's held-out examples. `own`: the user's formats beside others.

    `write`: ask for answers too. Where nothing is held out, nothing is measured.
    """
    gauges = lineup.whole(asked_of(plan, own), wanted)
    examples = [plan.conversations[name] for name in plan.split.held_out]
    some = reach.texts(examples, gauges, plan.vocabulary)
    kept = reach.load(store.path, store.about) if store else {}
    known = len(kept)
    missing = {one.key: one for one in some if one.key not in kept}
    kept.update(reach.read(speaker, [*missing.values()], base=True))
    tuned, base = reach.sheet(some, reach.read(speaker, some)), reach.sheet(some, kept)
    listed = {one.name for one in gauges if one.group in ("trained", "own")} | {*plan.recipe.formats.held_out}
    between = reach.apart(speaker, [one for one in some if one.format in listed], plan.first_format, kept)
    if store and len(kept) > known:
        reach.save(store.path, store.about, kept)
    kinds = kinds_of(plan, wanted.long)
    return Robustness(
        suite=wanted,
        step=step,
        formats=tuple(Known(one.name, one.group, one.family, one.of, lineup.side(one.format)) for one in gauges),
        tuned=tuned,
        base=base,
        apart=tuple(between),
        kinds=kinds,
        replies=tuple(_written(speaker, plan, gauges, wanted, kinds)) if write else (),
    )


def at_look(rows: Iterable[Mapping[str, Any]], step: int, gauges: Sequence[Gauge], wanted: Suite) -> Transfer:
    """The same comparison from the rows of examples.jsonl: a full look against the one at the base, step 0."""
    kept = list(rows)
    tuned, base = (transfer.sheet(kept, at) for at in (step, 0))
    return transfer.transfer(tuned, base, gauges, wanted.chance, wanted.standard_errors)


def asked_of(plan: Plan, own: Sequence[Format] = ()) -> lineup.Recipe:
    """What a plan says about its formats, by the names its recipe gives them; what it wore of the grammar anew."""
    formats = plan.recipe.formats
    system = next((text for one in plan.conversations.values() if (text := one.system)), "")
    sides = [[replace(plan.formats[name], name=name) for name in names] for names in (formats.train, formats.held_out)]
    return lineup.Recipe(sides[0], sides[1], own, system, plan.recipe.seed, _worn(plan))


def _worn(plan: Plan) -> Collection[str]:
    if not plan.recipe.formats.sampled:
        return ()
    wardrobe = plan.texts.wardrobe
    worn = (
        name for epoch in range(plan.recipe.epochs) for one in plan.split.train for name in wardrobe.worn(epoch, one)
    )
    return frozenset(name for name in worn if name.startswith(grammar.PREFIX))


# --- kinds of examples


def kinds_of(plan: Plan, long: float) -> dict[str, str]:
    """What kind every held-out example is: of several turns, or `long` times the median trained length, or neither."""
    first = plan.first_format
    lengths = [len(item.ids) for (_, name), item in plan.texts.whole.items() if name == first]
    usual = median(lengths) if lengths else 0
    found = {}
    for name in plan.split.held_out:
        one, item = plan.conversations[name], plan.texts.held_out.get((name, first))
        turns = sum(turn.role == "user" for turn in one.turns)
        big = item is not None and usual > 0 and len(item.ids) >= long * usual
        found[name] = TURNS if turns > 1 else LONG if big else SINGLE
    return found


def _kinds(tuned: Sheet, base: Sheet, formats: Sequence[Known], kinds: Mapping[str, str]) -> Iterable[Kind]:
    for kind in (SINGLE, TURNS, LONG):
        names = [name for name, of in kinds.items() if of == kind]
        sides = [_gain(tuned, base, [one.name for one in formats if one.group == group], names)
                 for group in ("trained", "held_out")]  # fmt: skip
        if names:
            yield Kind(kind, len(names), *sides)


def _gain(tuned: Sheet, base: Sheet, formats: Sequence[str], names: Sequence[str]) -> Interval | None:
    """Bits per byte of each example, mean over formats; bounds over examples."""
    found = []
    for name in names:
        cells = [(tuned[one][name], base[one][name]) for one in formats if name in tuned.get(one, {})]
        if cells:
            found.append(fmean((plain.nats - cell.nats) / cell.size for cell, plain in cells) / transfer.BIT)
    return chance.mean(found)


# --- answers


def judge(plan: Plan, wanted: Suite, gauges: Sequence[Gauge]) -> Judge:
    """By the taught answers: their shape, their length, and the marks that none of them holds."""
    taught = [turn.text for name in plan.split.train for turn in _answers(plan.conversations[name])]
    last = [plan.conversations[name].answer for name in plan.split.train]
    known = {one.name: one for one in (*(gauge.format for gauge in gauges), *_shelf())}
    detector = Detector.of(
        [one for one in known.values() if one != prompts.NATIVE], taught, plan.vocabulary.bos, plan.vocabulary.eos
    )
    house = likeness.house(last, plan.recipe.data.parts)
    return Judge(plan.vocabulary, house, detector, plan.answer_limit(), wanted.early)


def _answers(one: Conversation) -> list[Any]:
    return [turn for turn in one.turns if turn.role == "assistant"]


def _shelf() -> list[Format]:
    return [read(SHELF / f"{name}.yaml") for name in shipped()]


def _written(
    speaker: Any, plan: Plan, gauges: Sequence[Gauge], wanted: Suite, kinds: Mapping[str, str]
) -> Iterable[Reply]:
    """Greedy in the recipe's formats, own ones and some sampled; drawn, and the base's, in the recipe's alone."""
    names = {*plan.recipe.formats.train, *plan.recipe.formats.held_out}
    listed = [one for one in gauges if one.name in names or one.group == "own"]
    sampled = islice((one for one in gauges if one.group == "sampled"), wanted.asked_sampled)
    by = judge(plan, wanted, gauges)
    asked = [(kinds[name], plan.conversations[name]) for name in plan.split.held_out]
    yield from replies.ask(speaker, asked, [*listed, *sampled], by)
    yield from replies.ask(speaker, asked, listed, by, base=True)
    yield from replies.ask(speaker, asked, listed, by, sampler=Sampler(wanted.temperature), draws=_DRAWS)
