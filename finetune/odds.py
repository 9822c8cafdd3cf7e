"""From logits to what is asked of a token: its chance, rank and margin, at temperatures and as a sampler draws it.

Logits are held for a few positions at a time. It reads no text and knows no model but its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from finetune.model import logits_of

HEAD_TOKENS = 512  # positions sent through the head at once: bounds the fp32 logits to 512 x vocabulary


@dataclass(frozen=True)
class Sampler:
    """How an answer is drawn. Its parts work in transformers' order: temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def warp(self, logits: Tensor) -> Tensor:
        """Logits (n, vocabulary) as `generate` draws from them; -inf where a token is never drawn."""
        steps = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        kinds = ((TopKLogitsWarper, self.top_k), (TopPLogitsWarper, self.top_p), (MinPLogitsWarper, self.min_p))
        steps += [kind(value) for kind, value in kinds if value is not None]
        warped: Tensor = steps(None, logits)
        return warped

    def log_q(self, logits: Tensor, wanted: Tensor) -> Tensor:
        """(n,) log chance that `wanted` (n,) is drawn; -inf where it never is.

        With top-k only as many as may stay in are looked at: those that tie with the last of them stay too, and bf16
        logits often tie. Which of two equal ones top-p cuts off is chance, as it is in `generate`.
        """
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return _log_p(self.warp(logits), wanted)
        least = logits.topk(self.top_k, -1).values[:, -1:]
        best, at = logits.topk(int((logits >= least).sum(-1).max()), -1)
        drawn = torch.log_softmax(self.warp(best), -1)
        return torch.where(at == wanted[:, None], drawn, -torch.inf).amax(-1)


CUSTOMARY = Sampler(temperature=0.8, top_k=40, top_p=0.95)  # how most programs draw, unless told otherwise


@dataclass(frozen=True)
class Scored:
    """One text's supervised tokens, in order: log p (nats), greedy hits, NLL sums at temperatures.

    Where asked for: `margins`, the true token's logit minus the best other one, so top-1 minus top-2 at a hit and below
    0 at a miss; `log_q`, nats, -inf where a sampler never draws the token.
    """

    log_p: Tensor  # (T,) float32, cpu
    hits: Tensor  # (T,) bool, cpu
    nll_at: Tensor  # (temperatures,) float64 sum over tokens, cpu
    margins: Tensor | None = None  # (T,) float32, cpu
    log_q: Tensor | None = None  # (samplers, T) float32, cpu

    @property
    def nll(self) -> float:
        """Sum over tokens, nats."""
        return -float(self.log_p.double().sum())


@dataclass(frozen=True)
class Asked:
    """What is wanted of each position besides log p and hit."""

    temperatures: Sequence[float]
    samplers: Sequence[Sampler]
    margins: bool


def score_row(plain: Any, hidden: Tensor, targets: Tensor, asked: Asked) -> Scored:
    """Hidden states (T, hidden) against the tokens that follow them (T,); logits are held for a few at a time."""
    log_p, hits, margins = [], [], []
    sums = torch.zeros(len(asked.temperatures), dtype=torch.float64)
    log_q: list[list[Tensor]] = [[] for _ in asked.samplers]
    for start in range(0, len(targets), HEAD_TOKENS):
        wanted = targets[start : start + HEAD_TOKENS]
        logits = logits_of(plain, hidden[start : start + HEAD_TOKENS])
        log_p.append(_log_p(logits, wanted))
        hits.append(logits.argmax(-1) == wanted)
        if asked.temperatures:
            sums += _nll_at(logits, wanted, asked.temperatures)
        for found, sampler in zip(log_q, asked.samplers, strict=True):
            found.append(sampler.log_q(logits, wanted))
        if asked.margins:
            margins.append(_margin(logits, wanted))
    drawn = torch.stack([joined(found, torch.float32) for found in log_q]) if log_q else None
    led = joined(margins, torch.float32) if asked.margins else None
    return Scored(joined(log_p, torch.float32), joined(hits, torch.bool), sums, led, drawn)


def _log_p(logits: Tensor, wanted: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(-1, wanted[:, None])[:, 0]


def _nll_at(logits: Tensor, wanted: Tensor, temperatures: Sequence[float]) -> Tensor:
    """(temperatures,) float64 sums over (n, vocabulary) and (n,); in one buffer, for it is done a dozen times."""
    below = logits - logits.amax(-1, keepdim=True)
    said, scaled = below.gather(-1, wanted[:, None])[:, 0], torch.empty_like(below)
    sums = []
    for temperature in temperatures:
        torch.div(below, temperature, out=scaled)
        sums.append((scaled.exp_().sum(-1).log() - said / temperature).double().sum())
    return torch.stack(sums).cpu()


def _margin(logits: Tensor, wanted: Tensor) -> Tensor:
    """(n,) the wanted logit minus the highest of the others."""
    best, at = logits.topk(2, -1)
    other = torch.where(at[:, 0] == wanted, best[:, 1], best[:, 0])
    return logits.gather(-1, wanted[:, None])[:, 0] - other


def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """One after another, on the CPU."""
    return torch.cat(parts).to("cpu", dtype) if parts else torch.zeros(0, dtype=dtype)
