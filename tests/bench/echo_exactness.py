"""The echo map against real decoding at length: every cut greedily, and the chance of windows against real draws.

    .venv/bin/python tests/bench/echo_exactness.py [CASES] [DRAWS]

100 cases of 10,000 draws by default, over three small models and six samplers; prints a table. Where p_z is right, the
exact binomial test falls below 0.05 in at most one case of twenty, and all cases together deviate as chance would.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import memorised
import numpy as np
import tiny
import torch
from memorised import PROMPT, Learner

from finetune import runlength
from finetune.odds import Sampler

SAMPLERS = (
    Sampler(),
    Sampler(temperature=0.7),
    Sampler(top_k=3),
    Sampler(top_p=0.8),
    Sampler(min_p=0.1),
    Sampler(1.3, 8, 0.9, 0.05),
)
SIZES = (4, 8, 16, 32)  # tokens of a window


def greedy(kind: str, made: Learner) -> None:
    scores = made.speaker.score(made.texts, made.masks, margins=True)
    wrong, least, cuts = 0, float("inf"), memorised.emitted(made)
    for row, start, emitted in cuts:
        score = scores[row]
        assert score.margins is not None
        hits = score.hits.numpy()[start - PROMPT :]
        wrong += int(runlength.lengths(hits, np.zeros(len(hits), dtype=np.int64))[0]) != emitted
        least = min(least, float(score.margins.abs().min()))
    print(f"greedy  {kind:8} {len(cuts):6} cuts  {wrong} disagree  smallest margin {least:.4f} logits")


Case = tuple[Learner, Sampler, int, int, int, float]  # ..., text, first token, size, p_z


def cases(learners: list[Learner], wanted: int) -> list[Case]:
    """In turn from every model, sampler and size, so that a few cover all."""
    grids = [(made, sampler, size) for size in SIZES for sampler in SAMPLERS for made in learners]
    piles = [iter(_spread(*grid)) for grid in grids]
    found: list[Case] = []
    for pile in islice(cycle(piles), wanted * len(piles)):
        found += islice(pile, 1)
        if len(found) == wanted:
            break
    return found


def _spread(made: Learner, sampler: Sampler, size: int) -> Iterator[Case]:
    """Those of other texts and places first."""
    some = memorised.likely(made, sampler, size)
    for row, start, p in (one for offset in range(17) for one in some[offset::17]):
        yield made, sampler, row, start, size, p


def main(wanted: int = 100, draws: int = 10_000) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        learners = {kind: memorised.learner(Path(folder), kind, seed=at) for at, kind in enumerate(tiny.KINDS)}
    for kind, made in learners.items():
        greedy(kind, made)
    names = {id(made): kind for kind, made in learners.items()}
    chances = []
    print(f"\n{'model':8} {'sampler':72} {'tokens':>6} {'p_z':>7} {'drawn':>7}  binomial p")
    for made, sampler, row, start, size, p in cases(list(learners.values()), wanted):
        text = made.texts[row]
        count = memorised.drawn(made.net, text[:start], text[start : start + size], sampler, draws)
        chances.append(memorised.two_sided(count, draws, p))
        print(
            f"{names[id(made)]:8} {sampler!s:72} {size:6} {p:7.4f} {count / draws:7.4f}  {chances[-1]:.3f}", flush=True
        )
    below = sum(one < 0.05 for one in chances)
    print(f"\n{len(chances)} cases of {draws} draws: {below} below 0.05, smallest {min(chances):.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
