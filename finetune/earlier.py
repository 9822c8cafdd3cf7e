"""What runs on this machine took before: tokens a second, and the seconds of looks. Read from run folders.

Only of the same base, trained in the same way. Another program's rows and torn ones are passed over.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import disk, recipe, runs
from finetune.burden import Kind
from finetune.errors import UserError
from finetune.recipe import Recipe
from finetune.runs import RunFolder

_RECENT = 200  # steps that are averaged
RENDERED = "rendered texts"  # among a run's fingerprints


@dataclass(frozen=True)
class Earlier:
    """`rate`: tokens of training a second. `looks`: median seconds by kind; empty where other texts were looked at."""

    folder: Path
    rate: float
    looks: Mapping[Kind, float]


def newest(wanted: Recipe, texts: str, shelf: Path = Path("runs")) -> Earlier | None:
    """The newest run below `shelf` that trained the same base in the same way and took a step; None without one.

    `texts`: the plan's fingerprint. Looks are those of the newest run at the very same texts and questions.
    """
    found: Earlier | None = None
    folders = [one.parent for one in shelf.glob("*/metrics.jsonl")]
    for folder in sorted(folders, key=lambda one: one.stat().st_mtime, reverse=True):
        run = RunFolder(folder)
        try:
            was = recipe.load_resolved(run.recipe)
        except UserError:
            continue
        if _way(was) != _way(wanted):
            continue
        same = (was.formats, was.watch.prompts) == (wanted.formats, wanted.watch.prompts) and _texts(run) == texts
        if found is None:
            found = _measured(run, same)
        elif same and (other := _measured(run, same)):
            found = Earlier(found.folder, found.rate, other.looks)
        if found and found.looks:
            return found
    return found


def _way(one: Recipe) -> tuple[Any, ...]:
    """What decides how fast a step is, beside the texts."""
    return one.base, one.quantization, one.lora.layers, one.batch_size, one.machine.activation_checkpointing


def _texts(run: RunFolder) -> str | None:
    """The fingerprint of what a run trains and measures; None where it says none."""
    try:
        return str(runs.read_json(run.run_json)["fingerprints"][RENDERED])
    except (UserError, OSError, KeyError, TypeError):
        return None


def _measured(run: RunFolder, same: bool) -> Earlier | None:
    """Medians of the last steps, for the first of a process is slow and none is typical, and of planned looks."""
    rates: list[float] = []
    looks: dict[Kind, list[float]] = defaultdict(list)
    for row in (row for _, _, row in disk.numbered_lines(run.metrics) if row is not None):
        try:
            if row["kind"] == "step" and (rate := row["tokens"] / row["seconds"]) > 0:
                rates.append(rate)
            elif row["kind"] == "look" and "cause" not in row and 0 < (took := float(row["took"])) < math.inf:
                looks["base" if row["step"] == 0 else row["look"]].append(took)
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
    if not rates:
        return None
    medians = {kind: statistics.median(took) for kind, took in looks.items()} if same else {}
    return Earlier(run.path, statistics.median(rates[-_RECENT:]), medians)
