"""What a calibration found, kept for each machine: asked for in a process of its own, read without torch, summed up.

One JSON file in the user's cache folder. A record that is damaged, or of another machine, version, base shape or
adapter, is not there. It measures nothing itself, and never raises for what the file or the process does.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import burden, disk, machine
from finetune.bases import Known
from finetune.burden import Burden, Kind
from finetune.errors import Problem
from finetune.memory import Shape
from finetune.plan import Plan

BUDGET = 10.0  # seconds a calibration may measure; loading libraries and making a base come before
_PATIENCE = 300.0  # seconds after which one is given up
_MOST = 40  # records kept
_FORM = 2  # of a record
_EPOCHS = 3  # epochs whose micro-batches stand for all: only drawn formats tell them apart
_LISTS = ("tokens", "layer", "again", "forward", "rest", "head", "head_forward")
_SINGLE = ("step_layer", "step_rest", "a_layer", "took", "write_layer", "write_rest")
_TRAINER = 0.006  # seconds a step that the library's own loop takes beside, measured on one CPU core
_WRITER = 0.001  # the same for a written token
_HEARD = 0.002  # the same for a text that is judged
_SPECK = 1e-9  # seconds no figure is below


@dataclass(frozen=True)
class Calibration:
    """Seconds at so many `tokens` in one micro-batch, ascending; each list is as long.

    `layer`: one decoder layer forward and backward; `again`: what its checkpointing adds; `forward`: without gradients;
    `rest`: what the decoder does beside its layers; `head`: as many tokens through the head, `head_forward`: and asked
    all that a look asks of them; `step_layer`, `step_rest`: an optimizer step; `write_layer`, `write_rest`: one token
    more of each answer. `a_layer`: bytes kept a token and layer as on CUDA. `card_gib`: memory of the card it ran on.
    """

    tokens: tuple[int, ...]
    layer: tuple[float, ...]
    again: tuple[float, ...]
    forward: tuple[float, ...]
    rest: tuple[float, ...]
    head: tuple[float, ...]
    head_forward: tuple[float, ...]
    step_layer: float
    step_rest: float
    a_layer: float
    took: float
    write_layer: float
    write_rest: float
    card_gib: float | None = None


def request(made: Plan, known: Known) -> dict[str, Any] | None:
    """What is measured: all that decides how fast a layer is. None of a base nobody knows anything of."""
    wanted = made.recipe
    config = known.config or (_config(known.shape) if known.shape else None)
    if config is None:
        return None
    lora = wanted.lora
    adapter = {"rank": lora.rank, "targets": list(lora.targets), "dropout": lora.dropout}
    work = {
        "quantization": wanted.quantization,
        "optimizer": wanted.optimizer.name,
        "each": _about(made.longest()),
        "twice": made.recipe.machine.activation_checkpointing is True,
        "answers": _about(burden.answers(made, full=True)),
    }
    return {"config": dict(config), **work, **adapter}


def _about(count: int) -> int:
    """Up to a power of two, 0 as 1: one example a token longer need not be measured anew."""
    return 1 << max(0, count - 1).bit_length()


def _config(shape: Shape) -> dict[str, Any]:
    """A config.json of a base of which only the shape is known."""
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }


def _file() -> Path:
    return disk.home("calibration") / "kept.json"


def _name(asked: Mapping[str, Any]) -> str:
    made = json.dumps([_FORM, machine.speed(), asked], sort_keys=True, default=str)
    return hashlib.sha256(made.encode()).hexdigest()[:32]


def kept(asked: Mapping[str, Any]) -> Calibration | None:
    """What was measured here for the same request; None where nothing usable is kept."""
    return _read(_records().get(_name(asked)))


def _records() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read(record: Any) -> Calibration | None:
    """A record as it should be: lists of one length, finite, nothing below nothing."""
    try:
        lists: dict[str, Any] = {name: tuple(record[name]) for name in _LISTS}
        single: dict[str, Any] = {name: float(record[name]) for name in _SINGLE}
        size = record["card_gib"]
        found = Calibration(**lists, **single, card_gib=None if size is None else float(size))
        numbers = [one + 0.0 for some in lists.values() for one in some] + list(single.values())
    except (TypeError, ValueError, KeyError, OverflowError):
        return None
    whole = found.tokens and {len(some) for some in lists.values()} == {len(found.tokens)}
    rising = all(a < b for a, b in zip((0, *found.tokens), found.tokens, strict=False))
    return found if whole and rising and all(0 <= one < 1e9 for one in numbers) else None


def _keep(asked: Mapping[str, Any], found: Calibration) -> None:
    """Write it beside the others, the oldest of which go. A cache folder that cannot be written keeps nothing."""
    name, records = _name(asked), _records()
    records.pop(name, None)
    newest = dict([*records.items(), (name, asdict(found))][-_MOST:])
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(_file(), json.dumps(newest))


def calibrate(asked: Mapping[str, Any], tokens: Sequence[int]) -> Calibration | Problem:
    """Measure in a process of its own, up to the largest of `tokens`, and keep it. A Problem where that failed."""
    words = [sys.executable, "-m", "finetune.calibrate"]
    given = json.dumps({**asked, "tokens": list(tokens), "budget": BUDGET})
    try:
        with tempfile.TemporaryDirectory(prefix="sft-calibration-") as place:  # ours to empty, should it be killed
            there = {**os.environ, "TMPDIR": place}
            how: dict[str, Any] = {"input": given, "capture_output": True, "text": True, "env": there}
            done = subprocess.run(words, timeout=_PATIENCE, check=False, **how)
    except subprocess.TimeoutExpired:
        return _failed(f"it was not done after {_PATIENCE:.0f} s")
    except OSError as fault:
        return _failed(str(fault))
    if done.returncode < 0:
        return _failed(f"it was killed (signal {-done.returncode}), as the system does when memory runs out")
    if done.returncode:
        return _failed((done.stderr.strip().splitlines() or ["it said nothing"])[-1][:200])
    if (found := _printed(done.stdout)) is None:
        return _failed("it gave no figures")
    _keep(asked, found)
    return found


def _printed(said: str) -> Calibration | None:
    with suppress(ValueError, IndexError):
        return _read(json.loads(said.strip().splitlines()[-1]))
    return None


def _failed(why: str) -> Problem:
    what = f"The calibration gave nothing: {why}."
    return Problem(what, "Time and memory below are guesses; try again when the machine is free.")


# what it amounts to


@dataclass(frozen=True)
class Work:
    """What a night does: layers trained forward and backward, layers read forward only, and how often anew.

    `again`: layers whose forward is done twice. `filled`: lower layers that every text passes once.
    """

    trained: int
    read: int
    again: int
    filled: int


def range_of(made: Plan) -> list[int]:
    """Token counts worth measuring: the smallest micro-batch of a few epochs, the largest, one between."""
    sizes = [tokens for epoch in _some(made) for step in made.micro_batches(epoch) for tokens in step]
    low, high = min(sizes), max(sizes)
    return sorted({low, round((low * high) ** 0.5), high})


def training_seconds(made: Plan, work: Work, by: Calibration) -> float:
    """Of all epochs, without looks."""
    epochs = _some(made)
    items = made.epochs.order(0)
    share = sum(item.supervised for item in items) / sum(len(item.ids) for item in items)
    total = 0.0
    for epoch in epochs:
        total += sum(step_seconds(step, share, work, by) for step in made.micro_batches(epoch))
    return total * made.recipe.epochs / len(epochs)


def _some(made: Plan) -> list[int]:
    """Epochs, counted from 0, spread over the night."""
    return sorted({round(one * (made.recipe.epochs - 1) / max(1, _EPOCHS - 1)) for one in range(_EPOCHS)})


def step_seconds(step: Sequence[int], share: float, work: Work, by: Calibration) -> float:
    """Of one step, given the tokens of its micro-batches and the share of them that are in the loss."""
    own = _TRAINER + by.step_rest + by.step_layer * work.trained
    return own + sum(_micro_batch(tokens, share, work, by) for tokens in step)


def _micro_batch(tokens: int, share: float, work: Work, by: Calibration) -> float:
    layers = work.trained * _at(by, by.layer, tokens) + work.again * _at(by, by.again, tokens)
    return (
        layers + work.read * _at(by, by.forward, tokens) + _at(by, by.rest, tokens) + _at(by, by.head, share * tokens)
    )


def looking_seconds(made: Plan, work: Work, by: Calibration) -> float:
    """Of all planned looks, the base's included, while no example echoes."""
    return sum(count * look_seconds(burden.look(made, kind), work, by) for kind, count in _planned(made).items())


