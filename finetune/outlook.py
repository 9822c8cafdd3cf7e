"""What `sft check` says before a night: every fault of recipe and dataset at once, then the plan, number by number.

Each number comes with its reason; what is not known here is said not to be. It loads no weights, imports no torch, asks
no network and prints nothing. GiB and minutes are estimates unless a run on this machine measured them.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import bases, estimate, lint, loggers, memory, places, plan, rates, recipe
from finetune.bases import Known
from finetune.errors import Problem, UserError, refuse
from finetune.estimate import Length
from finetune.ledger import Fact, cost_facts
from finetune.plan import Plan, Source
from finetune.rates import Calibration
from finetune.recipe import Draft, Recipe

_GENTLE, _HARSH = (1e-7, 600), (1e-6, 100)  # learning rate and epochs of MiniSymposium's two published runs


@dataclass(frozen=True)
class Outlook:
    """`facts` are empty where a problem keeps a plan from being made; `warnings` keep nothing from starting."""

    recipe: Path
    problems: list[Problem]
    warnings: list[Problem]
    facts: list[Fact]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        sections: dict[str, dict[str, Any]] = {}
        for fact in self.facts:
            sections.setdefault(fact.section, {})[fact.name] = {"value": fact.value, "reason": fact.reason}
        told = {
            "problems": [one.as_dict() for one in self.problems],
            "warnings": [one.as_dict() for one in self.warnings],
        }
        return {"recipe": str(self.recipe), **told, "plan": sections}


def look(path: Path, sets: Sequence[str] = (), gpu: str | None = None, calibrate: bool = False) -> Outlook:
    """All that can be known of a recipe before its night. UserError only where the file holds no settings at all.

    `gpu`: memory of the card it is meant for, such as `12GB`. `calibrate`: measure this machine, in a process apart.
    """
    room = None if gpu is None else gib_of(gpu)
    draft = recipe.read(path, sets)
    problems = [*draft.problems, *(one for error in loggers.missing(draft.recipe.report_to) for one in error.problems)]
    known = _base(draft, problems)
    material = plan.gather(draft.recipe, known.vocabulary, _source(draft))
    problems += _new(material.problems, draft)
    problems += bases.lora_problems(known.shape, draft.recipe.lora.targets, _top(draft.recipe))
    warnings = [*material.warnings, *_unread(draft.recipe)]
    facts: list[Fact] = []
    if not problems and material.conversations:
        made = plan.schedule(material)
        costs, too_much = cost_facts(made, known, room, _rates(made, known, calibrate, warnings))
        facts, problems = [*_facts(made, known), *costs], [*too_much]
    told = sorted(recipe.placed(problems, path, sets), key=lambda one: (one.file != path, str(one.file), one.line or 0))
    return Outlook(path, told, recipe.placed(warnings, path, sets), facts)


def gib_of(text: str) -> float:
    """`12GB`, `12 GiB`, `12g` or `12`: cards are sold in GiB, whatever the box says. UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:g|gb|gib)?\s*", text, re.I)
    if not found or not 0 < float(found[1]) < 1e5:
        raise refuse(f"--gpu {text[:40]} is no size.", "Write the card's memory, such as --gpu 12GB.")
    return float(found[1])


# what is wrong


def _base(draft: Draft, problems: list[Problem]) -> Known:
    """The base, or a stand-in where the recipe names none that could be looked at."""
    name = draft.recipe.base
    if "base" not in draft.left_out and not _nowhere(name):
        try:
            return bases.look_up(name, draft.recipe.revision)
        except UserError as error:
            problems += error.problems
    return Known(name, bases.stand_in(), False, None, "")


def _nowhere(path: str) -> bool:
    """A path that leads nowhere: the recipe's own check has told it."""
    return os.path.isabs(path) and not os.path.exists(path)


def _source(draft: Draft) -> Source | None:
    """None where there is no dataset to look at: none is named, it is not there, or it is on the Hub."""
    data, left_out = draft.recipe.data, draft.left_out
    if {"data", "data.train"} & left_out or _nowhere(data.train) or _on_hub(data.train):
        return None
    return Source()


