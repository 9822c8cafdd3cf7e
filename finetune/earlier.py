"""What a run on this machine took before: its tokens a second, and the seconds of its looks. Read from run folders.

Only of the same base, trained in the same way. Another program's rows and torn ones are passed over.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import disk, recipe
from finetune.burden import Kind
from finetune.errors import UserError
from finetune.recipe import Recipe
from finetune.runs import RunFolder

_RECENT = 200  # steps that are averaged


@dataclass(frozen=True)
class Earlier:
    """`rate`: tokens of training a second. `looks`: median seconds by kind; empty where it looked at other texts."""

    folder: Path
    rate: float
    looks: Mapping[Kind, float]


def newest(wanted: Recipe, shelf: Path = Path("runs")) -> Earlier | None:
    """The newest run below `shelf` that trained the same base in the same way and took a step; None without one."""
    folders = [one.parent for one in shelf.glob("*/metrics.jsonl")]
    for folder in sorted(folders, key=lambda one: one.stat().st_mtime, reverse=True):
        run = RunFolder(folder)
        try:
            was = recipe.load_resolved(run.recipe)
        except UserError:
            continue
        if _way(was) == _way(wanted) and (found := _measured(run, _asked(was) == _asked(wanted))):
            return found
    return None


def _way(one: Recipe) -> tuple[Any, ...]:
    """What decides how fast a step is, beside the texts."""
    return one.base, one.quantization, one.lora.layers, one.batch_size, one.machine.activation_checkpointing


def _asked(one: Recipe) -> tuple[Any, ...]:
    """What decides how long a look takes, beside the base."""
    return one.data, one.formats, one.watch.prompts, one.seed


def _measured(run: RunFolder, same: bool) -> Earlier | None:
    """Medians of the last steps, for the first of a process is slow and none is typical, and of looks."""
    rates: list[float] = []
    looks: dict[Kind, list[float]] = defaultdict(list)
    for row in (row for _, _, row in disk.numbered_lines(run.metrics) if row is not None):
        try:
            if row["kind"] == "step" and row["seconds"] > 0:
                rates.append(row["tokens"] / row["seconds"])
            elif row["kind"] == "look" and "took" in row:
                looks["base" if row["step"] == 0 else row["look"]].append(row["took"])
        except (KeyError, TypeError):
            continue
    if not rates:
        return None
    medians = {kind: statistics.median(took) for kind, took in looks.items()} if same else {}
    return Earlier(run.path, statistics.median(rates[-_RECENT:]), medians)
