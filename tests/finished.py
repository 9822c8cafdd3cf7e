"""A finished run, written by hand: two kept adapters that say something, what looks found, and a verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small
import tiny

from finetune import corpus, model, plan, recipe, runs
from finetune.runs import RunFolder

FORMATS = {"chatml": ("train", 1.42, 0.98), "alpaca": ("train", 1.51, 1.02), "zephyr": ("held_out", 1.60, 1.31)}


def run(place: Path, verdict: str = "ok", **changes: Any) -> Path:
    """`place/runs/done`, of `place/small.yaml`: adapters of epochs 2 and 4, the latter chosen."""
    file = small.recipe(place, **changes)
    wanted = recipe.load(file)
    folder = RunFolder(place / "runs" / "done")
    folder.path.mkdir(parents=True)
    runs.write_atomic(folder.recipe, recipe.resolved_yaml(wanted))
    runs.write_atomic(folder.source_recipe, file.read_bytes())
    examples, _ = plan.examples(wanted)
    runs.write_json(folder.split, corpus.split(examples, 0.25, 0).to_json())
    net = tiny.adapted(model.POCKET)
    for step, size in ((6, 0.02), (12, 0.05)):
        with folder.new_checkpoint(step, full=False) as made:
            model.save_adapter(tiny.stirred(net, size), made, "pocket")
    folder.install_adapter(folder.checkpoint_at(12))
    runs.append_lines(folder.metrics, _rows())
    runs.write_json(folder.run_json, _facts())
    runs.write_json(folder.verdict, _verdict(verdict))
    return folder.path


def _rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step, part in ((0, 0.0), (6, 0.6), (12, 1.0)):
        where = {"kind": "look", "look": "full", "step": step, "epoch": step / 3, "travel": step * 1e-3, "seconds": 1.0}
        for name, (_, base, tuned) in FORMATS.items():
            bpb = base + part * (tuned - base)
            found = {"nll": 2 * bpb, "nll_tstar": 2 * bpb, "accuracy": 0.4 + 0.2 * part, "bpb": bpb}
            found |= {"tokens": 100, "moved": 1.0 if step else 0.0, "distance": step * 0.1}
            rows.append({**where, "split": "held_out", "format": name, **found})
        if step:
            trained = {"lr": 1e-3, "travel": step * 1e-3, "loss": 1.0, "grad_norm": 1.0, "tokens": 400, "gib": 1.0}
            rows.append({"kind": "step", "step": step, "epoch": step / 3, **trained, "seconds": 5.0})
    return rows


def _facts() -> dict[str, Any]:
    return {
        "state": "finished",
        "version": "0.1",
        "seed": 0,
        "epochs": 4,
        "steps": 12,
        "chosen": {"step": 12, "epoch": 4.0, "travel": 0.012, "reason": "lowest held-out loss"},
        "device": {"type": "cpu", "threads": 1},
        "derived": {"travel": {"value": 0.012, "reason": "sum of the learning rate, constant"}},
        "spent": {"training": 10.0, "looking": 3.0, "share_looking": 3 / 13},
    }


def _verdict(word: str) -> dict[str, Any]:
    gain = {"value": 0.88, "low": 0.61, "high": 1.15, "n": 2, "resolved": True}
    unknown = {"value": None, "low": None, "high": None, "n": 0, "resolved": False}
    counted = {"value": 0.0, "low": None, "high": None, "n": 6, "resolved": True}
    return {
        "version": 1,
        "verdict": word,
        "reason": "Gain over the base on 2 held-out examples: in loss +0.880 nats per token; it learned.",
        "next": "Read its answers.",
        "epoch": 4.0,
        "step": 12,
        "axes": {
            "learned": gain,
            "recites": counted,
            "harmed": unknown,
        },
        "run": {"verdict": word, "epoch": 4.0, "stopped_by": "epochs"},
    }


def changed(folder: Path, name: str, **facts: Any) -> None:
    """Other facts in a JSON file of a run."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))
