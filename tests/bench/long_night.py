"""Does a night grow slower or larger? Epoch 600 beside epoch 2, of a whole run with its looks, free map and page.

    .venv/bin/python tests/bench/long_night.py [EPOCHS]

Pocket in NF4 on ten trained and two held-out examples of datasets/pocket, two steps an epoch. CPU seconds of this
process an epoch, for wall time depends on what else the machine does: medians over twenty epochs, looks left out;
resident memory at their ends.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import yaml
from rich.console import Console

from finetune import night, orders, runs, starters
from finetune.screen import Screen

SPAN = 20  # epochs of a median


class Clock(Screen):
    """A screen that shows nothing and keeps the time and the memory of every step."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.took: dict[int, float] = {}
        self.gib: dict[int, float] = {}
        self._last: float | None = None

    def step(self, row: Mapping[str, Any]) -> None:
        now, step = time.process_time(), int(row["step"])
        if self._last is not None:
            self.took[step] = now - self._last
        self.gib[step] = psutil.Process().memory_info().rss / 2**30
        self._last = now
        super().step(row)

    def look(self, *given: Any) -> None:
        self._last = None  # the step after a look holds it
        super().look(*given)


def recipe(folder: Path, epochs: int) -> Path:
    data = folder / "data"
    data.mkdir()
    for path in sorted(starters.find("pocket", "datasets").glob("[a-f]*.md"))[:12]:
        (data / path.name).write_bytes(path.read_bytes())
    path = folder / "recipe.yaml"
    settings = {
        "base": "pocket",
        "data": {"train": str(data), "held_out": 0.2},
        "formats": {"train": ["chatml", "alpaca"], "held_out": ["zephyr"], "sampled": 0.2},
        "optimizer": {"learning_rate": 1e-5},
        "epochs": epochs,
        "batch_size": 5,
        "watch": {"budget": 0.05, "stop_at": "never"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as name:
        folder, clock = Path(name), Clock()
        night.run(orders.read(orders.Order(str(recipe(folder, epochs)), out=folder / "run")), clock)
        per_epoch = max(clock.gib) // epochs
        spent = runs.read_json(folder / "run" / "run.json")["spent"]
    print(f"{epochs} epochs of {per_epoch} steps; looks took {spent['share_looking']:.1%} of the time")
    print(f"{'':16}{'CPU s/epoch':>12}{'GiB':>8}")
    rows = []
    for first in (2, *(epochs * share // 10 for share in (1, 2, 4, 6, 8)), epochs - SPAN + 1):
        steps = range((first - 1) * per_epoch + 1, (first - 1 + SPAN) * per_epoch + 1)
        seconds = per_epoch * statistics.median(clock.took[one] for one in steps if one in clock.took)
        rows.append((seconds, clock.gib[steps[-1]]))
        print(f"epochs {first}-{first + SPAN - 1:<8}{seconds:12.3f}{rows[-1][1]:8.3f}")
    print(f"{'last / first':16}{rows[-1][0] / rows[0][0]:12.3f}{rows[-1][1] / rows[0][1]:8.3f}")
    print(f"{'last / second':16}{rows[-1][0] / rows[1][0]:12.3f}{rows[-1][1] / rows[1][1]:8.3f}")


if __name__ == "__main__":
    main()
