"""What a night will cost: GiB line by line, disk, download, minutes, each with its reason.

Estimates, and labelled so, unless a run on this machine measured the same base. It asks no GPU and no network.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from finetune import burden, earlier, machine, memory, rates
from finetune.bases import Known
from finetune.earlier import Earlier
from finetune.errors import Problem
from finetune.estimate import layers_below
from finetune.memory import GIB, Load, Shape, gib
from finetune.plan import Plan
from finetune.rates import Calibration, Work

MEMORY = "Memory (estimate, not measured on a GPU)"
_HOST = 2.5  # GiB of Python, torch and its CUDA libraries, once loaded: a guess
_CARD, _CPU = 20e12, 25e9  # FLOP/s that a consumer card, and two cores, may reach with small batches: guesses
_SMALL = 1e8  # weights below which a CPU is enough
_FEW = 8  # layers that are offered where all are trained
_LOOKS = "the base's included; more if examples begin to echo"
_TIGHT = 0.92  # share of a card above which an estimate may well be wrong


@dataclass(frozen=True)
class Fact:
    """One number told to the user: as JSON, in words, and why it is so."""

    name: str
    value: Any
    shown: str
    reason: str
    section: str = ""


def cost_facts(
    made: Plan, known: Known, room: float | None, found: Calibration | None = None
) -> tuple[list[Fact], list[Problem]]:
    """All costs, and what would not fit. `room`: GiB of the card the run is meant for; `found`: measured here."""
    problems: list[Problem] = []
    facts = [replace(fact, section=MEMORY) for fact in _memory(made, known, room, found, problems)]
    costs = (*_disk(made, known), *_minutes(made, known, room, found))
    return [*facts, *(replace(fact, section="Disk and time") for fact in costs)], problems


def load_of(made: Plan, shape: Shape, found: Calibration | None = None) -> Load:
    """What a plan puts on a GPU, no layer computed twice. `found`: measured here."""
    wanted = made.recipe
    layers = shape.layers if wanted.lora.layers == "all" else wanted.lora.layers.top
    return Load(
        shape,
        wanted.quantization,
        memory.adapter_weights(shape, wanted.lora.rank, wanted.lora.targets, layers),
        layers,
        wanted.optimizer.name,
        made.largest(),
        0,
        _below(made, shape.layers, layers),
        wanted.lora.targets,
        made.largest() < wanted.batch_size * made.longest(),
        (found.a_layer if found else 0) or None,
    )


def _below(made: Plan, layers: int, trained: int) -> int:
    wanted = made.recipe
    return layers_below(layers, trained, wanted.regularise.stochastic_depth, wanted.machine.prefix_gib)


def _memory(
    made: Plan, known: Known, room: float | None, found: Calibration | None, problems: list[Problem]
) -> Iterator[Fact]:
    if known.shape is None:
        yield Fact("GPU", None, "unknown", "the base's shape is not known here")
        return
    kept = load_of(made, known.shape, found)
    again = replace(kept, recomputed=kept.layers)
    lean = {one.name: one for one in memory.bill(again)}["activations"]
    for line in memory.bill(kept):
        told = f"; {kept.a_layer:,.0f} bytes a token and layer, counted by the calibration" if kept.a_layer else ""
        yield Fact(line.name, line.gib, gib(line.gib), line.reason + (told if line.name == "activations" else ""))
        if line.name == "activations":
            yield Fact("  checkpointed", lean.gib, gib(lean.gib), f"instead, if computed twice: {lean.reason}")
    yield _total(made, memory.total(kept), memory.total(again))
    if kept.below:
        back = memory.lower_layers(kept)
        why = f"{kept.below} lower layers, their work done once, come back to the device while an answer is written"
        yield Fact("  generating", back, f"+ {gib(back)}", why)
    if room is not None:
        yield _against(made, room, replace(kept, recomputed=_computed_twice(made, kept, room)), problems)
    have = machine.memory_gib()
    host = _HOST + 4.0 * kept.adapter / GIB
    there = "" if have is None else f"; this computer has {gib(have)}"
    yield Fact("host", host, gib(host), f"Python, torch and a copy of the adapter: a guess{there}")


def _total(made: Plan, whole: float, least: float) -> Fact:
    asked = made.recipe.machine.activation_checkpointing
    both = {"plain": whole, "checkpointed": least}
    if asked == "auto":
        why = f"or {gib(least)} with activation checkpointing; auto takes as few layers as the free memory asks for"
        return Fact("total", both, gib(whole), why)
    why = f"machine.activation_checkpointing is {str(asked).lower()}; {gib(whole if asked else least)} otherwise"
    return Fact("total", both, gib(least if asked else whole), why)


def _computed_twice(made: Plan, load: Load, room: float) -> int:
    """How many layers are, on a card of so many GiB: as the recipe says, or as auto would decide."""
    asked = made.recipe.machine.activation_checkpointing
    counted = replace(load, a_layer=None)  # as training counts, whatever a calibration found here
    return memory.recomputed(counted, room) if asked == "auto" else load.layers if asked else 0


def _against(made: Plan, room: float, load: Load, problems: list[Problem]) -> Fact:
    """The total against a card; a problem where it would not fit."""
    need, asked = memory.total(load), made.recipe.machine.activation_checkpointing
    part = f" of {load.recomputed} of {load.layers} layers" if 0 < load.recomputed < load.layers else ""
    how = f"{gib(need)} {'with' if load.recomputed else 'without'} activation checkpointing{part}"
    how += ", as auto would decide" if asked == "auto" else ""
    if need > room:
        what = f"{room:g} GiB of GPU memory would not do: about {how} (an estimate)."
        problems.append(Problem(what, _remedy(made, load, room), key=("machine",)))
        return Fact("against", False, f"{room:g} GiB", f"too small: {how}")
    least = memory.total(replace(load, recomputed=load.layers)) if asked == "auto" else need
    fit = "fits, though not by much" if least > _TIGHT * room else "fits"
    return Fact("against", True, f"{room:g} GiB", f"{fit}: {how}")


def _remedy(made: Plan, load: Load, room: float) -> str:
    """Settings, each with what it saves once those before it are set, until that is enough."""
    told: list[str] = []
    need = memory.total(load)
    for words, less in savings(made, load):
        saved = need - (need := memory.total(less))
        if saved * 1024 >= 1:  # MiB
            told.append(f"{words} saves {gib(saved)}{' more' if told else ''}")
        if need <= room:
            return f"{', then '.join(told)}: enough, {gib(need)} are needed then."
    tried = ", then ".join(told) or "No setting helps"
    return f"{tried}: not enough, {gib(need)} are needed then. Take a larger card or a smaller base."


def savings(made: Plan, load: Load) -> Iterator[tuple[str, Load]]:
    """Settings that save memory, the cheapest first, and the load once it and those before it are set."""
    if load.recomputed < load.layers:
        yield "machine.activation_checkpointing: true", (load := replace(load, recomputed=load.layers))
    if made.largest() > made.longest():
        yield "machine.micro_batch: 1", (load := replace(load, tokens=made.longest(), accumulated=True))
    if load.optimizer == "adamw":
        yield "optimizer.name: paged_adamw_8bit", (load := replace(load, optimizer="paged_adamw_8bit"))
    if load.quantization != "nf4":
        yield "quantization: nf4", (load := replace(load, quantization="nf4", a_layer=None))
    if load.layers > _FEW:
        fewer = replace(load, layers=_FEW, recomputed=_FEW, adapter=load.adapter * _FEW // load.layers)
        below = _below(made, load.shape.layers, _FEW)
        yield f"lora.layers: {{top: {_FEW}}}", (load := replace(fewer, below=below))
    half = load.tokens // 2
    yield f"splitting examples of more than {half:,} tokens", replace(load, tokens=half)


def _disk(made: Plan, known: Known) -> Iterator[Fact]:
    limit = made.recipe.watch.keep.max_gib
    load = load_of(made, known.shape) if known.shape else None
    if load is not None:
        looks = len(made.looks.light) + len(made.looks.full)
        adapter = 4.0 * load.adapter / GIB
        state = next(line.gib for line in memory.bill(load) if line.name == "optimizer")
        wanted = (looks + 2) * adapter + 2 * state
        why = f"two checkpoints of {gib(adapter + state)}, and the adapter alone ({gib(adapter)}) at {looks} looks"
        if wanted > limit:
            why += f"; older ones go first to keep watch.keep.max_gib {limit:g}"
        free = shutil.disk_usage(os.getcwd()).free / GIB
        short = "; TOO LITTLE" if free < min(wanted, limit) else ""
        yield Fact("checkpoints", min(wanted, limit), gib(min(wanted, limit)), f"{why}; {free:,.0f} GiB free{short}")
    if load is not None and load.below:
        yield _prefix(made, load)
    shown = "unknown" if known.download is None else gib(known.download) if known.download else "nothing"
    yield Fact("download", known.download, shown, f"{known.name}, {known.download_from}")


def _prefix(made: Plan, load: Load) -> Fact:
    """Stored activations; sampled formats come on top, computed when they are drawn."""
    texts = made.texts
    items = [*texts.whole.values(), *texts.held_out.values(), *texts.twins.values(), *texts.replay]
    tokens = sum(len(item.ids) for item in items) + round(burden.besides(made, len(made.looks.full) + made.looks.alarm))
    size, limit = memory.prefix(load, tokens), made.recipe.machine.prefix_gib
    why = f"{len(items)} texts and those of looks below layer {load.below}, computed once and kept between runs"
    over = (
        f"; more than machine.prefix_gib {limit:g}: the rest is computed whenever it is needed" if size > limit else ""
    )
    return Fact("stored activations", size, gib(min(size, limit)), why + over)


# time


def _minutes(made: Plan, known: Known, room: float | None, found: Calibration | None) -> Iterator[Fact]:
    """By an earlier run here if there is one, else by a calibration, else a guess."""
    tokens = sum(len(item.ids) for item in made.epochs.order(0)) * made.recipe.epochs
    load = load_of(made, known.shape) if known.shape else None
    if run := earlier.newest(made.recipe, made.fingerprint()):
        by = rates.looking_seconds(made, _work(made, load, room, found), found) if load and found else None
        yield from _as_before(made, run, tokens, by)
    elif load is None:
        yield Fact("time", None, "unknown", "no run on this machine has measured it yet")
    elif found:
        yield from _calibrated(made, load, room, found)
    else:
        small = load.shape.weights < _SMALL
        again = not small and made.recipe.machine.activation_checkpointing is not False
        twice = _computed_twice(made, load, room) if room else load.layers if again else 0
        looks = memory.training_flops(replace(load, recomputed=0), rates.looking_worth(made)) / 2  # forward alone
        flops = memory.training_flops(replace(load, recomputed=twice), tokens) + looks
        seconds = flops / (_CPU if small else _CARD)
        at = f"{_CPU / 1e9:g} GFLOP/s, two CPU cores" if small else f"{_CARD / 1e12:g} TFLOP/s, a consumer card"
        why = f"a guess: {tokens:,} tokens and looks, at {at}; `sft check --calibrate` measures this machine"
        yield Fact("time", seconds / 60, f"~ {_time(seconds / 60)}", why)


def _as_before(made: Plan, run: Earlier, tokens: int, by: float | None) -> Iterator[Fact]:
    """By an earlier run: the steps; looks too if they were at the same texts, else by a calibration, else a guess."""
    training, rate = tokens / run.rate, f"{tokens:,} tokens at {run.rate:,.0f} a second"
    if (looking := rates.looking_as_before(made, run.looks)) is not None:
        why = _LOOKS
    elif by is not None:
        looking, why = by, f"by a calibration; {_LOOKS}"
    else:
        looking, why = rates.looking_worth(made) / run.rate / 2, f"a guess by what they read and write; {_LOOKS}"
    for name, seconds, reason in (
        ("time", training + looking, f"measured in {run.folder}"),
        ("  training", training, rate),
        ("  looks", looking, why),
    ):
        yield Fact(name, seconds / 60, _time(seconds / 60), reason)


def _work(made: Plan, load: Load, room: float | None, found: Calibration) -> Work:
    on_card = room or found.card_gib if found.card_gib else None  # on a CPU nothing is computed twice by itself
    asked = made.recipe.machine.activation_checkpointing
    again = load.layers if asked is True else 0 if on_card is None else _computed_twice(made, load, on_card)
    return Work(load.layers, load.shape.layers - load.layers - load.below, again, load.below)


def _calibrated(made: Plan, load: Load, room: float | None, found: Calibration) -> Iterator[Fact]:
    """Of the whole night, and its parts."""
    work = _work(made, load, room, found)
    parts = {
        "training": rates.training_seconds(made, work, found) / 60,
        "looks": rates.looking_seconds(made, work, found) / 60,
        "lower layers": rates.filling_seconds(made, work, found) / 60,
    }
    why = f"by a calibration of {found.took:.0f} s on this machine, at {', '.join(map(str, found.tokens))} tokens"
    if room and not found.card_gib:
        why += ", its processor and not that card"
    if max(rates.range_of(made)) > found.tokens[-1]:
        why += "; longer ones by their slope"
    yield Fact("time", sum(parts.values()), _time(sum(parts.values())), why)
    reasons = {
        "training": f"{made.length.total:,} steps" + (f", {work.again} layers computed twice" if work.again else ""),
        "looks": _LOOKS,
        "lower layers": f"{load.below} of them, once for each text; for one in a drawn format when its turn comes",
    }
    for name, minutes in parts.items():
        if minutes:
            yield Fact(f"  {name}", minutes, _time(minutes), reasons[name])


def _time(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} hours"
