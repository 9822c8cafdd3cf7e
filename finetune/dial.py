"""How much of an adapter is best: its effect scaled from none to half as much again, echo against held-out loss.

Every kept adapter at every scale is read in one pass over the same texts and judged as a look is. The best point is
written as an adapter of its own, where it is better than the run's; the run's stays as it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save

from finetune import disk, ear, runs, verdict
from finetune.bench import Bench, Row
from finetune.chance import Interval, mean
from finetune.errors import refuse
from finetune.evidence import Setting
from finetune.looks import Place, head
from finetune.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune.tables import columns
from finetune.verdict import Judgement

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
FOLDER, SAID = "dial", "dial.json"
_HEAD = ("epoch", "scale", "held-out", "gain", "whole", "50 tokens", "8 words", "verdict")


@dataclass(frozen=True)
class Point:
    """One adapter at one scale. `judged` as a look would be; scale 0 is the base, and no point of its own."""

    step: int
    epoch: float
    scale: float
    judged: Judgement

    @property
    def gain(self) -> Interval | None:
        """Over the base, nats per token at the best temperature."""
        return mean(self.judged.facts.gain)

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and dial.json."""
        facts = self.judged.facts
        where = {"step": self.step, "epoch": self.epoch, "scale": self.scale, "verdict": self.judged.verdict}
        told = {"nll_tstar": facts.nll_tstar, "gain": asdict(self.gain) if self.gain else None}
        echo = None if facts.echo is None else asdict(facts.echo) | {"epoch": self.epoch}
        return {**where, **told, "echo": echo}


@dataclass(frozen=True)
class Sweep:
    """All points, in order of steps and scales. `base`: held-out loss without an adapter. `own`: the run's adapter."""

    points: tuple[Point, ...]
    base: float | None
    own: Point
    best: Point | None

    @property
    def offered(self) -> bool:
        """Whether the best point is another one than the run's adapter as it is."""
        return self.best is not None and self.best != self.own

    @property
    def reason(self) -> str:
        """How the best was chosen, or why none was."""
        if self.best is None:
            return "No point gained on held-out examples beyond luck: none is offered."
        count, own = len(self.points), f"the run's own adapter as it is: {_told(self.own)}"
        if not self.offered:
            return f"The best of {count} points is {own}."
        less = " Preferred for reciting less." if self.best.judged.verdict != self.own.judged.verdict else ""
        care = (
            f"Chosen among {count} points on the same {self.best.judged.facts.held_out} examples: a little flattered."
        )
        what = f"Best: epoch {self.best.epoch:g} at {self.best.scale:g} times its effect: {_told(self.best)}"
        return f"{what}; {own}.{less} {care}"


def _told(one: Point) -> str:
    return (
        f"{one.judged.verdict}, held-out loss {one.judged.facts.nll_tstar:.4f} nats per token at its best temperature"
    )


def sweep(bench: Bench) -> Sweep:
    """Read every kept adapter at every scale. Errors: UserError where its effect cannot be scaled."""
    subject, listens = bench.subject, bench.ear
    for folder in subject.adapters.values():
        _refuse_odd(folder)
    passages = [*listens.passages("train"), *listens.passages("held_out")]
    known = ear.begin(listens, bench.worn.speaker, bench.base, passages, Place("dial", 0, 0.0, 0.0))
    points: list[Point] = []
    for step in sorted(subject.adapters):
        bench.wear(step)
        for scale in SCALES:
            with bench.worn.speaker.dialled(scale):
                place = Place("dial", len(points) + 1, subject.place(step).epoch, subject.place(step).travel)
                found = ear.hear(listens, bench.worn.speaker, bench.base, passages, place)
            judged = _judged(bench, place, [*known.rows, *found.rows])
            points.append(Point(step, place.epoch, scale, judged))
        bench.say(f"dial: epoch {points[-1].epoch:g}, {len(points)} of {len(SCALES) * len(subject.adapters)} points")
    return _chosen(points, _loss(known.rows), subject.step)


def _judged(bench: Bench, place: Place, rows: Sequence[Row]) -> Judgement:
    """As the only look of a run that may still go on: nothing is harmed that has no history."""
    setting = Setting(bench.subject.plan.first_format, (), bench.subject.elsewhere, running=True)
    return verdict.judgements([head(place)], rows, (), setting)[-1]


