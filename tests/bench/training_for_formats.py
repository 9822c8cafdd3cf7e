"""What makes a run hold in formats it never met: one trained format, five drawn each epoch, five and some sampled.

    .venv/bin/python tests/bench/training_for_formats.py [EPOCHS] [SEEDS] [FOLDER]

Pocket on its own dataset, one arm after another, everything else equal; each seed draws its own held-out examples, the
same in every arm. Means over seeds, and their range. Strangers are the formats that are of no family trained in any
arm; `kept` is their gain as a share of the arm's own mean gain in trained formats, by family. `echo`: 8-word windows of
trained answers echoed in excess, in the first trained format and in held-out ones. Runs are kept in FOLDER if one is
named, and gone on with.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console

from finetune import (
    ear,
    heard,
    lineup,
    night,
    opened,
    orders,
    prompts,
    reach,
    robustness,
    runs,
    starters,
    tables,
    transfer,
)
from finetune.looks import Place
from finetune.opened import Opened
from finetune.screen import Screen

FIVE = ["chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role"]
HELD_OUT = ["zephyr", "guanaco", "mistral-v1", "openchat-3.5", "xml-tags"]
ARMS: Mapping[str, dict[str, Any]] = {
    "one format": {"train": FIVE[:1]},
    "five, drawn each epoch": {"train": FIVE},
    "five + sampled 0.2": {"train": FIVE, "sampled": 0.2},
}
RATE, BATCH, RANK = 1e-3, 9, 16
SAMPLED = 20  # formats that are measured, of no run's own
PLAIN = lineup.Recipe(prompts.load(FIVE), prompts.load(HELD_OUT))


@dataclass(frozen=True)
class Result:
    """One run. Gains in bits per byte; None where a figure cannot be told."""

    loss: float
    gain: float
    strangers: float
    median: float | None
    least: float | None
    sampled: float | None
    slips: float | None
    excess: float
    excess_sampled: float
    below: float
    echo: float | None
    echo_held_out: float | None


def main() -> None:
    epochs, seeds = (int(word) for word in (*sys.argv[1:3], *("30", "3")[len(sys.argv[1:3]) :]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(name)
        found: dict[str, list[Result]] = {arm: [] for arm in ARMS}
        began = time.monotonic()
        for seed in range(seeds):
            for number, arm in enumerate(ARMS):
                run = trained(folder / f"arm-{number}-seed-{seed}", ARMS[arm], epochs, seed)
                found[arm].append(measured(run, folder))
                print(f"{arm}, seed {seed}: {time.monotonic() - began:.0f} s so far", file=sys.stderr)
        print(f"{epochs} epochs, {seeds} seeds, rank {RANK}, learning rate {RATE:g}, batch {BATCH}\n")
        print("\n".join(table(found)))


def trained(folder: Path, formats: Mapping[str, Any], epochs: int, seed: int) -> Path:
    """A finished run of one arm."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "base": "pocket",
        "quantization": "none",
        "lora": {"rank": RANK, "alpha": RANK},
        "data": {"train": str(starters.find("pocket", "datasets")), "held_out": 0.25},
        "formats": {"held_out": HELD_OUT, **formats},
        "optimizer": {"learning_rate": RATE},
        "epochs": epochs,
        "batch_size": BATCH,
        "watch": {"every": epochs, "stop_at": "never"},
        "seed": seed,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    task = orders.read(orders.Order(str(path), out=folder / "run"))
    night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)
    return folder / "run"


def measured(run: Path, shared: Path) -> Result:
    """The adapter after the last epoch, read in the lineup of all arms."""
    one = opened.read(run)
    last, adapter = max(one.kept())
    speaker = opened.wear(one, adapter).speaker
    suite = lineup.suite()
    strangers = {gauge.name for gauge in lineup.whole(PLAIN, suite) if gauge.group == "held_out"}
    named = tuple(name for name in suite.named if name in strangers)
    suite = suite.model_copy(update={"named": named, "sampled": SAMPLED})
    store = robustness.Store(shared / reach.NAME, "pocket, fp32")
    whole = robustness.measure(speaker, one.plan, suite, last, store, write=False)
    known = [row for row in whole.formats if row.group not in ("near", "held_out") or row.name in strangers]
    known = [replace(row, group="held_out") if row.name in strangers else row for row in known]
    found = transfer.transfer(whole.tuned, whole.base, known)
    gains = [row.base - row.tuned for row in found.standings if row.group == "held_out"]
    echoes = [echoed(one, speaker, names, last) for names in (one.recipe.formats.train[:1], HELD_OUT)]
    heads = found.headlines
    return Result(
        loss=next(row["loss"] for row in reversed(steps(one)) if row["step"] == last),
        gain=found.reference.value if found.reference else float("nan"),
        strangers=fmean(gains),
        median=heads["held_out"].median if "held_out" in heads else None,
        least=heads["held_out"].least.tau.value if "held_out" in heads else None,
        sampled=heads["sampled"].median if "sampled" in heads else None,
        slips=heads["slip"].median if "slip" in heads else None,
        excess=found.spreads["named"].excess,
        excess_sampled=found.spreads["sampled"].excess,
        below=len(found.below),
        echo=echoes[0],
        echo_held_out=echoes[1],
    )


def steps(one: Opened) -> list[Mapping[str, Any]]:
    return [row for row in runs.read_lines(one.run.metrics) if row["kind"] == "step"]


def echoed(one: Opened, speaker: Any, names: Sequence[str], step: int) -> float | None:
    """Share of 8-word windows of the trained answers, all formats together."""
    listens = ear.ear(one.plan)
    passages = [row for name in names for row in listens.passages("train", name)]
    base = ear.Base(one.run, heard.read(speaker, passages, base=True))
    rows = ear.hear(listens, speaker, base, passages, Place("closing", step, one.epoch(step), 0.0)).measured.found
    windows = [row.words for row in rows if row.words]
    return sum(row.yes for row in windows) / sum(row.of for row in windows) if windows else None


HEADS: Mapping[str, tuple[str, str]] = {
    "loss": ("train loss", ".2f"),
    "gain": ("gain, trained", ".3f"),
    "strangers": ("gain, strangers", ".3f"),
    "median": ("kept, median", ".2f"),
    "least": ("kept, least", ".2f"),
    "sampled": ("kept, sampled", ".2f"),
    "slips": ("kept, slips", ".2f"),
    "excess": ("excess spread", "+.3f"),
    "excess_sampled": ("of sampled", "+.3f"),
    "below": ("below base", ".1f"),
    "echo": ("echo", ".1%"),
    "echo_held_out": ("echo, held-out", ".1%"),
}


def table(found: Mapping[str, Sequence[Result]]) -> list[str]:
    """One line a figure, one column an arm: the mean over seeds and, of several, from least to most."""
    rows = [["", *found]]
    for key, (title, how) in HEADS.items():
        rows.append([title, *(_cell([getattr(one, key) for one in some], how) for some in found.values())])
    return tables.columns(rows)


def _cell(values: Sequence[float | None], how: str) -> str:
    known = [one for one in values if one is not None]
    if not known:
        return "not resolvable"
    across = f" ({min(known):{how}} to {max(known):{how}})" if len(known) > 1 else ""
    missing = f", {len(values) - len(known)} not resolvable" if len(known) < len(values) else ""
    return f"{fmean(known):{how}}{across}{missing}"


if __name__ == "__main__":
    main()
