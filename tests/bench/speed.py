"""`sft train`, all layers and the upper half and quarter, beside `trl sft` at a 0.1 B shape: one table, one run.

    .venv/bin/python tests/bench/speed.py [LENGTHS] [BATCHES] [STEPS] [ARMS]

LENGTHS and BATCHES are lists such as 128,256,512 and 1,4; ARMS: 1 for all layers alone, 2 with the top half, 3 with the
top quarter too. A random Mistral of 99 M weights in 16 layers, NF4, rank 16 on seven matrices, one thread, 16 rows of
equal length. Steps are the median of all but the first; the loss is the last epoch's mean; wall seconds hold imports,
loading, stored activations and, for ours, looks: these ask little of the drift suite, which this base would read byte
by byte. GiB is the most the whole process ever held. TRL trains all layers; with the upper ones alone the work is not
the same, and the table says what the shortcut buys, not that losses agree: those of all layers must, else the row is
void. `floor`: 4 FLOPs for each weight below the head and token, at the rate of one fp32 product measured in the same
run, as a share of the step. TRL with Liger and Unsloth need a GPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import against_trl
import tiny
import torch
from against_trl import HERE
from transformers import MistralConfig, MistralForCausalLM

from finetune import plan, recipe, runs, tables

LAYERS, ROWS = 16, 16
IN_LAYERS = LAYERS * (768 * (2 * 768 + 2 * 256) + 3 * 768 * 2048)  # weights of their matrices
# `sft`, but a look asks one fact and four neutral texts about drift
SFT = """
from finetune import suite
known, snippets = suite.known, suite.snippets
suite.known = lambda base, asked: known(base, asked)[:1]
suite.snippets = lambda base, asked: snippets(base, asked)[:4]
from finetune.cli import main
main()
"""
ARMS: tuple[tuple[str, int | None], ...] = (("all layers", None), ("top half", 8), ("top quarter", 4))


def base(folder: Path) -> Path:
    torch.manual_seed(0)
    about = MistralConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=LAYERS, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    MistralForCausalLM(about).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def rows(folder: Path, length: int) -> Path:
    """Sixteen rows and eight held-out ones of about `length` byte tokens, a third of them prompt."""
    draw = random.Random(length)
    path = folder / f"rows-{length}.jsonl"

    def words(size: int) -> str:
        text = " ".join("".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(size))
        return text[:size].strip()

    told = [
        {"id": f"r{n}", "messages": [
            {"role": "user", "content": words(length // 3)},
            {"role": "assistant", "content": words(length - length // 3 - 75)},
        ]}
        for n in range(ROWS + 8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return path


def our_recipe(folder: Path, model: Path, data: Path, top: int | None, batch: int, epochs: int) -> Path:
    path = folder / "ours.yaml"
    settings = {
        "base": str(model),
        "data": {"train": str(data), "held_out": 8 / (ROWS + 8), "max_tokens": 4096},
        "formats": {"train": ["chatml"], "held_out": ["zephyr"]},
        "lora": {"layers": "all" if top is None else {"top": top}},
        "optimizer": {"learning_rate": 1e-4},
        "epochs": epochs,
        "batch_size": batch,
        "watch": {"prompts": []},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def timed(command: list[str]) -> tuple[float, str, float]:
    """Wall seconds, what it printed, and the most memory it held in GiB."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.monotonic() - began
        said.seek(0)
        text = said.read().decode()
    if status:
        sys.exit(f"{' '.join(command)}\n{text[-4000:]}")
    return wall, text, used.ru_maxrss / 2**20


def flops() -> float:
    """A second, of one fp32 product as large as those of the base; the median of nine."""
    one, other = torch.randn(256, 768), torch.randn(768, 2048)
    took = []
    for _ in range(9):
        began = time.perf_counter()
        for _ in range(20):
            one @ other
        took.append((time.perf_counter() - began) / 20)
    return 2 * 256 * 768 * 2048 / statistics.median(took)


def ours(path: Path, run: Path) -> dict[str, Any]:
    wall, _, gib = timed([sys.executable, "-c", SFT, "train", str(path), "--out", str(run)])
    steps = [row for row in runs.read_lines(run / "metrics.jsonl") if row["kind"] == "step"]
    return {
        "wall": wall,
        "first": steps[0]["seconds"],
        "step": statistics.median(row["seconds"] for row in steps[1:]),
        "gib": gib,
        "tokens": steps[-1]["tokens"],
        "loss": statistics.fmean(row["loss"] for row in steps if row["epoch"] > steps[-1]["epoch"] - 1),
        "looking": runs.read_json(run / "run.json")["spent"]["share_looking"],
    }


