"""What a sampler gives a token is what `generate` would draw from, however few logits were looked at for it."""

from __future__ import annotations

import pytest
import torch

from finetune.odds import Sampler

SAMPLERS = [Sampler(), Sampler(0.8, 40, 0.95), Sampler(0.7, top_k=3), Sampler(1.3, 8, 0.9, 0.05), Sampler(top_k=500)]


def whole(sampler: Sampler, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(sampler.warp(logits), -1).gather(-1, wanted[:, None])[:, 0]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_the_best_few_tell_what_all_tell(sampler: Sampler, rounded: bool) -> None:
    """`rounded`: as bf16 rounds them, where many tie at the border of top-k."""
    logits = 3 * torch.randn((200, 300), generator=torch.Generator().manual_seed(0))
    logits = logits.bfloat16().float() if rounded else logits
    wanted = logits.topk(60, -1).indices[torch.arange(200), torch.arange(200) % 60]
    expected = whole(sampler, logits, wanted)
    found = sampler.log_q(logits, wanted)
    same = torch.isclose(found, expected, atol=1e-5)
    assert bool(same.all()) or (rounded and sampler.top_p is not None and float(same.float().mean()) > 0.97)
    if sampler.top_k is not None and sampler.top_k < 60:
        assert bool(torch.isinf(expected).any())


def test_a_tie_at_the_border_stays_in() -> None:
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    wanted = torch.tensor([3, 3])
    found = Sampler(top_k=2).log_q(logits, wanted)
    assert torch.equal(found, whole(Sampler(top_k=2), logits, wanted))
    assert torch.isfinite(found).tolist() == [True, False]
