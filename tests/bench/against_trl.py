"""`sft train` beside `trl sft` in one run: same base, rows, supervised tokens, dtype, threads, epochs and machine.

    .venv/bin/python tests/bench/against_trl.py [ROUNDS]

Prints a table of medians. The ratio is void where tokens differ or the loss curves do not agree. Looks are on for ours.
All start from a cold process: imports and loading are in the wall time, and told apart from the steps. Beside them ours
with the top quarter alone, one layer of four: fewer weights learn, so its loss is told and no ratio rests on it. Only
its first round has to store the activations.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune import plan, recipe, runs
from finetune.model import POCKET

HERE = Path(__file__).resolve().parents[2]
EPOCHS, BATCH, RATE = 20, 9, 3e-4
LOSS = re.compile(r"'loss': '?([0-9.]+)'?")


def our_recipe(folder: Path, top: int | None = None) -> Path:
    path = folder / f"ours-{top}.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "base": "pocket",
                "data": {"train": str(HERE / "datasets/pocket"), "held_out": 0.25},
                "formats": {"train": ["chatml"], "held_out": ["zephyr"]},
                "lora": {"layers": "all" if top is None else {"top": top}},
                "optimizer": {"learning_rate": RATE},
                "epochs": EPOCHS,
                "batch_size": BATCH,
            }
        )
    )
    return path


def their_rows(path: Path, folder: Path) -> tuple[Path, int, int]:
    """The very rows of our run as token ids and labels, with their tokens and supervised tokens an epoch."""
    made = plan.make(recipe.load(path), POCKET)
    items = made.epochs.order(0)
    rows = [
        {"input_ids": list(i.ids), "labels": [t if on else -100 for t, on in zip(i.ids, i.trained, strict=True)]}
        for i in items
    ]
    data = folder / "rows"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data, sum(len(i.ids) for i in items), sum(i.supervised for i in items)


def their_config(data: Path, folder: Path) -> Path:
    path = folder / "theirs.yaml"
    settings: dict[str, Any] = {
        "model_name_or_path": str(POCKET),
        "dtype": "float32",
        "dataset_name": str(data),
        "dataset_train_split": "train",
        "output_dir": str(folder / "trl"),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_length": 4096,
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "optim": "adamw_torch",
        "seed": 0,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def timed(command: list[str]) -> tuple[float, str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return time.monotonic() - began, done.stdout + done.stderr


def ours(path: Path, folder: Path, number: int) -> dict[str, Any]:
    run = folder / f"run-{path.stem}-{number}"
    wall, _ = timed([str(HERE / ".venv/bin/sft"), "train", str(path), "--out", str(run)])
    rows = [row for row in runs.read_lines(run / "metrics.jsonl") if row["kind"] == "step"]
    spent = runs.read_json(run / "run.json")["spent"]
    return {
        "wall": wall,
        "steps": spent["training"],
        "losses": [row["loss"] for row in rows],
        "tokens": sum(row["tokens"] for row in rows),
        "looking": spent["share_looking"],
    }


def theirs(config: Path) -> dict[str, Any]:
    wall, told = timed([str(HERE / ".venv/bin/trl"), "sft", "--config", str(config)])
    runtime = float(re.findall(r"'train_runtime': '?([0-9.]+)'?", told)[-1])
    tokens = float(re.findall(r"'num_tokens': '?([0-9.e+]+)'?", told)[-1])
    return {"wall": wall, "steps": runtime, "losses": [float(x) for x in LOSS.findall(told)], "tokens": tokens}


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = our_recipe(folder)
        data, tokens, supervised = their_rows(path, folder)
        config = their_config(data, folder)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # nothing is stored before the first round
        quarter = our_recipe(folder, top=1)
        arms = [(ours(path, folder, number), theirs(config), ours(quarter, folder, number)) for number in range(rounds)]
    report(arms, tokens, supervised)


def report(pairs: Sequence[tuple[dict[str, Any], ...]], tokens: int, supervised: int) -> None:
    def middle(side: int, key: str) -> float:
        return statistics.median(float(pair[side][key]) for pair in pairs)

    print(f"{len(pairs)} rounds, {EPOCHS} epochs of {tokens} tokens ({supervised} supervised), batch {BATCH}, 1 thread")
    print(f"{'':24}{'trl sft':>12}{'sft train':>12}{'ratio':>8}{'top quarter':>13}{'ratio':>8}")
    for key in ("wall", "steps"):
        own, other, quarter = (middle(side, key) for side in range(3))
        cells = f"{other:12.1f}{own:12.1f}{own / other:8.2f}{quarter:13.1f}{quarter / other:8.2f}"
        print(f"{key + ' seconds':24}{cells}")
    own, other, quarter = (middle(side, "tokens") / middle(side, "steps") for side in range(3))
    cells = f"{other:12.0f}{own:12.0f}{own / other:8.2f}{quarter:13.0f}{quarter / other:8.2f}"
    print(f"{'tokens/s':24}{cells}")
    print(f"share spent looking: {middle(0, 'looking'):.1%}, top quarter {middle(2, 'looking'):.1%}")
    print("wall of the top quarter, round by round:", *(f"{pair[2]['wall']:.1f}" for pair in pairs))
    per_epoch = len(pairs[0][0]["losses"]) // EPOCHS
    ends = [statistics.fmean(one["losses"][-per_epoch:]) for one in pairs[0]]
    print(f"loss of the last epoch: {ends[1]:.4f}, {ends[0]:.4f}, top quarter {ends[2]:.4f}")
    counted = [(round(one["tokens"], -3), len(one["losses"])) for one in pairs[0][:2]]  # trl prints three digits
    same = counted[0][1] == counted[1][1] and abs(counted[0][0] - counted[1][0]) <= 0.005 * counted[0][0]
    comparable = same and abs(ends[0] - ends[1]) < 0.01 * ends[1]
    print("comparable" if comparable else f"VOID: not the same work, (tokens, steps) {counted}")


if __name__ == "__main__":
    main()