def theirs(folder: Path, model: Path, path: Path, batch: int, epochs: int) -> dict[str, Any]:
    made = plan.make(recipe.load(path), model)
    told = [
        {"input_ids": list(i.ids), "labels": [t if on else -100 for t, on in zip(i.ids, i.trained, strict=True)]}
        for i in made.epochs.order(0)
    ]
    data = folder / "trl-rows"
    data.mkdir(exist_ok=True)
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    config = against_trl.their_config(data, folder)
    settings = yaml.safe_load(config.read_text())
    settings |= {"model_name_or_path": str(model), "num_train_epochs": epochs, "per_device_train_batch_size": batch}
    settings |= {"learning_rate": 1e-4}
    config.write_text(yaml.safe_dump(settings))
    wall, said, gib = timed([str(HERE / ".venv/bin/trl"), "sft", "--config", str(config)])
    runtime = float(re.findall(r"'train_runtime': '?([0-9.]+)'?", said)[-1])
    losses = [float(one) for one in against_trl.LOSS.findall(said)]
    tokens = sum(len(row["input_ids"]) for row in told)
    supervised = sum(label >= 0 for row in told for label in row["labels"]) / tokens
    last = statistics.fmean(losses[-(len(losses) // epochs) :])
    about = {"tokens": tokens / (len(losses) / epochs), "loss": last, "gib": gib, "supervised": supervised}
    return {"wall": wall, "step": runtime / len(losses), **about}


def table(
    model: Path, folder: Path, lengths: list[int], batches: list[int], steps: int, arms: int
) -> Iterator[Mapping[str, Any]]:
    for length in lengths:
        data = rows(folder, length)
        for batch in batches:
            epochs = max(2, -(-steps * batch // ROWS))
            where = {"length": length, "batch": batch}
            for name, top in ARMS[:arms]:
                path = our_recipe(folder, model, data, top, batch, epochs)
                run = folder / f"run-{length}-{batch}-{top}"
                yield {**where, "arm": f"sft, {name}", **ours(path, run)}
                if top is not None:
                    yield {**where, "arm": f"sft, {name}, again", **ours(path, Path(f"{run}-again"))}
            path = our_recipe(folder, model, data, None, batch, epochs)
            yield {**where, "arm": "trl sft", **theirs(folder, model, path, batch, epochs)}


HEAD = ("length", "batch", "", "wall s", "first s", "s/step", "s/epoch", "tokens/s", "in the loss", "GiB", "looking",
        "loss", "floor", "wall of trl", "step of trl")  # fmt: skip


def show(found: list[Mapping[str, Any]]) -> None:
    rate = flops()
    cells: list[tuple[str, ...]] = [HEAD]
    for one in found:
        trl = next(o for o in found if o["arm"] == "trl sft" and all(o[k] == one[k] for k in ("length", "batch")))
        top = next((top for name, top in ARMS if name in one["arm"]), None)
        share = 1.0 if top is None else top / LAYERS
        floor = 4 * share * IN_LAYERS * one["tokens"] / rate / one["step"]
        a_second = one["tokens"] / one["step"]
        agree = abs(one["loss"] - trl["loss"]) < 0.02 * trl["loss"]
        cells.append((
            str(one["length"]), str(one["batch"]), one["arm"], f"{one['wall']:.0f}",
            f"{one['first']:.2f}" if "first" in one else "-", f"{one['step']:.2f}",
            f"{one['step'] * ROWS / one['batch']:.1f}", f"{a_second:.0f}", f"{a_second * trl['supervised']:.0f}",
            f"{one['gib']:.2f}", f"{one['looking']:.0%}" if "looking" in one else "-",
            f"{one['loss']:.3f}{'' if agree or share < 1 else ' VOID'}", f"{floor:.0%}",
            f"{one['wall'] / trl['wall']:.2f}", f"{one['step'] / trl['step']:.2f}",
        ))  # fmt: skip
    print("\n".join(tables.columns(cells)))


def main() -> None:
    given = sys.argv[1:]
    lengths, batches = ([int(x) for x in one.split(",")] for one in (*given[:2], *("256", "1")[len(given[:2]) :]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # nothing is stored before the first run
        model = base(folder / "base")
        steps, arms = (int(one) for one in (*given[2:4], *("32", "3")[len(given[2:4]) :]))
        show(list(table(model, folder, lengths, batches, steps, arms)))


if __name__ == "__main__":
    main()
