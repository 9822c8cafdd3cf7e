"""What a night will cost: GiB line by line, disk, download, minutes, each with its reason.

Estimates, and labelled so, unless a run on this machine measured the same base. It asks no GPU and no network.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import machine, memory, recipe
from finetune.bases import Known
from finetune.errors import Problem, UserError
from finetune.estimate import layers_below
from finetune.memory import GIB, Load, gib
from finetune.plan import Plan
from finetune.runs import RunFolder

MEMORY = "Memory (estimate, not measured on a GPU)"
_HOST = 2.5  # GiB of Python, torch and its CUDA libraries, once loaded: a guess
_CARD, _CPU = 20e12, 25e9  # FLOP/s that a consumer card, and two cores, may reach with small batches: guesses
_SMALL = 1e8  # weights below which a CPU is enough
_RECENT = 200  # steps of an earlier run that are averaged
_TAIL = 2**18  # bytes at the end of metrics.jsonl in which they are looked for
_TIGHT = 0.92  # share of a card above which an estimate may well be wrong


@dataclass(frozen=True)
class Fact:
    """One number told to the user: as JSON, in words, and why it is so."""

    name: str
    value: Any
    shown: str
    reason: str
    section: str = ""


def cost_facts(made: Plan, known: Known, room: float | None) -> tuple[list[Fact], list[Problem]]:
    """All costs, and what would not fit. `room`: GiB of the card the run is meant for."""
    problems: list[Problem] = []
    facts = [replace(fact, section=MEMORY) for fact in _memory(made, known, room, problems)]
    facts += [replace(fact, section="Disk and time") for fact in (*_disk(made, known), *_minutes(made, known))]
    return facts, problems


def _load(made: Plan, known: Known, checkpointing: bool) -> Load | None:
    if known.shape is None:
        return None
    wanted = made.recipe
    layers = known.shape.layers if wanted.lora.layers == "all" else wanted.lora.layers.top
    adapter = memory.adapter_weights(known.shape, wanted.lora.rank, wanted.lora.targets, layers)
    tokens = made.largest()
    noise, top = wanted.regularise.stochastic_depth, None if wanted.lora.layers == "all" else layers
    below = layers_below(known.shape.layers, top, noise, wanted.machine.prefix_gib)
    return Load(known.shape, wanted.quantization, adapter, layers, wanted.optimizer.name, tokens, checkpointing, below)


def _memory(made: Plan, known: Known, room: float | None, problems: list[Problem]) -> Iterator[Fact]:
    kept, again = _load(made, known, False), _load(made, known, True)
    if kept is None or again is None:
        yield Fact("GPU", None, "unknown", "the base's shape is not known here")
        return
    lines = {one.name: one for one in memory.bill(kept)}
    lean = {one.name: one for one in memory.bill(again)}["activations"]
    for line in lines.values():
        yield Fact(line.name, line.gib, gib(line.gib), line.reason)
        if line.name == "activations":
            yield Fact("  checkpointed", lean.gib, gib(lean.gib), f"instead, if computed twice: {lean.reason}")
    whole = sum(line.gib for line in lines.values())
    least = whole - lines["activations"].gib + lean.gib
    yield _total(made, whole, least)
    if kept.below:
        back = memory.lower_layers(kept)
        why = f"{kept.below} lower layers, their work done once, come back to the device while an answer is written"
        yield Fact("  generating", back, f"+ {gib(back)}", why)
    if room is not None:
        yield _against(made, room, (whole, least), kept, problems)
    have = machine.memory_gib()
    host = _HOST + 4.0 * kept.adapter / GIB
    there = "" if have is None else f"; this computer has {gib(have)}"
    yield Fact("host", host, gib(host), f"Python, torch and a copy of the adapter: a guess{there}")


def _total(made: Plan, whole: float, least: float) -> Fact:
    asked = made.recipe.machine.activation_checkpointing
    both = {"plain": whole, "checkpointed": least}
    if asked == "auto":
        why = f"or {gib(least)} with activation checkpointing; auto decides by the free memory when it starts"
        return Fact("total", both, gib(whole), why)
    why = f"machine.activation_checkpointing is {str(asked).lower()}; {gib(whole if asked else least)} otherwise"
    return Fact("total", both, gib(least if asked else whole), why)


def _against(made: Plan, room: float, totals: tuple[float, float], load: Load, problems: list[Problem]) -> Fact:
    """The total against a card; a problem where it would not fit."""
    asked = made.recipe.machine.activation_checkpointing
    lines = {line.name: line.gib for line in memory.bill(load)}
    free = room - lines["base"] - lines["embeddings, head"] - lines["adapter"]
    tokens = made.largest()
    again = memory.guessed_checkpointing(load.shape, tokens, free) if asked == "auto" else asked
    need = totals[1] if again else totals[0]
    how = f"{gib(need)} {'with' if again else 'without'} activation checkpointing" + (
        ", as auto would decide" if asked == "auto" else ""
    )
    if need > room:
        what = f"{room:g} GiB of GPU memory would not do: about {how} (an estimate)."
        remedy = f"Try {', '.join(_savings(made, again))}, or a larger card."
        problems.append(Problem(what, remedy, key=("machine",)))
        return Fact("against", False, f"{room:g} GiB", f"too small: {how}")
    fit = "fits, though not by much" if need > _TIGHT * room else "fits"
    return Fact("against", True, f"{room:g} GiB", f"{fit}: {how}")


def _savings(made: Plan, again: bool) -> Iterator[str]:
    """Settings that would save memory, the cheapest first."""
    wanted = made.recipe
    if not again:
        yield "machine.activation_checkpointing: true"
    if made.largest() > made.longest():
        yield "machine.micro_batch: 1"
    if wanted.quantization != "nf4":
        yield "quantization: nf4"
    if wanted.optimizer.name == "adamw" and wanted.lora.rank > 32:
        yield "optimizer.name: paged_adamw_8bit"
    yield "shorter examples"
    if wanted.lora.layers == "all":
        yield "lora.layers: {top: 8}"


def _disk(made: Plan, known: Known) -> Iterator[Fact]:
    limit = made.recipe.watch.keep.max_gib
    if (load := _load(made, known, False)) is not None:
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
    size, limit = memory.prefix(load, sum(len(item.ids) for item in items)), made.recipe.machine.prefix_gib
    why = f"{len(items)} texts below layer {load.below}, computed once and kept between runs"
    over = (
        f"; more than machine.prefix_gib {limit:g}: the rest is computed whenever it is needed" if size > limit else ""
    )
    return Fact("stored activations", size, gib(min(size, limit)), why + over)


# time


def _minutes(made: Plan, known: Known) -> Iterator[Fact]:
    """Of training alone, by an earlier run here if there is one."""
    tokens = sum(len(item.ids) for item in made.epochs.order(0)) * made.recipe.epochs
    looks = "; looks are not in it"
    if found := measured(made.recipe):
        run, rate = found
        why = f"{tokens:,} tokens at {rate:,.0f} a second, measured in {run}{looks}"
        yield Fact("time", tokens / rate / 60, _time(tokens / rate / 60), why)
    elif (load := _load(made, known, True)) is None:
        yield Fact("time", None, "unknown", "no run on this machine has measured it yet")
    else:
        small = load.shape.weights < _SMALL
        again = not small and made.recipe.machine.activation_checkpointing is not False
        seconds = memory.training_flops(replace(load, checkpointing=again), tokens) / (_CPU if small else _CARD)
        at = f"{_CPU / 1e9:g} GFLOP/s, two CPU cores" if small else f"{_CARD / 1e12:g} TFLOP/s, a consumer card"
        yield Fact("time", seconds / 60, f"~ {_time(seconds / 60)}", f"a guess: {tokens:,} tokens at {at}{looks}")


def _time(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} hours"


def measured(wanted: recipe.Recipe, shelf: Path = Path("runs")) -> tuple[Path, float] | None:
    """The newest run below `shelf` that trained the same base in the same way, and its tokens a second; or None."""
    folders = [one.parent for one in shelf.glob("*/metrics.jsonl")]
    for folder in sorted(folders, key=lambda one: one.stat().st_mtime, reverse=True):
        run = RunFolder(folder)
        try:
            was = recipe.load_resolved(run.recipe)
        except UserError:
            continue
        if _way(was) == _way(wanted) and (rate := _rate(run.metrics)) is not None:
            return folder, rate
    return None


def _way(one: recipe.Recipe) -> tuple[Any, ...]:
    """What decides how fast a step is, beside the texts."""
    return one.base, one.quantization, one.lora.layers, one.batch_size, one.machine.activation_checkpointing


def _rate(metrics: Path) -> float | None:
    """Median tokens a second of the last steps; the first of a process is slow, and no step is typical."""
    with metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = file.read().splitlines()[1:]
    rates = []
    for line in lines:
        try:
            row = json.loads(line)
            if row["kind"] == "step" and row["seconds"] > 0:
                rates.append(row["tokens"] / row["seconds"])
        except (ValueError, KeyError, TypeError):  # a torn line, or another program's
            continue
    return statistics.median(rates[-_RECENT:]) if rates else None
