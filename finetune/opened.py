"""A run opened again: its recipe, plan and base, and the model wearing any adapter that was kept.

For whatever looks at a run after training. It trains nothing, judges nothing and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import model, plan, recipe, runs, selfreplay
from finetune.corpus import Split
from finetune.errors import refuse
from finetune.plan import Plan
from finetune.recipe import Recipe
from finetune.runs import RunFolder
from finetune.speak import Speaker


@dataclass(frozen=True)
class Opened:
    """A run without its weights. `facts`: run.json."""

    run: RunFolder
    recipe: Recipe
    plan: Plan
    base: model.Base
    facts: Mapping[str, Any]

    @property
    def chosen(self) -> int | None:
        """Step of the adapter in `adapter/`, or None where no look was taken yet."""
        known = self.facts.get("chosen")
        return None if known is None else int(known["step"])

    @property
    def adapter(self) -> Path:
        """The chosen adapter's folder. Errors: UserError where there is none yet, or where it was deleted."""
        if self.chosen is None:
            raise refuse("has no adapter yet: it stopped before its first look.", "Let it go on.", self.run.path)
        if not self.run.adapter.is_dir():
            kept = dict(self.kept()).get(self.chosen)
            remedy = f"Copy {kept} to that place." if kept else "Train again, with --fresh."
            raise refuse("is gone: the run's adapter was deleted or moved.", remedy, self.run.adapter)
        return self.run.adapter

    def epoch(self, step: int) -> float:
        """Of a step."""
        return step / self.plan.length.per_epoch

    def kept(self) -> Iterator[tuple[int, Path]]:
        """(step, folder) of every adapter that was kept, oldest first."""
        yield from sorted((one.step, one.folder) for one in self.run.checkpoints(verify=False))


def read(path: Path | str) -> Opened:
    """Open a run folder. Errors: UserError where it is none, or where its dataset changed since it began."""
    run = RunFolder(path)
    if not run.run_json.is_file():
        raise refuse("is no run.", "Name a folder that `sft train` wrote, such as runs/quickstart.", run.path)
    facts = runs.read_json(run.run_json)
    wanted = recipe.load_resolved(run.recipe)
    base = model.find_base(wanted.base, facts.get("commit") or wanted.revision, online=False)
    split = Split.from_json(runs.read_json(run.split))
    made = plan.make(wanted, base.folder, split, online=True)
    own = run.path / selfreplay.NAME
    if wanted.regularise.self_replay and own.is_file():
        made = selfreplay.mixed(made, own)  # its steps are more than the examples alone would make
    return Opened(run, wanted, made, base, facts)


@dataclass(frozen=True)
class Worn:
    """A loaded model that wears one adapter at a time; `speaker` speaks with it, or with the base alone."""

    model: Any
    speaker: Speaker

    def change(self, adapter: Path) -> None:
        """Wear another adapter of the same shape. Errors: UserError."""
        model.read_weights(self.model, adapter)


def wear(opened: Opened, adapter: Path | None = None) -> Worn:
    """Load the base as it was trained on, with one adapter: the chosen one unless another folder is named."""
    adapter = adapter or opened.adapter
    wanted = opened.recipe
    model.spare_a_core()
    bare = model.load_base(opened.base.folder, wanted.quantization, model.pick_device())
    top = None if wanted.lora.layers == "all" else wanted.lora.layers.top
    shape = model.LoraShape(wanted.lora.rank, wanted.lora.alpha, wanted.lora.dropout, wanted.lora.targets, top)
    adapted = model.attach(bare, shape, wanted.seed).eval()
    worn = Worn(adapted, Speaker(adapted, opened.plan.vocabulary.tokenizer, opened.plan.vocabulary.eos_id))
    worn.change(adapter)
    return worn
