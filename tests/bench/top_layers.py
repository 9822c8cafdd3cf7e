"""What stored activations spare: seconds a step with all layers, the upper half and quarter, at a 99 M shape.

    .venv/bin/python tests/bench/top_layers.py [LENGTH] [STEPS]

A random Mistral of 16 layers (`speed.base`), NF4, rank 16 on seven matrices, one text of LENGTH tokens a step, one
thread. Forward, loss on all tokens, backward and AdamW; no looks. The upper layers are also timed with the lower ones
computed every step (as without stored activations): what is spared is told from what is not trained.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import speed
import tiny
import torch

from finetune import model, prefix
from finetune.head import summed_nll

TEXTS = 4


def stepping(adapted: Any, texts: list[tuple[int, ...]], steps: int) -> float:
    """Median seconds of all steps but the first."""
    optimizer = torch.optim.AdamW(model.adapter_weights(adapted).values(), 1e-4)
    plain, took = model.bare(adapted), []
    for number in range(steps):
        began = time.monotonic()
        ids = torch.tensor([texts[number % len(texts)]])
        hidden = plain.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        torch.autograd.backward(summed_nll(plain, hidden, ids[0, 1:]) / ids.shape[1])
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.monotonic() - began)
    return statistics.median(took[1:])


def main() -> None:
    length, steps = (int(one) for one in (*sys.argv[1:3], *("256", "9")[len(sys.argv) - 1 :]))
    draw = random.Random(0)
    texts = [tuple(draw.randrange(1, 256) for _ in range(length)) for _ in range(TEXTS)]
    with tempfile.TemporaryDirectory() as name:
        folder = speed.base(Path(name) / "base")
        print(f"{length} tokens a step, {steps} steps, 99 M weights in {speed.LAYERS} layers")
        print(f"{'':34}{'s/step':>8}{'of all':>8}")
        whole = None
        for title, top in speed.ARMS:
            shape = model.LoraShape(16, 16.0, 0.0, tiny.ALL, top)
            plain = model.attach(model.load_base(folder, "nf4", tiny.CPU), shape, 0)
            seconds = stepping(plain, texts, steps)
            whole = whole or seconds
            print(
                f"{title + (', lower ones each step' if top else ''):34}{seconds:8.2f}{seconds / whole:8.2f}",
                flush=True,
            )
            if top is None:
                continue
            del plain
            short = prefix.load(prefix.Source(folder, "nf4", tiny.CPU, speed.LAYERS - top), 1.0, Path(name) / "kept")
            filled = short.prefix.fill(texts)
            seconds = stepping(model.attach(short.model, shape, 0), texts, steps)
            told = f"{title}, stored: filled in {filled.seconds:.1f} s"
            print(f"{told:34}{seconds:8.2f}{seconds / whole:8.2f}", flush=True)


if __name__ == "__main__":
    main()
