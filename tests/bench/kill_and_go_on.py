"""`sft train` killed N times with SIGKILL at random moments, against the same command left alone.

    .venv/bin/python tests/bench/kill_and_go_on.py RECIPE N [KEY=VALUE]...

Prints what was gained on held-out examples and whether `adapter/` and the last checkpoint's weights are byte-equal.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune import runs
from finetune.runs import RunFolder

HERE = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"


def start(recipe: str, sets: list[str], run: Path) -> subprocess.Popen[bytes]:
    words = [str(HERE / ".venv/bin/sft"), "train", recipe, "--out", str(run)]
    words += [word for one in sets for word in ("--set", one)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    told = process.communicate()[1]
    if process.returncode:
        sys.exit(told.decode())


def main() -> None:
    recipe, kills, sets = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        alone, killed = Path(name) / "alone", Path(name) / "killed"
        began = time.monotonic()
        finish(start(recipe, sets, alone))
        wall = time.monotonic() - began
        print(f"left alone: {wall:.0f} s")
        for _ in range(kills):
            process = start(recipe, sets, killed)
            time.sleep(draw.uniform(12, 12 + wall / (kills + 1)))
            process.kill()
            process.wait()
            rows = runs.read_lines(killed / "metrics.jsonl") if (killed / "metrics.jsonl").exists() else []
            print(f"killed at step {rows[-1]['step'] if rows else 0}")
        finish(start(recipe, sets, killed))
        report(alone, killed)


def report(alone: Path, killed: Path) -> None:
    rows = [row for row in runs.read_lines(alone / "metrics.jsonl") if row["kind"] == "look"]
    first = rows[0]["format"]
    held = [row for row in rows if row["split"] == "held_out" and row["format"] == first]
    chosen = runs.read_json(alone / "run.json")["chosen"]
    best = next(row for row in held if row["step"] == chosen["step"])
    print(f"held-out nll: base {held[0]['nll']:.4f}, chosen {best['nll']:.4f} (epoch {best['epoch']:g})")
    print(f"lora_A moved: {best['moved']:.1%}")
    for label, folders in (
        ("adapter/", [one / "adapter" for one in (alone, killed)]),
        ("last checkpoint", [RunFolder(one).newest_valid(full=True).folder for one in (alone, killed)]),  # type: ignore[union-attr]
    ):
        same = len({(folder / WEIGHTS).read_bytes() for folder in folders}) == 1
        print(f"{label}: {'byte-equal' if same else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
