"""One run, from a recipe to a chosen adapter: prepare, train, look, keep, go on where it stopped.

It joins the rooms below and decides when; how each thing is done is theirs. It prints nothing: a screen is passed in.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from finetune import (
    __version__,
    bases,
    corpus,
    drift,
    earlier,
    hub,
    keeping,
    loading,
    loggers,
    machine,
    model,
    plan,
    recipe,
    rota,
    runs,
    selfreplay,
    train,
)
from finetune.audience import Audience
from finetune.corpus import Split
from finetune.errors import UserError, refuse
from finetune.loading import Loaded
from finetune.machine import Derived
from finetune.orders import Task
from finetune.plan import Plan
from finetune.recipe import Recipe
from finetune.report import Writer
from finetune.runs import RunFolder
from finetune.screen import Headline, Screen
from finetune.speak import Speaker
from finetune.train import Job, Progress
from finetune.vigil import LookPlan, Vigil


@dataclass(frozen=True)
class Outcome:
    """How a night ended."""

    folder: Path
    text: str
    facts: Mapping[str, Any]
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"run": str(self.folder), "interrupted": self.interrupted, **self.facts}


def run(task: Task, screen: Screen, save_every: float | None = None, page: bool = True) -> Outcome:
    """Carry out a task. Errors: UserError with every problem; an interruption is an outcome, not an error.

    `page`: keep report.html up to date.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise refuse("sft trains in one process.", "Start it without torchrun or accelerate launch.")
    with task.run.lock(), _library_talk_into(task.run):
        if task.is_finished():
            return _outcome(task)
        try:
            settings = task.recipe.model_dump(mode="json")
            with loggers.start(task.recipe.report_to, task.run.path, settings, task.run.note) as dashboards:
                told = Audience(screen, dashboards, Writer(task.run.path) if page else None)
                return _sent(task, _spend(task, told, save_every), told)
        except UserError as error:
            task.run.note(str(error))
            raise
        except Exception:  # noted with its traceback, then raised as it was
            task.run.note(traceback.format_exc())
            raise


def _sent(task: Task, outcome: Outcome, screen: Audience) -> Outcome:
    """The last page, and a finished run on its way to where `hub.repo` says. Neither can spoil a night's work."""
    if screen.page is not None:
        screen.page.keep_up(last=True)
    if not outcome.interrupted:
        told = hub.after_run(task.run, lambda: Writer(task.run.path).html(texts=False))
        screen.say(told) if told else None
    return outcome


def _spend(task: Task, screen: Audience, save_every: float | None) -> Outcome:
    known = runs.read_json(task.run.run_json) if task.going_on else {}
    base = model.find_base(task.recipe.base, known.get("commit") or task.recipe.revision)
    _refuse_missing_layers(task.recipe, base)
    made = _plan(task, base.folder, known)
    looks = _begin(task, made, base, known, screen)
    model.spare_a_core()
    if remark := model.device_remark():
        screen.say(remark)
    screen.say(f"Loading {base.name} ({task.recipe.quantization}).")
    longest = max(made.texts.trained.values(), key=lambda item: len(item.ids))
    with train.memory_faults(f"{longest.example} with {len(longest.ids)} tokens", _remedies(task)):
        return _watched(task, made, looks, base, screen, save_every)


def _refuse_missing_layers(wanted: Recipe, base: model.Base) -> None:
    """Before anything is written: a folder that has begun would hold the recipe to its mistake."""
    top = None if wanted.lora.layers == "all" else wanted.lora.layers.top
    if top is not None and (problems := list(bases.lora_problems(bases.shape_in(base.folder), (), top))):
        raise UserError(problems)


def _remedies(task: Task) -> list[str]:
    """What to change when memory runs out, though activations are computed twice and texts go one by one by then."""
    told = ["shorter examples", *(["lora.layers: {top: 8}"] if task.recipe.lora.layers == "all" else [])]
    return [*told, *(["quantization: nf4"] if task.recipe.quantization != "nf4" else [])]