def _chosen(points: Sequence[Point], base: float | None, step: int) -> Sweep:
    own = next(one for one in points if (one.step, one.scale) == (step, 1.0))
    learned = [one.judged for one in points if one.judged.signs.learned]
    best = verdict.chosen(learned, running=True)
    at = None if best is None else next(one for one in points if one.judged is best)
    return Sweep(tuple(points), base, own, at)


def _loss(rows: Sequence[Row]) -> float | None:
    """Held-out, over examples."""
    losses = [row["nll_tstar"] for row in rows if row["split"] == "held_out" and row["nll_tstar"] is not None]
    return sum(losses) / len(losses) if losses else None


# as an adapter


def write(bench: Bench, found: Sweep) -> Path | None:
    """All points into dial.json, and the best into a folder that plain PEFT loads; None where none is offered."""
    run = bench.subject.run
    said: dict[str, Any] = {
        "reason": found.reason,
        "base": found.base,
        "points": [one.as_dict() for one in found.points],
    }
    said["best"] = None if found.best is None else {"step": found.best.step, "scale": found.best.scale}
    runs.write_json(run.path / SAID, said)
    folder = run.path / FOLDER
    if found.best is None or not found.offered:
        if folder.is_dir():
            disk.retire(folder)
        return None
    tmp = disk.beside(folder, f"tmp-{os.getpid()}")
    disk.remove_tree(tmp)
    tmp.mkdir()
    try:
        runs.write_atomic(tmp / ADAPTER_WEIGHTS, scaled(bench.subject.adapters[found.best.step], found.best.scale))
        config = (bench.subject.adapters[found.best.step] / ADAPTER_CONFIG).read_bytes()
        runs.write_atomic(tmp / ADAPTER_CONFIG, config)
        runs.write_json(tmp / SAID, said)
        disk.sync_tree(tmp)
        disk.publish(tmp, folder)
    except BaseException:
        disk.remove_tree(tmp)
        raise
    return folder


def scaled(folder: Path, scale: float) -> bytes:
    """An adapter's weights with `scale` times the effect: lora_B is. Errors: UserError where that would not do it."""
    _refuse_odd(folder)
    weights = load_file(folder / ADAPTER_WEIGHTS)
    part = "lora_embedding_B", "lora_B"
    return save(
        {name: w * scale if any(p in name for p in part) else w for name, w in weights.items()}, {"format": "pt"}
    )


def _refuse_odd(folder: Path) -> None:
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if any(config.get(key) for key in ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias")):
        what = "this adapter's effect is not proportional to its weights."
        raise refuse(what, "Only plain LoRA can be dialled.", folder)


# in words


def lines(found: Sweep, width: int | None) -> Iterator[str]:
    """The run's own adapter at every scale, and of every other the best; the base above."""
    chosen = [one for one in found.points if one.step == found.own.step]
    for step in sorted({one.step for one in found.points} - {found.own.step}):
        own = [one.judged for one in found.points if one.step == step]
        best = verdict.chosen(own, running=True)
        chosen += [one for one in found.points if one.judged is best]
    base = ("0", "0", "-" if found.base is None else f"{found.base:.4f}", "", "", "", "", "(base)")
    rows = [_cells(one, found) for one in sorted(chosen, key=lambda one: (one.step, one.scale))]
    yield from columns([_HEAD, base, *rows], width)


def _cells(one: Point, found: Sweep) -> tuple[str, ...]:
    facts = one.judged.facts
    echo, gain = facts.echo, one.gain
    loss = "-" if facts.nll_tstar is None else f"{facts.nll_tstar:.4f}"
    whole, long = ("-", "-") if echo is None else (_of(echo.whole), _of(echo.long))
    words = "-" if echo is None or echo.windows is None else f"{echo.windows[0]:.1%}, held out {echo.windows[1]:.1%}"
    mark = " <- best" if one == found.best else " (this run's)" if one == found.own else ""
    told = "-" if gain is None else f"{gain.value:+.4f}"
    return f"{one.epoch:g}", f"{one.scale:g}", loss, told, whole, long, words, f"{one.judged.verdict}{mark}"


def _of(count: Any) -> str:
    return f"{count.yes}/{count.of}"
