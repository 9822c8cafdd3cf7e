"""Whatever `sft eval` is asked about, made alike: a run with its kept adapters, or one adapter made elsewhere.

It opens, loads and changes adapters. It measures nothing, and writes only the folder that an adapter from elsewhere
is examined in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import corpus, foreign, model, opened, plan, recipe, runs
from finetune.errors import UserError, refuse
from finetune.evidence import Setting
from finetune.foreign import Adapter
from finetune.looks import Place
from finetune.opened import Opened, Worn
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.speak import Speaker

ALONE = 1  # the step under which an adapter without a run is written down; 0 is the base


@dataclass(frozen=True)
class Subject:
    """`adapters`: folders by step, all that can be worn. `adapter`: the one made elsewhere, None for a run."""

    opened: Opened
    adapters: Mapping[int, Path]
    adapter: Adapter | None = None
    remarks: tuple[str, ...] = ()

    @property
    def run(self) -> RunFolder:
        """The folder that results go into."""
        return self.opened.run

    @property
    def plan(self) -> Plan:
        """Examples, formats and tokens."""
        return self.opened.plan

    @property
    def elsewhere(self) -> bool:
        """Whether it is unknown what was trained on."""
        return self.adapter is not None

    @property
    def unfinished(self) -> bool:
        """Whether more looks will come."""
        return not self.elsewhere and self.opened.facts.get("state") != "finished"

    @property
    def step(self) -> int:
        """Of the chosen adapter."""
        if self.elsewhere:
            return ALONE
        assert self.opened.chosen is not None  # `of` has refused a run without one
        return self.opened.chosen

    @property
    def setting(self) -> Setting:
        """How its rows are read."""
        held_out = self.opened.recipe.formats.held_out
        return Setting(self.plan.first_format, tuple(held_out), self.elsewhere, self.unfinished)

    def place(self, step: int) -> Place:
        """Where a closing measurement stands; epoch and travel are 0 where nobody knows them."""
        if self.elsewhere:
            return Place("closing", step, 0.0, 0.0)
        rows = runs.read_lines(self.run.metrics)
        travel = next((row["travel"] for row in rows if row["step"] == step and row.get("travel") is not None), 0.0)
        return Place("closing", step, self.opened.epoch(step), float(travel))

    def wear(self) -> Worn:
        """Load the base with the chosen adapter."""
        if self.adapter is None:
            return opened.wear(self.opened, self.adapters[self.step])
        model.spare_a_core()
        bare = model.load_base(self.opened.base.folder, self.opened.recipe.quantization, model.pick_device())
        net = foreign.wear(bare, self.adapter)
        return Worn(net, Speaker(net, self.plan.vocabulary.tokenizer, self.plan.vocabulary.eos_id))


def of(target: str, recipe_file: Path | None = None, out: Path | None = None) -> Subject:
    """What a user named: a run's folder, or with a recipe an adapter's folder or Hub id. Errors: UserError."""
    place = Path(target)
    if (place / "run.json").is_file():
        if recipe_file is not None or out is not None:
            raise refuse(f"{target} is a run and has a recipe of its own.", "Leave out --recipe and --out.")
        return _of_run(place)
    if (place / "eval.json").is_file():
        was = runs.read_json(place / "eval.json")
        again = f"sft eval {was.get('of')} --recipe {was.get('recipe')}"
        raise refuse(f"{target} holds what was found of {was.get('of')}.", f"To measure it again: {again}")
    if (home := _home(place)) is not None and recipe_file is None:
        raise refuse(f"{target} is an adapter of the run {home}.", f"`sft eval {home}` examines the whole run.")
    if place.exists() and not (place / model.ADAPTER_CONFIG).is_file():
        raise refuse(f"{target} is neither a run nor an adapter.", "Name a folder that `sft train` or PEFT wrote.")
    if recipe_file is None:
        _refuse_nowhere(target)
        what = f"{target} is no run, so it is not known what it should have learnt."
        raise refuse(what, "Add --recipe with its base, data and formats.")
    return _of_adapter(foreign.find(target), recipe_file, out)


def _home(place: Path) -> Path | None:
    """The run that an adapter's folder lies in."""
    return next((one for one in (place.parent, place.parent.parent) if (one / "run.json").is_file()), None)


def _refuse_nowhere(target: str) -> None:
    if not Path(target).exists() and not foreign.is_hub_id(target):
        raise refuse(f"{target} is not there.", "`sft ls runs` lists what was trained here.")


def _of_run(place: Path) -> Subject:
    found = opened.read(place)
    kept = dict(found.kept())
    step = found.chosen
    installed = found.adapter
    if changed := _changed(found):
        what = f"the {changed} changed since this run was trained."
        raise refuse(
            what, "Restore what was there: reciting is measured against the very words, and beside the base.", place
        )
    return Subject(found, kept if step in kept or step is None else {**kept, step: installed})


def _changed(found: Opened) -> str | None:
    """What is no longer as it was when the run began."""
    was = found.facts.get("fingerprints", {})
    now = {
        "dataset": lambda: corpus.fingerprint(found.plan.conversations.values()),
        "base": lambda: model.fingerprint(found.base.folder),
        "rendered texts": found.plan.fingerprint,
    }
    return next((name for name, mark in now.items() if name in was and was[name] != mark()), None)


def _of_adapter(adapter: Adapter, recipe_file: Path, out: Path | None) -> Subject:
    wanted = recipe.load(recipe_file)
    run = RunFolder(out or Path("runs") / f"eval-{adapter.name}")
    facts = {"of": adapter.of, "recipe": str(recipe_file), "fingerprint": recipe.fingerprint(wanted)}
    _refuse_taken(run, facts)
    try:
        base = model.find_base(wanted.base, wanted.revision)
        made = plan.make(wanted, base.folder, everything=True, online=True)
    except UserError as error:
        raise UserError(recipe.placed(error.problems, recipe_file)) from None
    remarks = tuple(adapter.remarks(wanted.base))
    return Subject(Opened(run, wanted, made, base, facts), {ALONE: adapter.folder}, adapter, remarks)


def _refuse_taken(run: RunFolder, facts: Mapping[str, Any]) -> None:
    """Results go into a new folder, or over those of the same adapter."""
    path, mark = run.path, run.path / "eval.json"
    if path.is_dir() and not any(one for one in path.iterdir() if not one.name.startswith(".")):
        return
    if path.exists() and not mark.is_file():
        raise refuse("is there already, and holds something else.", "Name another folder with --out.", path)
    if mark.is_file() and runs.read_json(mark).get("of") != facts["of"]:
        raise refuse("holds what was found of another adapter.", "Name another folder with --out.", path)


def begin(subject: Subject) -> None:
    """Write down what is examined, under the lock; rows of other texts, or of another recipe, are dropped."""
    if not subject.elsewhere:
        return
    run, mark = subject.run, subject.run.path / "eval.json"
    facts = {**subject.opened.facts, "rendered texts": subject.plan.fingerprint()}
    if mark.is_file() and runs.read_json(mark) != facts:
        for path in (*run.line_files, run.tokens_at(0), run.tokens_at(ALONE), run.verdict):
            path.unlink(missing_ok=True)
    runs.write_atomic(run.recipe, recipe.resolved_yaml(subject.opened.recipe))
    runs.write_json(mark, facts)
