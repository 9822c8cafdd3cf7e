"""Does it recite, and does it still generalise? Learning rates, ranks and many gentle passes, side by side on pocket.

    .venv/bin/python tests/bench/arms.py FOLDER [ARM ...]

Each arm is `sft train recipes/quickstart.yaml` with a few settings changed, nothing stopped, a full look every five
epochs (every twentieth of the longest). Prints every arm by epoch and travel, then all arms where their training loss
first falls below each of a few levels: only there can they be compared. Runs that are in FOLDER already are read only.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import evidence, runs
from finetune.evidence import Setting

HERE = Path(__file__).resolve().parents[2]
ARMS: dict[str, dict[str, Any]] = {
    "gentle": {"optimizer.learning_rate": 3e-4, "epochs": 60},
    "harsh": {"optimizer.learning_rate": 5e-3, "epochs": 60},
    "rank 4": {"optimizer.learning_rate": 5e-3, "epochs": 40, "lora.rank": 4, "lora.alpha": 4},
    "rank 64": {"optimizer.learning_rate": 5e-3, "epochs": 40, "lora.rank": 64, "lora.alpha": 64},
    "few passes": {"optimizer.learning_rate": 3e-3, "epochs": 20, "watch.every": 2},
    "many passes": {"optimizer.learning_rate": 3e-4, "epochs": 200, "watch.every": 20},
}
LEVELS = (4.5, 4.0, 3.0, 2.0, 1.0, 0.5)  # nats per token, on the whole training set


def run(folder: Path, name: str) -> runs.RunFolder:
    out = folder / name.replace(" ", "-")
    if not out.exists():
        sets = {"watch.every": 5, "watch.stop_at": "never", **ARMS[name]}
        words = [f"--set={key}={value}" for key, value in sets.items()]
        command = [
            str(HERE / ".venv/bin/sft"),
            "train",
            str(HERE / "recipes/quickstart.yaml"),
            "--out",
            str(out),
            *words,
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return runs.RunFolder(out)


def looks(done: runs.RunFolder) -> Iterator[dict[str, Any]]:
    """One for each full look: losses of the three splits, and what is echoed."""
    metrics, examples = runs.read_lines(done.metrics), runs.read_lines(done.examples)
    setting = Setting("chatml")
    for facts in evidence.facts(metrics, examples, [], setting):
        rows = [
            row for row in metrics if row["kind"] == "look" and row["step"] == facts.step and row["format"] == "chatml"
        ]
        by = {row["split"]: row for row in rows}
        if "train" not in by or facts.echo is None:
            continue
        yield {
            "epoch": facts.epoch,
            "travel": facts.travel,
            "train": by["train"]["nll"],
            "held_out": by["held_out"]["nll_tstar"],
            "twin": by["twin"]["nll"] if "twin" in by else None,
            "r8x": facts.echo.windows[0] if facts.echo.windows else None,
            "long": facts.echo.long.yes,
            "whole": facts.echo.whole.yes,
        }


def line(name: str, one: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return format(one[key], form) if one[key] is not None else "-"

    return (
        f"{name:12}{one['epoch']:7.0f}{one['travel']:9.4f}{number('train', '9.3f')}{number('held_out', '9.3f')}"
        f"{number('twin', '9.3f')}{number('r8x', '9.1%')}{one['long']:6}{one['whole']:7}"
    )


def warning(done: runs.RunFolder) -> str:
    """Travel between an example's first 8-word echo and its first of 50 tokens, as a share of the travel so far."""
    rows = [r for r in runs.read_lines(done.examples) if r["split"] == "train" and r["step"] > 0]
    words: dict[str, float] = {}
    long: dict[str, float] = {}
    for row in rows:
        if row.get("windows") and row["windows"][0]:
            words.setdefault(row["id"], row["travel"])
        if row.get("long"):
            long.setdefault(row["id"], row["travel"])
    if not long:
        return f"{len(words)} examples echo 8 words, none 50 tokens"
    shares = [1 - words.get(name, at) / at for name, at in long.items()]
    ahead = 1 - min(words.values()) / min(long.values())
    return (
        f"{len(words)} examples echo 8 words, {len(long)} 50 tokens; the run's first warning comes {ahead:.0%} of the "
        f"travel ahead, an example's own {statistics.median(shares):.0%} (median)"
    )


HEAD = f"{'arm':12}{'epoch':>7}{'travel':>9}{'train':>9}{'held-out':>9}{'twins':>9}{'R8x':>9}{'L50':>6}{'whole':>7}"


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(ARMS)
    found = {}
    for name in names:
        done = run(folder, name)
        found[name] = list(looks(done))
        print(f"\n{HEAD}")
        print("\n".join(line(name, one) for one in found[name]))
        print(f"{name}: {warning(done)}", flush=True)
    for level in LEVELS:
        at = {name: next((one for one in some if one["train"] < level), None) for name, some in found.items()}
        print(f"\nfirst look with a training loss below {level:g}\n{HEAD}")
        print("\n".join(line(name, one) if one else f"{name:12} never" for name, one in at.items()))


if __name__ == "__main__":
    main()
