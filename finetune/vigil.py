"""What happens beside training: rows written, looks taken and judged, checkpoints thinned out, the best adapter kept.

It watches, keeps, and stops a run that recites; it never changes a weight. What it knows it reads from the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from finetune import disk, ear, forgotten, looks, prompts, rota, runs, verdict
from finetune.burden import HELD_OUT_QUESTIONS
from finetune.conversation import Turn
from finetune.ear import Overheard
from finetune.errors import refuse
from finetune.evidence import Setting
from finetune.hearing import Hearing
from finetune.keeping import RUNNING, Alarms, Chosen, Keeper, alarms, loudest, measured
from finetune.looks import Alive, Place
from finetune.masks import encode
from finetune.model import Movement, Start
from finetune.plan import Plan
from finetune.recipe import Watch
from finetune.runs import RunFolder
from finetune.speak import Speaker
from finetune.train import Progress, Spoken

_JUDGED_AFTER = 50  # steps past the warm-up after which an adapter must have moved; at step 1 lora_A cannot, for B is 0
_SAVE_SHARE = 0.02  # of wall time that checkpoints between looks may take
_SAVE_BOUNDS = (20.0, 600.0)  # seconds between two of them
_HOW = {"words": "8-word echo", "long": "50-token echo", "whole": "whole echo"}
_APART = 1.25  # an alarm calls for a full look once the travel is so many times that of the last one


class Screen(Protocol):
    """Who shows a run."""

    def step(self, row: Mapping[str, Any]) -> None: ...
    def look(
        self,
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Mapping[str, Any]],
        judged: Mapping[str, Any] | None = None,
    ) -> None: ...
    def say(self, text: str) -> None: ...


Row = Mapping[str, Any]
Probe = Callable[[Speaker, Place], Iterable[Row]]  # asked at full looks; gives rows for findings.jsonl
Reader = Callable[[Sequence[Row], Place], Iterable[Row]]  # given the samples of a look; the same


@dataclass(frozen=True)
class LookPlan:
    """Steps at which to look, fixed when the run began. `alarm`: full looks that alarms may add."""

    light: frozenset[int]
    full: frozenset[int]
    reason: str
    alarm: int = 0

    def at(self, step: int) -> bool:
        """Whether a step is looked at."""
        return step in self.light or step in self.full


@dataclass
class Vigil:
    """The watcher of one run. `save_every`: seconds between checkpoints, None to let their cost decide.

    `stopping`: someone asked for the end. `stopped_by`: the verdict that did.
    """

    run: RunFolder
    plan: Plan
    model: Any
    start: Start
    speaker: Speaker
    screen: Screen
    looks: LookPlan
    watch: Watch
    probes: Sequence[Probe] = ()
    readers: Sequence[Reader] = ()
    save_every: float | None = None
    stopping: bool = False
    stopped_by: verdict.Word | None = None
    _saved_at: float = field(default_factory=time.monotonic)
    _save_cost: float = 0.0
    _alarms: Alarms = field(default_factory=dict)
    _full: list[tuple[int, float]] = field(default_factory=list)  # (step, travel) of the full looks so far
    _added: set[int] = field(default_factory=set)  # steps of those that alarms called for
    _written: object = None

    def __post_init__(self) -> None:
        formats = self.plan.recipe.formats.held_out
        self.keeper = Keeper(self.run, Setting(self.plan.first_format, formats, running=True))
        self.ear = ear.ear(self.plan)
        self.hearing = Hearing(self.run, self.ear, self.speaker, ear.base(self.run), rota.of(self.plan))

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
        if self.looks.at(step) or self._alarmed(step, progress):
            self.look(step, progress, gradient)
            return True
        return time.monotonic() - self._saved_at >= self._pace()

    def stop(self) -> bool:
        """Whether someone, or a verdict, asks for the end."""
        return self.stopping or self.stopped_by is not None

    def say(self, text: str) -> None:
        """Onto the screen and into the log."""
        self.run.note(text)
        self.screen.say(text)

    def listen(self, step: int, progress: Progress, spoken: Sequence[Spoken]) -> dict[str, float]:
        """Write down what the training forward said of each example: the free map. Seconds it took, the base apart."""
        began, asked = time.monotonic(), self.hearing.base.seconds
        said = [
            Overheard(one.item.example, one.item.format, one.item.trained, one.log_p.double().numpy(), one.hits.numpy())
            for one in spoken
            if one.item.format  # replayed text has none
        ]
        rows = self.hearing.free(said, self._place("free", step, progress))
        runs.append_lines(self.run.examples, rows)
        self._hear_alarms(rows)
        base = self.hearing.base.seconds - asked
        return {"listening": time.monotonic() - began - base, "base_seconds": base}

    def _pace(self) -> float:
        low, high = _SAVE_BOUNDS
        return min(max(self._save_cost / _SAVE_SHARE, low), high) if self.save_every is None else self.save_every

    # looks

    def begin(self, done: int, progress: Progress) -> None:
        """Take up what the run folder says, and the look that is missing: at the base, or one an interruption took."""
        metrics = [row for row in runs.read_lines(self.run.metrics) if row["kind"] == "look"]
        alarms(runs.read_lines(self.run.examples), self._alarms)
        self._full = sorted({(row["step"], row["travel"]) for row in metrics if row["look"] == "full"})
        self._added = {row["step"] for row in metrics if row.get("cause") == "alarm"}
        self.hearing.noise = runs.read_json(self.run.run_json).get("noise")
        if done not in {row["step"] for row in metrics} and (done == 0 or self.looks.at(done)):
            self.look(done, progress, None)
        self._weigh(done)

    def _alarmed(self, step: int, progress: Progress) -> bool:
        """Whether an echo first heard since the last full look calls for another: one an epoch, as many as are paid.

        Counted, not timed, so that two runs of one recipe look at the same steps.
        """
        last, travel = max(self._full, default=(0, 0.0))
        new = any(row["step"] > last for row in self._alarms.values())
        due = step % self.plan.length.per_epoch == 0 and progress.travel >= _APART * travel
        return new and due and len(self._added) < self.looks.alarm

    def look(self, step: int, progress: Progress, gradient: float | None) -> None:
        """Measure, answer, judge, write it down, show it."""
        began = time.monotonic()
        added = step not in self.looks.full and step > 0 and self._alarmed(step, progress)
        full = step in self.looks.full or step == 0 or added
        place = self._place("full" if full else "light", step, progress)
        movement = self._movement()
        before = sum(0 < one < step for one, _ in self._full)
        taken = self.hearing.look(place, movement, loudest(self._alarms), before)
        if step == 0:
            self.run.record(noise=self.hearing.noise)
        rows = taken.metrics
        if step and rows:
            alive = self._alive(movement, progress, gradient)
            rows[0].update({key: value for key, value in asdict(alive).items() if key != "share"})
        if step > self._judged_at:
            self._judge(step, gradient)
        samples = [] if added and not self.looks.at(step) else list(self._samples(place))
        found = [row for probe in self.probes for row in probe(self.speaker, place)] if full else []
        found += [*taken.findings, *(row for reader in self.readers for row in reader(samples, place))]
        runs.append_lines(self.run.examples, taken.examples)
        runs.append_lines(self.run.findings, found)
        runs.append_lines(self.run.samples, samples)
        if rows:
            rows[0].update({"took": time.monotonic() - began, **({"cause": "alarm"} if added else {})})
        runs.append_lines(self.run.metrics, rows)
        self._remember(place, taken.examples, added)
        judged = self._weigh(step)
        told = {"formats": rota.brief(found), "drift": forgotten.brief(found)}
        self.screen.look(rows, samples, None if judged is None else {**judged, **told})

    def _remember(self, place: Place, examples: Sequence[Mapping[str, Any]], added: bool) -> None:
        self._hear_alarms(examples)
        self._full += [(place.step, place.travel)] if place.kind == "full" else []
        self._added |= {place.step} if added else set()

    def _hear_alarms(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """First echoes also go into the log, as they come."""
        known = set(self._alarms)
        for name, kind in [one for one in alarms(rows, self._alarms) if one not in known]:
            row = self._alarms[name, kind]
            self.run.note(f"first {_HOW[kind]} of {name}: epoch {row['epoch']:.2f}, {row['format']}, {row['map']}")

    def _weigh(self, step: int) -> dict[str, Any] | None:
        """Judge the run as it stands; a verdict that the recipe does not bear ends it, before its last step."""
        last = self.keeper.judge()
        if last is None:
            return None
        if step < self.plan.length.total and verdict.asks_to_stop(last.verdict, self.watch.stop_at):
            self.stopped_by = last.verdict
            self.screen.say(f"Stopping: {last.verdict} at epoch {last.facts.epoch:g} (watch.stop_at).")
        return measured(last)

    def _place(self, kind: str, step: int, progress: Progress) -> Place:
        return Place(kind, step, step / self.plan.length.per_epoch, progress.travel)

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
        """Answers to the user's own questions, at full looks also to the first held-out ones, in the first format."""
        name, began = self.plan.first_format, time.monotonic()
        asked = list(_questions(self.plan, self.watch.prompts, place.kind == "full"))
        if not asked:
            return
        format_ = self.plan.formats[name]
        vocabulary = self.plan.vocabulary
        ids = [encode(prompts.render_prompt(turns, format_, vocabulary), vocabulary).ids for _, turns in asked]
        stops = prompts.stops(format_, vocabulary)
        answers = self.hearing.answers(ids, stops, self.plan.answer_limit())
        if answers is None:
            return
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

    def tidy(self, ended: str = RUNNING) -> None:
        """Install the chosen adapter if it changed, say why, drop what nobody will ask for again. Safe to repeat.

        `ended`: what ended the run.
        """
        kept = {one.step for one in self.run.checkpoints(verify=False)}
        best = self.keeper.chosen(kept)
        if best is not None:
            self._install(best)
            self._say_why(ended, best, kept)
        self._drop_passed()
        for line in self.run.prune([best.step] if best is not None else [], self.watch.keep.max_gib):
            self.run.note(line)

    def _say_why(self, ended: str, best: Chosen, kept: Collection[int]) -> None:
        now = (ended, best, len(self.keeper.looks))
        if now != self._written:
            runs.write_json(self.run.verdict, self.keeper.document(ended, kept, self.ear.quote))
            self._written = now

    def _install(self, best: Chosen) -> None:
        """Once for each choice: a reader finds no adapter for as short as can be."""
        known = runs.read_json(self.run.run_json).get("chosen") or {}
        if known.get("step") != best.step or not self.run.adapter.is_dir():
            self.run.install_adapter(self.run.checkpoint_at(best.step))
        if known != asdict(best):
            self.run.record(chosen=asdict(best))

    def _drop_passed(self) -> None:
        """Checkpoints between looks serve only to go on from: two are enough."""
        looked = {one.facts.step for one in self.keeper.looks}
        passed = [one for one in self.run.checkpoints(verify=False) if one.step not in looked]
        for one in passed[2:]:
            disk.retire(one.folder)


def _questions(plan: Plan, own: Sequence[str], full: bool) -> Iterator[tuple[str, tuple[Turn, ...]]]:
    for text in own:
        yield "", (Turn("user", text),)
    for name in plan.split.held_out[: HELD_OUT_QUESTIONS if full else 0]:
        yield name, plan.conversations[name].turns[:-1]
