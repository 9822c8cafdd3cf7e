"""Is the estimate right? GiB of `memory.bill` against tracked peaks, seconds of a calibration against real steps.

    .venv/bin/python tests/bench/estimate_grid.py [memory|time]

Random Llamas, NF4 unless said. Memory: every tensor of a whole step is tracked on the CPU, in the dtypes of CUDA (bf16
autocast over a bf16 base); what only CUDA could show (its context, fragmentation) is on neither side. Time:
steps of `train.train` beside what `rates` makes of a calibration whose rounds come between those steps, one thread.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from tracked import Cell, estimated, tracked
from transformers import LlamaConfig, LlamaForCausalLM

from finetune import calibrate, model, rates, train
from finetune.calibrate import Rig
from finetune.rates import Work

# hidden, inner, layers, heads, key-value heads, vocabulary
NARROW, MIDDLE, WIDE = (256, 704, 2, 4, 2, 8192), (512, 1408, 4, 8, 4, 1024), (1024, 2816, 2, 16, 4, 512)
STEPS = 9


def base(folder: Path, shape: tuple[int, ...]) -> Path:
    hidden, inner, layers, heads, kv, vocabulary = shape
    torch.manual_seed(0)
    about = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=4096, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(about).to(torch.bfloat16).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def name_of(shape: tuple[int, ...]) -> str:
    hidden, inner, layers, _, _, vocabulary = shape
    return f"{hidden} x {inner} x {layers}, {vocabulary}"


def cells(sizes: list[tuple[int, int, int]]) -> Iterator[Cell]:
    """Of (rank, length, batch), each with activations kept and computed twice."""
    yield from (Cell(*size, again) for size in sizes for again in (False, True))


def headline(told: str) -> None:
    print(f"{'shape':22}{'rank':>5}{'length':>7}{'batch':>6} {'again':>6}{told:>16}{'measured':>10}{'error':>8}")


def row(shape: tuple[int, ...], cell: Cell, told: float, real: float, more: str = "") -> float:
    again = "yes" if cell.checkpointing else "no"
    print(
        f"{name_of(shape):22}{cell.rank:5}{cell.length:7}{cell.batch:6} {again:>6}{told:16.3f}{real:10.3f}"
        f"{told / real - 1:+8.1%} {more}",
        flush=True,
    )
    return told / real - 1


def summed(errors: list[float]) -> None:
    print(f"{len(errors)} cells, median |error| {statistics.median(map(abs, errors)):.1%}, ", end="")
    print(f"worst {max(errors, key=abs):+.1%}")


def memories(root: Path) -> None:
    all_there_is = [(16, length, batch) for length, batch in ((128, 1), (128, 4), (512, 1), (1024, 1))]
    some = [(rank, length, 1) for rank in (8, 64) for length in (128, 512)]
    odd = [Cell(16, 128, 1, False, "none"), Cell(16, 128, 1, False, "int8"), Cell(64, 128, 1, True, micro=2)]
    chosen = {
        NARROW: [*cells(all_there_is), *cells(some), *odd],
        MIDDLE: [*cells([(8, 128, 1), (16, 128, 1), (64, 128, 1), (16, 512, 1)]), *odd],
        WIDE: [*cells([(16, 128, 1), (64, 128, 1)])],
    }
    headline("MiB estimated")
    errors = []
    for number, (shape, some_cells) in enumerate(chosen.items()):
        folder = base(root / str(number), shape)
        for cell in some_cells:
            more = ("" if cell.quantization == "nf4" else cell.quantization) + (" two micro-batches" * (cell.micro > 1))
            errors.append(row(shape, cell, 1024 * estimated(folder, cell), 1024 * tracked(folder, cell), more))
    summed(errors)


class Between(tiny.Notes):
    """Times each step, and between two of them all that a calibration times: a shared machine is as slow for both."""

    def __init__(self, rig: Rig, counts: list[int]) -> None:
        super().__init__()
        self.rig, self.counts, self.took = rig, counts, [float("nan")]
        self._began = time.monotonic()

    def step(self, row: dict[str, Any]) -> None:
        self.took.append(time.monotonic() - self._began)
        for tokens in self.counts:
            self.rig.once(tokens)
        self._began = time.monotonic()


def compared(folder: Path, cell: Cell) -> tuple[float, float]:
    """Seconds a step, estimated and measured; a length of 320 is estimated from 128 and 512."""
    adapter = {"rank": cell.rank, "targets": list(tiny.ALL), "dropout": 0.0, "quantization": "nf4", "each": cell.length}
    config = json.loads((folder / "config.json").read_text())
    tokens = cell.batch * cell.length
    looks = {"answers": 1, "twice": cell.checkpointing}
    rig = calibrate.rig({"config": config, **adapter, **looks, "optimizer": "adamw", "budget": 0.0})
    watcher = Between(rig, [128, 512] if tokens == 320 else [tokens])
    net = tiny.adapted(folder, "nf4", model.LoraShape(cell.rank, cell.rank, 0.0, tiny.ALL))
    items = tiny.texts([cell.length] * cell.batch)
    work = tiny.job(folder, items, STEPS, cell.batch, twice=lambda _tokens: layers if cell.checkpointing else 0)
    train.train(net, folder, work, watcher)
    layers = int(config["num_hidden_layers"])
    by = rig.found(watcher.counts, 0.0)
    told = rates.step_seconds([tokens], 1.0, Work(layers, 0, layers if cell.checkpointing else 0, 0), by)
    return told, statistics.median(watcher.took[2:])


def times(root: Path) -> None:
    chosen = {
        NARROW: [*cells([(16, 128, 1), (16, 128, 4), (16, 512, 1), (64, 128, 1), (16, 320, 1)])],
        MIDDLE: [*cells([(8, 128, 1), (16, 128, 1)]), Cell(16, 512, 1, False)],
        WIDE: [Cell(16, 128, 1, False)],
    }
    headline("s/step estimated")
    errors = []
    for shape, wanted in chosen.items():
        folder = base(root / name_of(shape), shape)
        errors += [row(shape, cell, *compared(folder, cell)) for cell in wanted]
    summed(errors)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        for part in sys.argv[1:] or ["memory", "time"]:
            (Path(name) / part).mkdir()
            {"memory": memories, "time": times}[part](Path(name) / part)
