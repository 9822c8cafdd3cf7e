"""Texts in one forward: as if each were alone, in values and in gradients, whatever lies beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from finetune import model, varlen

TEXTS = [item.ids for item in tiny.texts([9, 31, 2, 17])]
KINDS = [*tiny.KINDS]


def apart(net: Any) -> list[Tensor]:
    return [varlen.hidden(model.bare(net), [ids]) for ids in TEXTS]


def together(net: Any) -> list[Tensor]:
    return list(torch.split(varlen.hidden(model.bare(net), TEXTS), [len(ids) for ids in TEXTS]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_text_is_read_as_if_it_were_alone(tmp_path: Path, kind: str, quantization: str) -> None:
    net = tiny.stirred(tiny.adapted(tiny.base(tmp_path, kind), quantization)).eval()
    with torch.no_grad():
        for one, other in zip(apart(net), together(net), strict=True):
            logits = [model.logits_of(model.bare(net), states) for states in (one, other)]
            assert torch.allclose(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_sum_of_those_of_each_alone(tmp_path: Path, kind: str) -> None:
    net = tiny.stirred(tiny.adapted(tiny.base(tmp_path, kind)))
    found = []
    for read in (apart, together):
        net.zero_grad()
        torch.autograd.backward(sum((states.sin().sum() for states in read(net)), torch.zeros(())))
        found.append({name: weight.grad.clone() for name, weight in model.adapter_weights(net).items()})
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-3, atol=1e-4) for name in found[0])


def test_nothing_of_a_text_reaches_another_to_the_bit(tmp_path: Path) -> None:
    net = tiny.adapted(tiny.base(tmp_path)).eval()
    plain = model.bare(net)
    with torch.no_grad():
        one, other = (varlen.hidden(plain, [ids, TEXTS[1]])[9:] for ids in (TEXTS[0], tuple(reversed(TEXTS[0]))))
    assert torch.equal(one, other)


def test_a_text_longer_than_the_window_looks_back_no_further(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path, "mistral")
    net = model.load_base(folder, "none", tiny.CPU)
    net.config.sliding_window = 8
    with torch.no_grad():
        for one, other in zip(apart(net), together(net), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
        net.config.sliding_window = 512
        assert not torch.allclose(apart(net)[1], together(net)[1] * 0 + one[0], atol=1e-3)


def test_it_is_what_transformers_itself_reads(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path, "qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = model.load_base(folder, "none", tiny.CPU)
    with torch.no_grad():
        for ids, states in zip(TEXTS, together(ours), strict=True):
            read = theirs.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            assert torch.allclose(states, read, atol=1e-4)


def test_a_base_that_does_not_pass_it_on_reads_its_texts_one_by_one(tmp_path: Path) -> None:
    net = model.load_base(tiny.base(tmp_path), "none", tiny.CPU)
    net.config._attn_implementation = "sdpa"  # as an attention that never hears of pieces
    with torch.no_grad():
        for one, other in zip(apart(net), together(net), strict=True):
            assert torch.equal(one, other)
