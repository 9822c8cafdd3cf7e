"""What `sft train` was asked to do: a new run, one to go on with, one to take further, one to refit. No torch.

It reads a recipe or a run folder and decides which of the four it is; it begins nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import recipe, rules, runs
from finetune.errors import Problem, UserError, refuse
from finetune.recipe import Recipe
from finetune.runs import RunFolder


@dataclass(frozen=True)
class Order:
    """The words of the command."""

    target: str
    sets: tuple[str, ...] = ()
    out: Path | None = None
    fresh: bool = False
    more: int = 0
    refit: bool = False


@dataclass(frozen=True)
class Task:
    """A run about to begin or to go on. `steps`: where a refit ends, None for the recipe's own epochs."""

    run: RunFolder
    recipe: Recipe
    source: bytes
    going_on: bool
    parent: Path | None = None
    steps: int | None = None

    def is_finished(self) -> bool:
        """Whether nothing is left to train."""
        if not self.going_on:
            return False
        facts = runs.read_json(self.run.run_json)
        if facts["state"] != "finished":
            return False
        if (verdict := facts.get("stopped_by")) and verdict in rules.STOPS[self.recipe.watch.stop_at]:
            return True
        enough = facts["steps"] == self.steps if self.steps is not None else facts["epochs"] >= self.recipe.epochs
        return bool(enough) and not verdict


def read(order: Order) -> Task:
    """The task behind an order. Errors: UserError with every problem of the recipe."""
    target = Path(order.target)
    if (target / "run.json").is_file():
        return _from_run(target, order)
    if target.is_dir():
        raise refuse("is a folder, but no run.", "Name a recipe, or a folder that `sft train` wrote.", target)
    if order.more or order.refit:
        raise refuse("--more and --refit go on with a run.", f"Name its folder, such as runs/{target.stem}.")
    wanted = recipe.load(target, order.sets)
    run = RunFolder(order.out or Path("runs") / target.stem)
    _refuse_foreign(run, order.fresh)
    going_on = run.run_json.is_file() and not order.fresh
    if going_on:
        _refuse_changes(recipe.load_resolved(run.recipe), wanted, run)
    return Task(run, wanted, target.read_bytes(), going_on)


def _refuse_foreign(run: RunFolder, fresh: bool) -> None:
    """A run is written into a new folder or into its own, never among other things."""
    if run.path.exists() and not run.path.is_dir():
        raise refuse("is a file.", "Name a folder with --out.", run.path)
    if fresh or not run.path.is_dir() or run.run_json.is_file():
        return
    begun = {one.name for one in (run.split, run.source_recipe, run.recipe, run.log)}
    if other := [one.name for one in run.path.iterdir() if one.name not in begun and not one.name.startswith(".")]:
        raise refuse(f"holds {other[0]} and is no run.", "Name another folder with --out.", run.path)


def _from_run(target: Path, order: Order) -> Task:
    if order.out is not None or order.fresh:
        raise refuse("--out and --fresh belong to a recipe.", f"Name the recipe, not {target}.")
    run = RunFolder(target)
    was = recipe.load_resolved(run.recipe)
    facts = runs.read_json(run.run_json)
    source = run.source_recipe.read_bytes()
    if order.refit and (order.more or order.sets):
        raise refuse("--refit takes the run's own recipe.", "Leave out --set and --more.")
    if order.refit:
        return _refit(run, was, facts, source)
    wanted = recipe.load(run.recipe, order.sets) if order.sets else was
    if order.more:
        wanted = _more(wanted, facts, order.more, target)
    _refuse_changes(was, wanted, run)
    parent = facts.get("refit_of")
    return Task(run, wanted, source, True, Path(parent) if parent else None, facts.get("refit_steps"))


def _more(was: Recipe, facts: Mapping[str, Any], epochs: int, target: Path) -> Recipe:
    if facts["state"] != "finished":
        raise refuse(f"{target} is not finished.", f"`sft train {target}` goes on with it.")
    _refuse_overfit(facts, RunFolder(target))
    if not was.optimizer.schedule.startswith("constant") or "refit_of" in facts:
        what = (
            f"{target} cannot be taken further: its learning rate follows {was.optimizer.schedule}, or it is a refit."
        )
        raise refuse(what, "Only a run under a constant learning rate can; raise `epochs` and use --fresh.")
    wanted = int(facts["epochs"]) + epochs
    if wanted > recipe.MOST_EPOCHS:
        what = f"--more {epochs}: that makes {wanted} epochs, and {recipe.MOST_EPOCHS} are the most."
        raise refuse(what, "Give fewer.")
    return was.model_copy(update={"epochs": wanted})


def _refuse_overfit(facts: Mapping[str, Any], run: RunFolder) -> None:
    """More of what recites is not better; and a run that a verdict stopped has epochs left already."""
    said = runs.read_json(run.verdict)["run"]["verdict"] if run.verdict.is_file() else None
    if said == "overfit":
        what = f"{run.path} cannot be taken further: its verdict is overfit."
        remedy = "Train anew with a lower optimizer.learning_rate, fewer epochs or more examples; adapter/ is kept."
        raise refuse(what, remedy)
    if stopped := facts.get("stopped_by"):
        what = f"{run.path} stopped before its last epoch, at the verdict {stopped}."
        raise refuse(what, f"`sft train {run.path} --set watch.stop_at=overfit` goes on to the epochs it has.")


def _refit(parent: RunFolder, was: Recipe, facts: Mapping[str, Any], source: bytes) -> Task:
    if "chosen" not in facts:
        raise refuse(f"{parent.path} has no adapter yet.", "Let it run to its first look.")
    if not was.optimizer.schedule.startswith("constant"):
        raise refuse(f"A {was.optimizer.schedule} learning rate cannot be refitted.", "Use a constant one.")
    run = RunFolder(parent.path.with_name(f"{parent.path.name}-refit"))
    steps = int(facts["chosen"]["step"])
    return Task(run, was, source, run.run_json.is_file(), parent.path, steps)


def _refuse_changes(was: Recipe, wanted: Recipe, run: RunFolder) -> None:
    remedy = "Restore the recipe to go on, or start anew with --fresh or another --out."
    if changes := recipe.changed(was, wanted):
        raise UserError([Problem(f"{change}.", remedy, run.path) for change in changes])
    epochs = int(runs.read_json(run.run_json)["epochs"])
    if wanted.epochs < epochs:
        what = f"this run goes to epoch {epochs}, the recipe to {wanted.epochs}."
        raise refuse(what, f"`sft train {run.path}` goes on with it; a shorter one needs --fresh or --out.", run.path)