def _rates(made: Plan, known: Known, calibrate: bool, warnings: list[Problem]) -> Calibration | None:
    """What was measured on this machine, now or before; a calibration that fails is a warning."""
    if (asked := rates.request(made, known)) is None:
        return None
    if calibrate:
        found = rates.calibrate(asked, rates.range_of(made))
        if isinstance(found, Calibration):
            return found
        warnings.append(found)
    return rates.kept(asked)


def _on_hub(path: str) -> bool:
    return not os.path.exists(path) and re.fullmatch(places.HUB_ID, path) is not None


def _unread(wanted: Recipe) -> Iterator[Problem]:
    if _on_hub(wanted.data.train):
        what = f"data.train: {wanted.data.train} is on the Hub, which `sft check` does not ask: nothing is counted."
        yield Problem(what, "`sft train` fetches it.", key=("data", "train"))


def _new(found: Sequence[Problem], draft: Draft) -> list[Problem]:
    """What the recipe's own check has not told: it knows paths that lead nowhere, and the settings it left out."""
    blamed = {one.key[:2] for one in draft.problems if one.key}
    return [
        one
        for one in found
        if not (one.file is not None and draft.problems and not os.path.exists(one.file))
        and not (one.file is None and one.key[:2] in blamed)
    ]


def _top(wanted: Recipe) -> int | None:
    return None if wanted.lora.layers == "all" else wanted.lora.layers.top


# what it amounts to


def _facts(made: Plan, known: Known) -> Iterator[Fact]:
    for section, found in (("Examples", _examples), ("Training", _training), ("What the split can decide", _decides)):
        yield from (replace(fact, section=section) for fact in found(made, known))


def _examples(made: Plan, known: Known) -> Iterator[Fact]:
    split, epoch = made.split, made.epochs.order(0)
    drawn = f"drawn with seed {split.seed}" if split.held_out else "nothing is held out"
    twins = f"; {len(split.twins)} twins, only ever evaluated" if split.twins else ""
    counts = {"trained": len(split.train), "held_out": len(split.held_out)}
    yield Fact("examples", counts, f"{len(split.train)} + {len(split.held_out)}", f"trained + held out, {drawn}{twins}")
    about = "" if known.counted else "~"
    why = (
        "" if known.counted else f"; estimated at {bases.CHARACTERS} characters a token, for its tokenizer is not here"
    )
    raw = sum(len(made.vocabulary.tokenizer.encode(t.text).ids) for name in split.train for t in _turns(made, name))
    yield Fact("as written", raw, f"{about}{raw:,} tokens", f"the words of all trained examples{why}")
    rendered, supervised = sum(len(item.ids) for item in epoch), sum(item.supervised for item in epoch)
    formats = f"in {len(made.recipe.formats.train)} formats, {made.recipe.formats.draw.replace('_', ' ')}"
    yield Fact("an epoch", rendered, f"{about}{rendered:,} tokens", f"the same {formats}")
    share = supervised / rendered
    yield Fact("in the loss", supervised, f"{about}{supervised:,} tokens", f"{share:.0%}: answers and what ends them")
    longest = max((*made.texts.trained.values(), *made.texts.held_out.values()), key=lambda item: len(item.ids))
    what = f"{longest.example} in {longest.format}; data.max_tokens is {made.recipe.data.max_tokens:,}"
    if made.recipe.formats.sampled:
        what += f"; up to {made.longest():,} in a sampled format"
    yield Fact("longest", len(longest.ids), f"{about}{len(longest.ids):,} tokens", what)
    if not known.counted:
        yield Fact("to count", known.remedy, "exactly", f"fetch the tokenizer alone: `{known.remedy}`")


def _turns(made: Plan, name: str) -> Iterator[Any]:
    yield from made.conversations[name].turns


