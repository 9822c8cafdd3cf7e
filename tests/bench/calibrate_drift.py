"""Where drift's cuts lie on a base: healthy runs, the largest change each axis showed in them, and the entry to write.

    .venv/bin/python tests/bench/calibrate_drift.py [RECIPE] [SEEDS] [key=value ...]

By default `recipes/quickstart.yaml` and three seeds, a full look every six epochs. Counted are the full looks up to the
adapter that each run chose; a run whose verdict is overfit is not healthy and is left out, aloud. Prints an item of
`calibrated` in `eval/drift.yaml`; whoever pastes it there says yes to it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path

import yaml
from rich.console import Console

from finetune import forgotten, keeping, model, night, opened, orders, runs, suite
from finetune.forgotten import Summary
from finetune.opened import Opened
from finetune.runs import RunFolder
from finetune.screen import Screen

ROOT = Path(__file__).resolve().parents[2]
_USUAL = ("watch.every=6", "watch.stop_at=never")


def trained(recipe: Path, folder: Path, sets: Sequence[str]) -> Opened:
    """A finished run."""
    task = orders.read(orders.Order(str(recipe), out=folder, sets=tuple(sets)))
    night.run(task, Screen(Console(file=io.StringIO())))
    return opened.read(folder)


def looks(run: RunFolder, until: int) -> Iterator[Summary]:
    """What drift showed at every full look up to a step."""
    rows = [row for row in runs.read_lines(run.findings) if row["probe"] == "drift"]
    for step in sorted({row["step"] for row in rows if row["step"] <= until}):
        if (found := forgotten.summary(rows, step)) is not None:
            yield found


def main(recipe: str = str(ROOT / "recipes/quickstart.yaml"), seeds: str = "3", *sets: str) -> None:
    seen: list[dict[suite.Axis, float]] = []
    healthy = 0
    with tempfile.TemporaryDirectory() as work:
        for seed in range(int(seeds)):
            run = trained(Path(recipe), Path(work) / str(seed), [f"seed={seed}", *_USUAL, *sets])
            said = keeping.read(run.run)
            verdict = said["verdict"] if said else "none"
            print(f"seed {seed}: {verdict}, chosen step {run.chosen}", flush=True)
            if verdict == "overfit" or run.chosen is None:
                print("  not healthy: left out")
                continue
            healthy += 1
            for found in looks(run.run, run.chosen):
                shares = {one.axis: one.share for one in found.moved if one.share is not None}
                print("  step", found.step, {axis: round(share, 4) for axis, share in shares.items()}, flush=True)
                seen.append({axis: shares[axis] for axis in suite.AXES if axis in shares})
        if not seen:
            raise SystemExit("no healthy run: no cuts")
        origin = f"{healthy} runs of {Path(recipe).name} {' '.join(sets)}".strip()
        entry = suite.Calibration(
            base=run.base.name,
            fingerprint=model.fingerprint(run.base.folder),
            origin=f"{origin}, {len(seen)} looks, {date.today()}",
            cuts=suite.fit(seen),
        )
        print(yaml.safe_dump([entry.model_dump()], sort_keys=False, width=120))


if __name__ == "__main__":
    main(*sys.argv[1:])
