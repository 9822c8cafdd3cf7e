"""What happens beside training: rows written, looks taken, checkpoints thinned out, the best adapter put in its place.

It watches and keeps; it never changes a weight, and never judges a run beyond «has the adapter moved at all».
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune import disk, looks, prompts, runs
from finetune.conversation import Turn
from finetune.errors import refuse
from finetune.looks import Alive, Place
from finetune.masks import encode
from finetune.model import Movement, Start
from finetune.plan import Plan
from finetune.recipe import Watch
from finetune.runs import RunFolder
from finetune.speak import Speaker
from finetune.train import Progress

_JUDGED_AFTER = 50  # steps past the warm-up after which an adapter must have moved; at step 1 lora_A cannot, for B is 0
_SAVE_SHARE = 0.02  # of wall time that checkpoints between looks may take
_SAVE_BOUNDS = (20.0, 600.0)  # seconds between two of them
_HELD_OUT_QUESTIONS = 2


class Screen(Protocol):
    """Who shows a run."""

    def step(self, row: Mapping[str, Any]) -> None: ...
    def look(self, rows: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None: ...
    def say(self, text: str) -> None: ...


@dataclass(frozen=True)
class LookPlan:
    """Steps at which to look, fixed when the run began."""

    light: frozenset[int]
    full: frozenset[int]
    reason: str

    def at(self, step: int) -> bool:
        """Whether a step is looked at."""
        return step in self.light or step in self.full


@dataclass
class Vigil:
    """The watcher of one run. `save_every`: seconds between checkpoints, None to let their cost decide."""

    run: RunFolder
    plan: Plan
    model: Any
    start: Start
    speaker: Speaker
    screen: Screen
    looks: LookPlan
    watch: Watch
    save_every: float | None = None
    stopping: bool = False
    _saved_at: float = field(default_factory=time.monotonic)
    _save_cost: float = 0.0

    @property
    def _judged_at(self) -> int:
        return _JUDGED_AFTER + self.plan.length.warmup

    # told by training

    def step(self, row: dict[str, Any]) -> None:
        """Keep the row and show it."""
        runs.append_lines(self.run.metrics, [row])
        self.screen.step(row)

    def wants(self, step: int) -> bool:
        """Gradients are read before looks and where the adapter is judged."""
        return step == self._judged_at or self.looks.at(step)

    def pause(self, step: int, progress: Progress, gradient: float | None) -> bool:
        """Look if it is time; True where a checkpoint is wanted. Raises UserError for a dead adapter."""
        if step == self._judged_at:
            self._judge(step, gradient)
        if self.looks.at(step):
            self.look(step, progress, gradient)
            return True
        return time.monotonic() - self._saved_at >= self._pace()

    def stop(self) -> bool:
        """Whether someone asked for the end."""
        return self.stopping

    def _pace(self) -> float:
        low, high = _SAVE_BOUNDS
        return min(max(self._save_cost / _SAVE_SHARE, low), high) if self.save_every is None else self.save_every

    # looks

    def look(self, step: int, progress: Progress, gradient: float | None) -> None:
        """Measure, answer, write it down, show it."""
        full = step in self.looks.full or step == 0
        place = Place("full" if full else "light", step, step / self.plan.length.per_epoch, progress.travel)
        movement = self._movement()
        rows = list(looks.rows(self.speaker, self.plan.groups(full), place, movement))
        if step and rows:
            alive = self._alive(movement, progress, gradient)
            rows[0].update({key: value for key, value in asdict(alive).items() if key != "share"})
        if step > self._judged_at:
            self._judge(step, gradient)
        samples = list(self._samples(place))
        runs.append_lines(self.run.samples, samples)
        runs.append_lines(self.run.metrics, rows)
        self.screen.look(rows, samples)

    def look_if_missing(self, step: int, progress: Progress) -> None:
        """The look that a kill or an interruption took away, or the one at the base before the first step."""
        taken = {row["step"] for row in runs.read_lines(self.run.metrics) if row["kind"] == "look"}
        if step not in taken and (step == 0 or self.looks.at(step)):
            self.look(step, progress, None)

    def _movement(self) -> Movement:
        return self.start.movement(self.model)

    def _alive(self, movement: Movement, progress: Progress, gradient: float | None) -> Alive:
        """One held-out text, adapter on against off, in the run's precision and in fp32."""
        items = self.plan.texts.held_out or self.plan.texts.trained
        item = next(iter(items.values()))
        change, exact = (self.speaker.change(item.ids, item.trained, exact) for exact in (False, True))
        per_travel = movement.mean / progress.travel if progress.travel else None
        return Alive(movement.share, per_travel, gradient, change, exact)

    def _judge(self, step: int, gradient: float | None) -> None:
        if why := looks.dead(self._movement().share, gradient, step):
            remedy = "Raise optimizer.learning_rate, or lower optimizer.eps; nothing is gained by going on."
            raise refuse(f"The adapter is dead: {why}", remedy)

    def _samples(self, place: Place) -> Iterator[dict[str, Any]]:
        """Answers to the user's own questions and to the first held-out ones, in the first format."""
        name, began = self.plan.first_format, time.monotonic()
        asked = list(_questions(self.plan, self.watch.prompts))
        if not asked:
            return
        format_ = self.plan.formats[name]
        vocabulary = self.plan.vocabulary
        ids = [encode(prompts.render_prompt(turns, format_, vocabulary), vocabulary).ids for _, turns in asked]
        stops = prompts.stops(format_, vocabulary)
        answers = self.speaker.complete(ids, stops, self.plan.answer_limit())
        seconds = time.monotonic() - began
        for (example, turns), answer in zip(asked, answers, strict=True):
            where = {"step": place.step, "epoch": place.epoch, "travel": place.travel, "format": name, "id": example}
            told = {"prompt": turns[-1].text, "answer": answer.text.strip(), "ended": answer.ended}
            yield {**where, **told, "seconds": seconds / len(asked)}

    # checkpoints

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to fill; once it is safe, older checkpoints are thinned out and the best adapter is put in place."""
        began = time.monotonic()
        with self.run.new_checkpoint(step) as folder:
            yield folder
        self.tidy()
        self._saved_at = time.monotonic()
        self._save_cost = self._saved_at - began

    def tidy(self) -> None:
        """Install the chosen adapter if it changed; drop what nobody will ask for again. Safe to repeat."""
        best = choose(runs.read_lines(self.run.metrics), self.plan.first_format)
        if best is not None and self.run.checkpoint_at(best.step).is_dir():
            self._install(best)
        self._drop_passed()
        keep = [best.step] if best is not None else []
        for line in self.run.prune(keep, self.watch.keep.max_gib):
            self.run.note(line)

    def _install(self, best: Chosen) -> None:
        """Once for each choice: a reader finds no adapter for as short as can be."""
        known = runs.read_json(self.run.run_json).get("chosen") or {}
        if known.get("step") != best.step or not self.run.adapter.is_dir():
            self.run.install_adapter(self.run.checkpoint_at(best.step))
        if known != asdict(best):
            self.run.record(chosen=asdict(best))

    def _drop_passed(self) -> None:
        """Checkpoints between looks serve only to go on from: two are enough."""
        passed = [one for one in self.run.checkpoints(verify=False) if not self.looks.at(one.step)]
        for one in passed[2:]:
            disk.retire(one.folder)


def _questions(plan: Plan, own: Sequence[str]) -> Iterator[tuple[str, tuple[Turn, ...]]]:
    for text in own:
        yield "", (Turn("user", text),)
    for name in plan.split.held_out[:_HELD_OUT_QUESTIONS]:
        yield name, plan.conversations[name].turns[:-1]


# which adapter


@dataclass(frozen=True)
class Chosen:
    """The adapter of a run, and why that one."""

    step: int
    epoch: float
    travel: float
    reason: str


def choose(rows: Sequence[Mapping[str, Any]], first_format: str) -> Chosen | None:
    """The look with the lowest held-out loss at its best temperature; the latest where nothing was gained or held out.

    Only looks after a step count. None before the first.
    """
    taken = [row for row in rows if row["kind"] == "look" and row["step"] > 0 and row["nll_tstar"] is not None]
    if not taken:
        return None
    looked = [row for row in rows if row["kind"] == "look" and row["format"] == first_format]
    held = [row for row in looked if row["split"] == "held_out"]
    base = next((row["nll_tstar"] for row in held if row["step"] == 0), None)
    later = [row for row in held if row in taken]
    latest = max(taken, key=lambda row: row["step"])
    if not later:
        return _chosen(latest, "the last look: nothing was held out")
    best = min(later, key=_loss)
    if base is not None and best["nll_tstar"] >= base:
        return _chosen(latest, "the last look: no look was better than the base on held-out examples")
    return _chosen(best, f"lowest held-out loss, {len(later)} looked at")


def _loss(row: Mapping[str, Any]) -> float:
    return float(row["nll_tstar"])


def _chosen(row: Mapping[str, Any], reason: str) -> Chosen:
    return Chosen(int(row["step"]), float(row["epoch"]), float(row["travel"]), reason)