def _watched(
    task: Task, made: Plan, looks: LookPlan, base: model.Base, screen: Audience, save_every: float | None
) -> Outcome:
    drifting = drift.probe(made, base.name, model.fingerprint(base.folder), task.run.path / drift.CACHE)
    besides = chain(drifting.reads(), rota.texts(made, len(looks.full) + looks.alarm))
    loaded = loading.load(task.run, made, base, besides, screen.say)
    speaker, watch = loaded.speaker, task.recipe.watch
    asked: dict[str, Any] = {"probes": (drifting.look,), "readers": (drifting.read,)}
    vigil = Vigil(
        task.run, made, loaded.model, loaded.start, speaker, screen, looks, watch, **asked, save_every=save_every
    )
    with _stop_signals(vigil, screen):
        _train(task, made, vigil, loaded, screen)
    interrupted = vigil.stopping and vigil.stopped_by is None
    vigil.tidy(keeping.RUNNING if interrupted else vigil.stopped_by or "its last epoch")
    state = "stopped" if interrupted else "finished"
    task.run.record(state=state, stopped_by=vigil.stopped_by, spent=_spent(task.run))
    return _outcome(task, interrupted)


# before


def _plan(task: Task, base: Path, known: Mapping[str, Any]) -> Plan:
    """The plan, with the recorded split; refused where the data are no longer those the run began with."""
    split = Split.from_json(runs.read_json(task.run.split)) if task.going_on else None
    everything = task.parent is not None and split is None
    made = plan.make(task.recipe, base, split, everything=everything, online=True)
    if task.recipe.regularise.self_replay:
        made = _with_own_answers(task, base, made)
    if task.going_on:
        was, now = known["fingerprints"], _fingerprints(made, base)
        if gone := [name for name in now if was[name] != now[name]]:
            what = f"The {' and the '.join(gone)} changed since this run began."
            raise refuse(what, "Restore what was there to go on, or start anew with --fresh.", task.run.path)
    if task.steps is None:
        return made
    return replace(made, length=replace(made.length, total=task.steps))


def _with_own_answers(task: Task, base: Path, made: Plan) -> Plan:
    """What the base says to everyday questions, written before the first step and kept; then mixed in."""
    path = task.run.path / selfreplay.NAME
    if not path.is_file():
        task.run.note("The base writes its own answers, once.")
        bare = model.load_base(base, task.recipe.quantization, model.pick_device())
        selfreplay.write(path, Speaker(bare, made.vocabulary.tokenizer, made.vocabulary.eos_id), made)
        model.let_go(bare)  # it is loaded again to be trained
    return selfreplay.mixed(made, path)


def _fingerprints(made: Plan, base: Path) -> dict[str, str]:
    dataset = corpus.fingerprint(made.conversations.values())
    return {"dataset": dataset, "base": model.fingerprint(base), earlier.RENDERED: made.fingerprint()}


def _begin(task: Task, made: Plan, base: model.Base, known: Mapping[str, Any], screen: Audience) -> LookPlan:
    """Write what stays the same, run.json last: a folder without one has not begun. Returns the plan of looks."""
    if not known:
        runs.write_json(task.run.split, made.split.to_json())
        runs.write_atomic(task.run.source_recipe, task.source)
    else:
        _say_what_stays(task, screen)
    looks = _looks(task, made, known)
    runs.write_atomic(task.run.recipe, recipe.resolved_yaml(task.recipe))
    facts: dict[str, Any] = {"state": "running", "version": __version__, "seed": task.recipe.seed, **_environment()}
    facts |= {
        "epochs": _epochs(task, made),
        "steps": made.length.total,
        "looks": looks,
        "derived": _derived(made, looks),
    }
    if base.commit is not None:
        facts |= {"commit": base.commit}
    if task.parent is not None:
        facts |= {"refit_of": str(task.parent), "refit_steps": task.steps}
    if not known:
        facts |= {"fingerprints": {**_fingerprints(made, base.folder), "recipe": recipe.fingerprint(task.recipe)}}
    facts |= {"places": {name: str(one.origin) for name, one in made.conversations.items()}}
    task.run.record(**facts)
    full, light = (
        frozenset(min(e * made.length.per_epoch, made.length.total) for e in looks[k]) for k in ("full", "light")
    )
    return LookPlan(light - full, full, looks["reason"], looks["alarm"])