def looking_worth(made: Plan) -> float:
    """Tokens read once that they are as much work as."""
    return sum(count * burden.look(made, kind).worth for kind, count in _planned(made).items())


def looking_as_before(made: Plan, took: Mapping[Kind, float]) -> float | None:
    """The same where each kind of look took so many seconds before; None where a planned kind was never taken."""
    planned = {kind: count for kind, count in _planned(made).items() if count}
    return sum(count * took[kind] for kind, count in planned.items()) if planned.keys() <= took.keys() else None


def _planned(made: Plan) -> Mapping[Kind, int]:
    return {"base": 1, "light": len(made.looks.light), "full": len(made.looks.full)}


def look_seconds(asked: Burden, work: Work, by: Calibration) -> float:
    """Of one: texts read and scored one like the other, and answers written, as long as the taught ones are."""
    layers, texts = work.trained + work.read, max(asked.texts, 1)
    middle = by.tokens[len(by.tokens) // 2]
    reading = asked.read * layers * _at(by, by.forward, middle) / middle
    scoring = texts * (_at(by, by.head_forward, asked.scored / texts) + _HEARD)
    a_token = _WRITER + by.write_rest + (layers + work.filled) * by.write_layer
    return reading + scoring + asked.written * a_token


def filling_seconds(made: Plan, work: Work, by: Calibration) -> float:
    """Of what the lower layers make of every text, once; of one in a drawn format, whenever it is."""
    texts = made.texts
    items = [*texts.whole.values(), *texts.held_out.values(), *texts.twins.values(), *texts.replay]
    seconds = sum(_at(by, by.forward, len(item.ids)) for item in items)
    besides = burden.besides(made, len(made.looks.full) + made.looks.alarm)
    drawn = made.recipe.formats.sampled * made.recipe.epochs * sum(len(item.ids) for item in made.epochs.order(0))
    return work.filled * (seconds + (besides + drawn) * _at(by, by.forward, by.tokens[0]) / by.tokens[0])


def _at(by: Calibration, seconds: Sequence[float], tokens: float) -> float:
    """Between two measured counts along a line, beyond them along the last; never below a share of the least."""
    counts = by.tokens
    if len(counts) == 1:
        return seconds[0] * tokens / counts[0]
    right = min(max(1, bisect_left(counts, tokens)), len(counts) - 1)
    (a, b), (low, high) = counts[right - 1 : right + 1], seconds[right - 1 : right + 1]
    return max(low + (high - low) * (tokens - a) / (b - a), min(seconds) * min(1.0, tokens / counts[0]), _SPECK)
