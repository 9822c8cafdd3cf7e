"""A base made ready to be trained: whole, or only the trained layers, with what lies below them done once.

It loads, attaches and fills; it trains nothing and writes one line of run.json: what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from finetune import bases, ledger, lots, memory, model, prefix, runs, slices, train
from finetune.estimate import layers_below
from finetune.machine import Derived
from finetune.plan import Plan
from finetune.recipe import Recipe
from finetune.runs import RunFolder
from finetune.speak import Speaker

_AHEAD = 20  # epochs, at most


@dataclass(frozen=True)
class Loaded:
    """A model ready to be trained, what it belongs to, and who speaks with it."""

    model: Any
    start: model.Start
    base: model.Base
    speaker: Speaker
    prefix: prefix.Prefix | None = None  # what stands in the lower layers' place


def load(
    run: RunFolder, made: Plan, base: model.Base, besides: Iterable[prefix.Ids], tell: Callable[[str], object]
) -> Loaded:
    """Load what a recipe asks for. `besides`: texts that are read at looks and not in the plan."""
    wanted = made.recipe
    below = layers_below(slices.layer_count(base.folder), _top(wanted), _noise(wanted), wanted.machine.prefix_gib)
    short = _shortened(run, made, base, below, besides, tell) if below else None
    bare = short.model if short else model.load_base(base.folder, wanted.quantization, model.pick_device())
    lora = wanted.lora
    shape = model.LoraShape(lora.rank, lora.alpha, lora.dropout, lora.targets, _top(wanted))
    adapted = model.attach(bare, shape, wanted.seed)
    if _noise(wanted):
        train.add_stochastic_depth(adapted, _noise(wanted))
    speaker = Speaker(adapted, made.vocabulary.tokenizer, made.vocabulary.eos_id)
    if short:
        speaker.whole = short.whole
    return Loaded(adapted, model.Start(adapted), base, speaker, short.prefix if short else None)


def _top(wanted: Recipe) -> int | None:
    return None if wanted.lora.layers == "all" else wanted.lora.layers.top


def _noise(wanted: Recipe) -> float:
    return wanted.regularise.stochastic_depth


def _shortened(
    run: RunFolder,
    made: Plan,
    base: model.Base,
    below: int,
    besides: Iterable[prefix.Ids],
    tell: Callable[[str], object],
) -> prefix.Shortened:
    """The upper layers alone, and what the lower ones make of every known text."""
    tell(f"Computing what the {below} lower layers make of every text, once; nobody trains them.")
    source = prefix.Source(base.folder, made.recipe.quantization, model.pick_device(), below)
    short = prefix.load(source, made.recipe.machine.prefix_gib)
    texts = made.texts
    items = (*texts.whole.values(), *texts.held_out.values(), *texts.twins.values(), *texts.replay)
    filled = short.prefix.fill([prefix.PROOF, *(item.ids for item in items), *besides])
    why = f"{filled.texts} texts, {filled.computed} computed in {filled.seconds:.0f} s, {filled.kept} kept on the disk"
    known = runs.read_json(run.run_json)["derived"]
    run.record(derived={**known, "stored_activations_gib": Derived(filled.gib, why)})
    return short


def ahead(made: Plan, loaded: Loaded) -> Callable[[int], None]:
    """To be told that an epoch begins: the lower layers then do what is not stored of it and the next ones, in one go.

    Those are texts in drawn formats, another one each time, and what `machine.prefix_gib` has no room for.
    """
    lower, last, held = loaded.prefix, -(-made.length.total // made.length.per_epoch), 0

    def begin(epoch: int) -> None:
        nonlocal held
        if lower is None or epoch < held:
            return
        reached = epoch

        def coming() -> Iterator[prefix.Ids]:
            nonlocal reached
            for reached in range(epoch, min(epoch + _AHEAD, last)):
                yield from (item.ids for item in made.epochs.order(reached))
            reached += 1

        lower.ahead(coming())
        held = max(reached, epoch + 1)

    return begin


def twice(made: Plan, loaded: Loaded) -> Callable[[int], int]:
    """How many layers' activations are computed twice, by the tokens of a micro-batch.

    None on a CPU, unless the recipe says so. On CUDA `auto` takes as few as fit what is free once the base is there,
    by the bill that `sft check` shows; of an unknown shape none, until memory runs out.
    """
    asked, layers = made.recipe.machine.activation_checkpointing, len(model.trained_layers(loaded.model))
    shape = bases.shape_in(loaded.base.folder)
    if asked != "auto" or shape is None or not torch.cuda.is_available():
        return lambda _tokens: layers if asked is True else 0
    load = ledger.load_of(made, shape)
    torch.cuda.empty_cache()
    room = memory.standing(load) + lots.free(model.pick_device()) / memory.GIB  # with what torch holds and does not use
    return cache(lambda tokens: memory.recomputed(replace(load, tokens=tokens), room))