def _say_what_stays(task: Task, screen: Audience) -> None:
    was, now = recipe.load_resolved(task.run.recipe), task.recipe
    if (was.watch.every, was.watch.budget) != (now.watch.every, now.watch.budget):
        more = " New ones hold for the epochs that were added." if now.epochs > was.epochs else ""
        screen.say(f"watch.every and watch.budget were fixed when this run began; its looks stay as planned.{more}")


def _environment() -> dict[str, Any]:
    device = model.pick_device()
    return {**machine.environment(), "device": model.describe(device)}


def _epochs(task: Task, made: Plan) -> int:
    return task.recipe.epochs if task.steps is None else math.ceil(made.length.total / made.length.per_epoch)


def _looks(task: Task, made: Plan, known: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of looks, in epochs: fixed when a run begins, extended when it is given more of them."""
    if task.steps is not None:
        return {"light": [], "full": [_epochs(task, made)], "reason": "a refit is looked at once", "alarm": 0}
    was = known.get("looks", {"light": [], "full": [], "reason": made.looks.reason})
    before = int(known.get("epochs", 0))
    light = [*was["light"], *(epoch for epoch in made.looks.light if epoch > before)]
    full = [*was["full"], *(epoch for epoch in made.looks.full if epoch > before)]
    alarm = made.looks.alarm if _epochs(task, made) > before else was.get("alarm", 0)
    return {"light": light, "full": full, "reason": was["reason"], "alarm": alarm}


def _derived(made: Plan, looks: Mapping[str, Any]) -> dict[str, Derived]:
    length, wanted = made.length, made.recipe
    rows = f"{made.epochs.size} texts an epoch, batch size {wanted.batch_size}"
    return {
        "steps": Derived(length.total, f"{length.per_epoch} an epoch ({rows})"),
        "travel": Derived(made.travel, f"sum of the learning rate, {wanted.optimizer.schedule}"),
        "micro_batch": Derived(made.largest(), f"tokens at most, none padded; the longest text has {made.longest()}"),
        "accumulation": Derived(max(map(len, made.micro_batches(0))), "micro-batches a step at most, first epoch"),
        "looks": Derived(len(looks["light"]) + len(looks["full"]), looks["reason"]),
    }


# during


def _train(task: Task, made: Plan, vigil: Vigil, loaded: Loaded, screen: Audience) -> None:
    """Go on from the newest valid checkpoint, or begin; rows newer than it are dropped and come again."""
    newest = task.run.newest_valid(full=True, tell=screen.say)
    if newest is None and (bare := task.run.newest_valid()):
        what = f"the optimizer state of every checkpoint is damaged; the adapter of step {bare.step} is whole."
        raise refuse(what, f"Keep {bare.folder}, and start anew with --fresh.", task.run.path)
    done = newest.step if newest else 0
    task.run.cut_back(done if newest else -1)  # no checkpoint covers a look at the base: it is taken whole or again
    progress = Progress()
    if newest:
        model.read_weights(loaded.model, newest.folder)
        progress = Progress(**json.loads((newest.folder / train.PROGRESS).read_text()))
    length = made.length
    screen.open(Headline(task.run.path.name, _epochs(task, made), length.total, length.per_epoch, done))
    try:
        vigil.begin(done, progress)
        if done < length.total and not vigil.stop():
            with tempfile.TemporaryDirectory() as work:
                job = _job(task, made, vigil, loaded, Path(work))
                train.train(loaded.model, loaded.base.folder, job, vigil, newest.folder if newest else None)
    finally:
        screen.close()


def _job(task: Task, made: Plan, vigil: Vigil, loaded: Loaded, work: Path) -> Job:
    return Job(
        epochs=made.epochs,
        optimizer=task.recipe.optimizer,
        length=made.length,
        batch_size=task.recipe.batch_size,
        packing=made.packing,
        seed=task.recipe.seed,
        base_name=loaded.base.name,
        work=work,
        new_checkpoint=vigil.new_checkpoint,
        twice=loading.twice(made, loaded),
        ahead=loading.ahead(made, loaded),
        listen=vigil.listen,
    )


@contextmanager
def _stop_signals(vigil: Vigil, screen: Audience) -> Iterator[None]:
    """Ctrl-C or SIGTERM: finish the step, save, stop. A second one stops at once; the last checkpoint stands."""

    def ask(number: int, _frame: object) -> None:
        if vigil.stopping:
            raise KeyboardInterrupt
        vigil.stopping = True
        screen.say("Stopping after this step; once more to stop at once.")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _library_talk_into(run: RunFolder) -> Iterator[None]:
    """What libraries warn of and log goes into log.txt, not onto the screen."""
    handler = logging.Handler()
    handler.emit = lambda record: run.note(f"{record.name}: {record.getMessage()}")  # type: ignore[method-assign]
    talkers = [logging.getLogger(name) for name in (None, "transformers")]  # transformers passes nothing up
    for talker in talkers:
        talker.addHandler(handler)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, category, *_where: run.note(f"{category.__name__}: {message}")
    try:
        yield
    finally:
        warnings.showwarning = shown
        for talker in talkers:
            talker.removeHandler(handler)


# after


def _spent(run: RunFolder) -> dict[str, Any]:
    """Seconds by what they were spent on, and shares of all of it.

    `looking`: looks, and reading the base where an echo has to be told from what the base knows. `listening`: judging
    and writing the free map; what keeping it costs the forward itself is in `training`.
    """
    rows = runs.read_lines(run.metrics)
    total = {key: sum(row.get(key, 0.0) for row in rows) for key in ("took", "base_seconds", "listening")}
    training = sum(row["seconds"] for row in rows if row["kind"] == "step")
    looking, listening = total["took"] + total["base_seconds"], total["listening"]
    everything = max(training + looking + listening, 1e-9)
    spent = {"training": training, "looking": looking, "listening": listening}
    return {**spent, "share_looking": looking / everything, "share_listening": listening / everything}


def _outcome(task: Task, interrupted: bool = False) -> Outcome:
    facts, said = runs.read_json(task.run.run_json), keeping.read(task.run)
    told = {key: facts.get(key) for key in ("state", "epochs", "steps", "chosen", "stopped_by", "spent")}
    told["adapter"] = str(task.run.adapter) if said else None
    told["verdict"] = said
    text = "\n".join(_told(task, facts, said, interrupted))
    task.run.note(text)
    return Outcome(task.run.path, text, told, interrupted)


def _told(task: Task, facts: Mapping[str, Any], said: Mapping[str, Any] | None, interrupted: bool) -> Iterator[str]:
    if interrupted:
        yield f"Stopped; everything is saved. Go on with: sft train {task.run.path}"
    if said is None:
        yield "There is no adapter yet: the first look is still to come."
        return
    end = said["run"]
    if facts.get("stopped_by"):
        yield f"The run stopped by itself at epoch {end['epoch']:g} of {facts['epochs']}: {end['verdict']}."
    yield from keeping.told(said, task.run, facts.get("places", {}))
    chosen = facts["chosen"]
    yield f"Adapter: {task.run.adapter} (epoch {chosen['epoch']:g}: {chosen['reason']})"
