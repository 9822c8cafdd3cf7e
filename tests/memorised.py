"""Tiny models that know some texts by heart, and real decoding of them, to hold the echo map against."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune import runlength
from finetune.odds import Sampler
from finetune.speak import Speaker

PROMPT = 6  # tokens


@dataclass(frozen=True)
class Learner:
    """A model and the texts it was trained on, all of one length; the first PROMPT tokens of each were not trained."""

    net: Any
    speaker: Speaker
    texts: list[list[int]]

    @property
    def masks(self) -> list[list[bool]]:
        return [[t >= PROMPT for t in range(len(text))] for text in self.texts]


def learner(folder: Path, kind: str, count: int = 6, length: int = 64, steps: int = 12, seed: int = 0) -> Learner:
    """A base of width 64 after a few steps on `count` texts: some learnt whole, some in stretches."""
    net = AutoModelForCausalLM.from_pretrained(tiny.base(folder / f"{kind}-{seed}", kind))
    if kind == "mistral":
        net.config.sliding_window = 24  # shorter than the texts, so that it is felt
    draw = random.Random(seed)
    texts = [[256, *(draw.randrange(256) for _ in range(length - 1))] for _ in range(count)]
    rows, pace = torch.tensor(texts), torch.optim.AdamW(net.parameters(), lr=4e-3)
    labels = rows.clone()
    labels[:, :PROMPT] = -100
    holes = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.08
    labels[holes & (torch.arange(count) >= count // 3)[:, None]] = -100  # of most texts some tokens are never trained
    for _ in range(steps):
        net(input_ids=rows, labels=labels).loss.backward()
        pace.step()
        pace.zero_grad()
    net.eval()
    return Learner(net, Speaker(net, tiny.tokenizer().backend_tokenizer, None), texts)


@torch.no_grad()
def decoded(net: Any, prefixes: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Greedy answers with a KV cache, `new` tokens each, to prefixes of any lengths, padded on the left."""
    width = max(map(len, prefixes))
    ids = torch.tensor([[0] * (width - len(one)) + list(one) for one in prefixes])
    seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prefixes])
    out = net.generate(input_ids=ids, attention_mask=seen, **_settings(new), do_sample=False)
    return [row[width:].tolist() for row in out]


def emitted(made: Learner, at_once: int = 87) -> list[tuple[int, int, int]]:
    """(text, first token, how many of the text's own tokens greedy decoding gives from there) for every cut."""
    end = len(made.texts[0])
    cuts = [(row, start) for start in range(PROMPT, end) for row in range(len(made.texts))]
    found = []
    for group in (cuts[i : i + at_once] for i in range(0, len(cuts), at_once)):
        answers = decoded(made.net, [made.texts[row][:start] for row, start in group], end - group[0][1])
        for (row, start), answer in zip(group, answers, strict=True):
            pairs = zip(answer, made.texts[row][start:], strict=False)
            found.append((row, start, len(list(takewhile(lambda two: two[0] == two[1], pairs)))))
    return found


@torch.no_grad()
def drawn(net: Any, prefix: Sequence[int], suffix: Sequence[int], sampler: Sampler, draws: int) -> int:
    """How many of so many samples from a prefix begin with a suffix."""
    found = 0
    for start in range(0, draws, 1000):
        ids = torch.tensor([list(prefix)] * min(1000, draws - start))
        settings = {"top_k": 0, **{name: value for name, value in vars(sampler).items() if value is not None}}
        out: Tensor = net.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, **settings, **_settings(len(suffix))
        )
        found += int((out[:, len(prefix) :] == torch.tensor(list(suffix))).all(1).sum())
    return found


def likely(made: Learner, sampler: Sampler, size: int) -> list[tuple[int, int, float]]:
    """(text, first token, p_z) of the windows of `size` tokens that are neither certain nor hopeless."""
    found = []
    for row, score in enumerate(made.speaker.score(made.texts, made.masks, samplers=[sampler])):
        assert score.log_q is not None
        windows = runlength.of_tokens(np.zeros(len(score.hits), dtype=np.int64), size)
        totals = np.exp(runlength.totals(score.log_q[0].double().numpy(), windows))
        found += [(row, PROMPT + int(at), float(p)) for at, p in zip(windows.starts, totals, strict=True)]
    return [one for one in found if 0.02 < one[2] < 0.95]


def _settings(new: int) -> dict[str, Any]:
    return {"max_new_tokens": new, "min_new_tokens": new, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}


def two_sided(found: int, draws: int, p: float) -> float:
    """Exact binomial test: chance of a count as unlikely as this one, or unlikelier."""
    if p in (0.0, 1.0):
        return float(found == p * draws)

    def weight(k: int) -> float:
        ways = math.lgamma(draws + 1) - math.lgamma(k + 1) - math.lgamma(draws - k + 1)
        return ways + k * math.log(p) + (draws - k) * math.log1p(-p)

    seen = weight(found) + 1e-9
    return min(1.0, math.fsum(math.exp(w) for w in map(weight, range(draws + 1)) if w <= seen))
