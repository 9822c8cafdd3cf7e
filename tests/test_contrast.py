"""Adapter beside base, position by position: the same figures a full forward of each gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn.functional import log_softmax

from finetune import speak
from finetune.speak import Speaker

TEXTS = tiny.texts([5, 33, 12, 60])
IDS, MASKS = [item.ids for item in TEXTS], [item.trained for item in TEXTS]
MARKED = np.arange(256) % 3 == 0


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny.stirred(tiny.adapted(tiny.base(Path(tmp_path_factory.mktemp("contrast")) / "llama")))


def speaker(net: Any, **more: Any) -> Speaker:
    return Speaker(net, tiny.tokenizer().backend_tokenizer, None, **more)


def test_contrast_is_that_of_two_full_forwards(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.odds.HEAD_TOKENS", 14)  # several pieces a text
    found = speaker(net).contrast(IDS, MASKS, [MARKED] * len(IDS))
    for item, one in zip(TEXTS, found, strict=True):
        own = log_softmax(tiny.logits(net, item.ids), -1)
        with net.disable_adapter():
            base = log_softmax(tiny.logits(net, item.ids), -1)
        at = torch.tensor([t for t in range(1, len(item.ids)) if item.trained[t]])
        own, base = own[at - 1], base[at - 1]
        wanted = torch.tensor(item.ids)[at][:, None]
        assert torch.allclose(one.log_p, own.gather(-1, wanted)[:, 0], atol=1e-4)
        assert torch.allclose(one.base_log_p, base.gather(-1, wanted)[:, 0], atol=1e-4)
        kl = torch.nn.functional.kl_div(own, base, reduction="none", log_target=True).sum(-1)
        assert torch.allclose(one.kl, kl, atol=1e-4)
        assert float(one.kl.min()) > 0
        assert torch.allclose(one.base_entropy, torch.distributions.Categorical(logits=base).entropy(), atol=1e-4)
        mark = torch.tensor([*MARKED, False, False])  # 258 rows in the head, 256 tokens marked
        for mass, log_p in ((one.mass, own), (one.base_mass, base)):
            chances = log_p.exp()[:, mark]
            above = chances - chances.sort(-1).values[:, (chances.shape[-1] - 1) // 2, None]
            assert torch.allclose(mass, above.clamp(min=0).sum(-1), atol=1e-5)


def test_contrast_disturbs_nothing_and_agrees_with_score(net: Any) -> None:
    net.train()
    state = torch.random.get_rng_state()
    found = speaker(net, batch_tokens=70).contrast(IDS, MASKS, [MARKED] * len(IDS))
    assert net.training
    assert torch.equal(state, torch.random.get_rng_state())
    for base in (False, True):
        for one, score in zip(found, speaker(net).score(IDS, MASKS, base=base), strict=True):
            assert torch.allclose(one.base_log_p if base else one.log_p, score.log_p, atol=1e-4)


def test_an_untouched_adapter_has_left_nothing(tmp_path: Path) -> None:
    fresh = tiny.adapted(tiny.base(tmp_path / "llama"))
    for one in speaker(fresh).contrast(IDS, MASKS, [MARKED] * len(IDS)):
        assert torch.equal(one.log_p, one.base_log_p)
        assert torch.equal(one.mass, one.base_mass)
        assert float(one.kl.abs().max()) < 1e-6


def test_what_is_spread_evenly_over_marked_tokens_is_no_mass() -> None:
    even, odd = torch.full((1, 50), 0.01), torch.zeros(1, 50)
    odd[0, 7] = 0.5
    assert float(speak._mass(even)) == 0
    assert float(speak._mass(odd)) == 0.5
    assert float(speak._mass(torch.zeros(1, 0))) == 0
