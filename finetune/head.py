"""From hidden states to -log p: only positions in the loss reach the head, a chunk of logits at a time.

A base's own forward makes logits of every position, which for a large vocabulary is most of the memory. It knows texts
and tokens, not why they are in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as recompute

from finetune.batches import Item
from finetune.memory import head_tokens
from finetune.model import logits_of


def supervised(pack: Sequence[Item], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of texts that lie one behind another: the positions that tell supervised tokens, and those tokens; (n,) each."""
    at: list[int] = []
    labels: list[int] = []
    start = 0
    for item in pack:
        told = [t for t in range(1, len(item.ids)) if item.trained[t]]
        at += [start + t - 1 for t in told]
        labels += [item.ids[t] for t in told]
        start += len(item.ids)
    return torch.tensor(at, dtype=torch.long, device=device), torch.tensor(labels, dtype=torch.long, device=device)


def summed_nll(plain: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p of labels (n,) given hidden states (n, hidden)."""
    return token_nll(plain, hidden, labels)[0].sum()


def token_nll(plain: Any, hidden: Tensor, labels: Tensor, hear: bool = False) -> tuple[Tensor, Tensor | None]:
    """-log p (n,) of labels (n,) given hidden states (n, hidden), and with `hear` whether each is the argmax.

    Beyond one chunk, logits are recomputed.
    """

    def chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(plain, states)
        hits = logits.detach().argmax(-1) == wanted if hear else None
        return cross_entropy(logits, wanted, reduction="none"), hits

    held = head_tokens(plain.config.get_text_config().vocab_size)
    if len(labels) <= held:
        return chunk(hidden, labels)
    pairs = zip(torch.split(hidden, held), torch.split(labels, held), strict=True)
    nll, hits = zip(*(recompute(chunk, *pair, use_reentrant=False) for pair in pairs), strict=True)
    return torch.cat(nll), torch.cat(hits) if hear else None
