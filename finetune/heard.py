"""What a model said of passages, token by token: read in one pass, kept in a file, compared with itself.

It judges nothing. The speaker is passed in; a list-backed fake will do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as packed

from finetune import runs
from finetune.asking import Scores
from finetune.passage import Key, Passage
from finetune.runlength import Bools, Floats


@dataclass(frozen=True, eq=False)
class Reading:
    """What a model said of the T tokens read. `log_p`, `log_q` (of a sampler) in nats, `margins` in logits.

    `nll_at`: their sum of -log p at each temperature asked for.
    """

    log_p: Floats
    hits: Bools
    margins: Floats | None = None
    log_q: Floats | None = None
    nll_at: Floats | None = None

    @property
    def nll(self) -> float:
        """Sum over tokens, nats."""
        return -float(self.log_p.sum())


def read(
    speaker: Scores,
    passages: Sequence[Passage],
    base: bool = False,
    sampler: Any = None,
    temperatures: Sequence[float] = (),
) -> dict[Key, Reading]:
    """One pass over passages of different keys. `base`: without the adapter, no margins. `sampler`: an odds.Sampler."""
    samplers = [] if sampler is None else [sampler]
    ids, masks = [one.ids for one in passages], [one.read for one in passages]
    scores = speaker.score(ids, masks, temperatures, base=base, samplers=samplers, margins=not base)
    return {one.key: _reading(score) for one, score in zip(passages, scores, strict=True)}


def _reading(score: Any) -> Reading:
    margins = None if score.margins is None else score.margins.double().numpy()
    log_q = None if score.log_q is None else score.log_q[0].double().numpy()
    nll_at = score.nll_at.numpy() if len(score.nll_at) else None
    return Reading(score.log_p.double().numpy(), score.hits.numpy(), margins, log_q, nll_at)


def noise(speaker: Scores, passages: Sequence[Passage]) -> float:
    """How far a margin moves, in logits, between texts read together and one by one: the most over these passages."""
    together = read(speaker, passages)
    moved = [_moved(read(speaker, [one])[one.key], together[one.key]) for one in passages]
    return max(moved, default=0.0)


def _moved(one: Reading, other: Reading) -> float:
    if one.margins is None or other.margins is None:
        raise ValueError("margins were not read")
    return float(np.abs(one.margins - other.margins).max(initial=0.0))


def save(path: Path, readings: Mapping[Key, Reading]) -> None:
    """Log p (float32) and hits of all tokens, one after the other, and whose they are. UserError on a full disk."""
    lengths = [len(one.hits) for one in readings.values()]
    log_p = np.concatenate([np.zeros(0), *(one.log_p for one in readings.values())]).astype(np.float32)
    hits = np.concatenate([np.zeros(0, dtype=bool), *(one.hits for one in readings.values())])
    about = {"keys": json.dumps(list(readings)), "lengths": json.dumps(lengths)}
    runs.write_atomic(path, packed({"log_p": log_p, "hits": hits}, about))


def load(path: Path) -> dict[Key, Reading]:
    """What `save` wrote, to the bit, but for margins and samplers."""
    with safe_open(path, "numpy") as file:
        about, log_p, hits = file.metadata(), file.get_tensor("log_p"), file.get_tensor("hits")
    cuts = np.cumsum(json.loads(about["lengths"]))[:-1]
    pieces = zip(np.split(log_p.astype(np.float64), cuts), np.split(hits, cuts), strict=True)
    keys: list[Key] = [tuple(key) for key in json.loads(about["keys"])]
    return {key: Reading(*piece) for key, piece in zip(keys, pieces, strict=False)}
