"""In which formats a run is measured, and what each is to it: trained, held out, near, sampled, or a slip of the hand.

The numbers are in `eval/formats.yaml`. No model is asked, and no format is ranked, here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import grammar, prompts, scaffold, starters, yamlfile
from finetune.batches import seeded
from finetune.conversation import Turn
from finetune.errors import Problem, UserError
from finetune.format import Format

Group = Literal["trained", "held_out", "near", "own", "sampled", "slip"]
GROUPS: tuple[Group, ...] = ("trained", "held_out", "near", "own", "sampled", "slip")
_Share = Annotated[float, Field(gt=0, le=1)]
_Count = Annotated[int, Field(ge=0)]
_Positive = Annotated[float, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Goals(_Strict):
    """What a run that holds would reach; told, and no gate."""

    median: float
    least: float
    spread: float
    stop: _Share
    leaks: _Count


class Suite(_Strict):
    """Every number of `eval/formats.yaml`, which says what they mean."""

    version: Literal[1]
    named: tuple[str, ...]
    sampled: _Count
    each: _Count
    asked_sampled: _Count
    temperature: _Positive
    early: _Share
    long: _Positive
    chance: _Share
    standard_errors: _Positive
    goals: Goals


def suite(path: Path | None = None) -> Suite:
    """Of a file, by default the shipped one. UserError naming line and key of every fault, formats unknown included."""
    document = yamlfile.read(path or starters.find("formats", "suites"))
    try:
        found = Suite.model_validate(document.data)
    except ValidationError as error:
        for one in error.errors():
            key = tuple(one["loc"])
            document.refuse(key, f"{'.'.join(map(str, key))}: {one['msg'].lower()}.", "See the file that is shipped.")
    else:
        for number, name in enumerate(found.named):
            try:
                prompts.load([name])
            except UserError as error:
                document.refuse(("named", number), error.problems[0].what, error.problems[0].remedy)
    if document.problems:
        raise UserError(document.problems)
    return found


@dataclass(frozen=True)
class Gauge:
    """A format to measure in. `of`: the trained format that a slip or a near one belongs to, "" for strangers."""

    format: Format
    group: Group
    of: str = ""

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def family(self) -> str:
        """Of the format; `sampled` for any draw."""
        return self.format.family


@dataclass(frozen=True)
class Recipe:
    """What of a run's recipe decides its lineup. `system`: a system text of the data, "" without one.

    `worn`: names of sampled formats that the run trains in. `own`: formats asked for beside all others.
    """

    trained: Sequence[Format]
    held_out: Sequence[Format]
    own: Sequence[Format] = ()
    system: str = ""
    seed: int = 0
    worn: Collection[str] = ()


def whole(recipe: Recipe, wanted: Suite) -> list[Gauge]:
    """All that is measured at the end: each name once, and of strangers that send the same prompt the first."""
    listed = [*listed_ones(recipe)]
    taken = {one.name for one in listed}
    sent = {_asks(one.format) for one in listed if one.format != prompts.NATIVE}
    for fmt in prompts.load(wanted.named):
        if fmt.name not in taken and _asks(fmt) not in sent:
            sent.add(_asks(fmt))
            listed.append(_stranger(fmt, recipe))
    return [*listed, *strange(recipe, wanted)]


def listed_ones(recipe: Recipe) -> Iterator[Gauge]:
    """The recipe's formats and the user's own: what every full look measures."""
    yield from (Gauge(one, "trained", one.name) for one in recipe.trained)
    yield from (_stranger(one, recipe) for one in recipe.held_out)
    known = {one.name for one in (*recipe.trained, *recipe.held_out)}
    yield from (
        Gauge(one, "own", scaffold.near(one, recipe.trained) or "") for one in recipe.own if one.name not in known
    )


def strange(recipe: Recipe, wanted: Suite) -> list[Gauge]:
    """Sampled formats and whitespace slips of the trained ones, none of which the run knows: what rotates at looks."""
    known = [one for one in (*recipe.trained, *recipe.held_out) if one != prompts.NATIVE]
    sent = {grammar.sends(one) for one in (*known, *map(grammar.named, recipe.worn))}
    fresh = (one for one in grammar.samples("measured", recipe.seed) if grammar.sends(one) not in sent)
    shown = {_shown(one, recipe.system) for one in known}
    slips = (
        Gauge(slip, "slip", one.name) for one in recipe.trained for slip in grammar.whitespace_twins(one, recipe.system)
    )
    unlike = [one for one in slips if _shown(one.format, recipe.system) not in shown]
    return [*(Gauge(one, "sampled") for one in islice(_distinct(fresh), wanted.sampled)), *unlike]


def _shown(fmt: Format, system: str) -> str:
    """The small conversation in full, under a system text of the data's: slips differ in their white space alone."""
    turns = (*((Turn("system", system),) if system else ()), *prompts.PROBE.turns)
    return prompts.prompt_text(turns, fmt)


def _distinct(formats: Iterable[Format]) -> Iterator[Format]:
    seen: set[str] = set()
    for one in formats:
        if grammar.sends(one) not in seen:
            seen.add(grammar.sends(one))
            yield one


def _asks(fmt: Format) -> str:
    """A first question as a client sends it, the format's own system text included, without white space at its end."""
    return prompts.prompt_text(prompts.PROBE.turns[:1], fmt).rstrip()


def _stranger(fmt: Format, recipe: Recipe) -> Gauge:
    of = scaffold.near(fmt, recipe.trained)
    return Gauge(fmt, "near" if of else "held_out", of or "")


def remarks(trained: Mapping[str, Format], held_out: Mapping[str, Format]) -> Iterator[Problem]:
    """What is no fault of a recipe and should be known before a night: see prompts.remarks; held-out relations."""
    for side, formats in (("train", trained), ("held_out", held_out)):
        for number, fmt in enumerate(formats.values()):
            for text in prompts.remarks(fmt):
                remedy = "In a format of your own, take the space out of generation_prompt."
                yield Problem(text, remedy, key=("formats", side, number))
    for number, (name, fmt) in enumerate(held_out.items()):
        if of := scaffold.near(fmt, trained.values()):
            what = f"held-out format {name} is a near relation of the trained {of}: it is told apart, as near."
            yield Problem(what, "Hold out a format of another family too.", key=("formats", "held_out", number))


def rotation(
    seed: int, look: int, ids: Sequence[str], formats: Sequence[str], each: int = 2
) -> dict[str, tuple[str, ...]]:
    """Which of many formats each example is met in at full look number `look`, from 0: `each` of them, none twice.

    A pure function. One look after another goes through all formats before it begins again; which example meets which
    changes from look to look, and how often two formats were met differs by at most one.
    """
    if not formats:
        return dict.fromkeys(ids, ())
    order, examples = [*formats], [*ids]
    seeded(seed, "rotation").shuffle(order)
    seeded(seed, "rotation", look).shuffle(examples)
    size = min(each, len(order))
    first = look * len(examples) * size
    met = {
        name: tuple(order[(first + at * size + k) % len(order)] for k in range(size))
        for at, name in enumerate(examples)
    }
    return {name: met[name] for name in ids}


def side(fmt: Format) -> str:
    """Equal for formats that send the same first question, white space at its end aside; `native` is like no other."""
    told = fmt.name if fmt == prompts.NATIVE else _asks(fmt)
    return hashlib.sha256(told.encode()).hexdigest()[:12]