def _training(made: Plan, known: Known) -> Iterator[Fact]:
    length, optimizer = made.length, made.recipe.optimizer
    texts = f"{made.epochs.size} texts at batch size {made.recipe.batch_size}"
    why = f"{length.per_epoch:,} an epoch ({texts}) x {made.recipe.epochs:,} epochs"
    yield Fact("steps", length.total, f"{length.total:,}", why)
    way = f"learning rate {optimizer.learning_rate:.3g} x steps, {optimizer.schedule}: no weight moves much further"
    start = f"; lora_A starts within ±{1 / math.sqrt(known.shape.hidden):.3g}" if known.shape else ""
    yield Fact("travel", made.travel, f"{made.travel:.3g}", way + start)
    gentle, harsh = (
        made.travel / estimate.travel(rate, "constant", Length(length.per_epoch, length.per_epoch * epochs))
        for rate, epochs in (_GENTLE, _HARSH)
    )
    why = "MiniSymposium's gentle run (1e-7, 600 epochs), its overfit one (1e-6, 100), at as many steps an epoch"
    ratio = {"gentle": gentle, "overfit": harsh}
    yield Fact("travel beside", ratio, f"{gentle:.3g} x, {harsh:.3g} x", why)
    yield Fact("looks", _look_epochs(made), f"{len(made.looks.light) + len(made.looks.full)}", _looks(made))
    yield from _sizes(made, known)


def _look_epochs(made: Plan) -> dict[str, list[int]]:
    return {"light": list(made.looks.light), "full": list(made.looks.full)}


def _looks(made: Plan) -> str:
    return f"{made.looks.reason}; full ones at epoch {', '.join(map(str, made.looks.full))}"


def _sizes(made: Plan, known: Known) -> Iterator[Fact]:
    """Parameters against tokens in the loss, the base's and the adapter's."""
    if known.shape is None:
        remedy = "it is not of Llama's shape" if known.cached else f"`hf download {known.name} config.json` tells"
        yield Fact("base", None, "unknown", f"neither its size nor GiB can be told: {remedy}")
        return
    supervised = sum(item.supervised for item in made.epochs.order(0))
    weights, lora = known.shape.weights, made.recipe.lora
    ratio = f"{memory.short(weights / supervised)} for each token in the loss"
    yield Fact("base", weights, f"{memory.short(weights)} weights", f"{ratio}; by {known.shape_from}")
    layers = _top(made.recipe) or known.shape.layers
    adapter = memory.adapter_weights(known.shape, lora.rank, lora.targets, layers)
    where = f"rank {lora.rank} on {len(lora.targets)} matrices of {layers} layers"
    ratio = f"{memory.short(adapter / supervised)} for each token in the loss"
    yield Fact("adapter", adapter, f"{memory.short(adapter)} weights", f"{where}; {ratio}")


def _decides(made: Plan, known: Known) -> Iterator[Fact]:
    """What so many held-out examples can show, 95 % one-sided, by standard formulas."""
    n = len(made.split.held_out)
    if n == 0:
        yield Fact("nothing", None, "nothing", "without held-out examples learning cannot be told from reciting")
        return
    never, some, least = estimate.none_seen(n), estimate.paired_change(n), estimate.must_improve(n)
    why = "of all cases may show what none of the held-out examples does (Clopper-Pearson, 95 %)"
    yield Fact(f"0 of {n}", never, f"up to {never:.0%}", why)
    if some is not None:
        why = "standard deviations of the paired differences: the smallest mean change told from none (t, 95 %)"
        yield Fact("a change", some, f"{some:.2f}", why)
    shown, why = (f"{least} of {n}", "examples must improve to rule out luck, whatever the law (sign test, 95 %)")
    if least is None:
        shown, why = "never", f"not even {n} of {n} that improve would rule out luck (sign test, 95 %)"
    yield Fact("a gain", least, shown, why)
    if min(n, len(made.split.train)) < lint.RESOLVED:
        why = f"below {lint.RESOLVED} on either side a good verdict is `underpowered`"
        yield Fact("verdict", "underpowered", "too few", why)
