"""Stored activations: the same loss and gradients to the bit, one layer at a time, kept and never trusted unread."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from rich.console import Console

from finetune import disk, model, night, orders, prefix, runs, varlen
from finetune.batches import Item
from finetune.depot import Depot
from finetune.errors import UserError
from finetune.head import summed_nll, supervised
from finetune.orders import Order
from finetune.prefix import Source
from finetune.screen import Screen
from finetune.speak import Speaker

LAYERS, TOP = 6, 2
TEXTS = [(5, 9, 200, 31, 7, 7, 90, 1), (1, 2, 3, 250, 80), (33, 0, 4, 4, 4, 9, 8, 7, 6, 5, 11)]
SHAPE = model.LoraShape(rank=4, alpha=4.0, dropout=0.0, targets=tiny.ALL, top=TOP)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of six layers."""
    return tiny.base(tmp_path_factory.mktemp(request.param), request.param, layers=LAYERS)


def source(folder: Path, quantization: str = "nf4") -> Source:
    return Source(folder, quantization, tiny.CPU, LAYERS - TOP)


def shortened(folder: Path, tmp_path: Path, quantization: str = "nf4", gib: float = 1.0) -> prefix.Shortened:
    short = prefix.load(source(folder, quantization), gib, tmp_path / "depot")
    short.model = attached(short.model)
    return short


def attached(bare: Any) -> Any:
    """With an adapter that says something: lora_B is not zero."""
    adapted = model.attach(bare, SHAPE, 0)
    torch.manual_seed(1)
    for name, weight in model.adapter_weights(adapted).items():
        if "lora_B" in name:
            weight.data = torch.randn_like(weight) * 0.05
    return adapted.eval()


def loss_and_gradients(adapted: Any, texts: list[tuple[int, ...]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    plain = model.bare(adapted)
    at, labels = supervised([Item("", "", text, (True,) * len(text)) for text in texts], tiny.CPU)
    loss = summed_nll(plain, varlen.hidden(plain, texts)[at], labels)
    adapted.zero_grad()
    torch.autograd.backward(loss)
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.adapter_weights(adapted).items()}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_stored_activations_give_the_full_models_loss_and_gradients_to_the_bit(
    folder: Path, tmp_path: Path, quantization: str
) -> None:
    whole = attached(model.load_base(folder, quantization, tiny.CPU))
    short = shortened(folder, tmp_path, quantization)
    filled = short.prefix.fill(TEXTS)
    assert (filled.texts, filled.computed, filled.kept) == (3, 3, 3)
    for text in TEXTS:
        (loss, gradients), (ours, own) = (loss_and_gradients(one, [text]) for one in (whole, short.model))
        assert torch.equal(loss, ours)
        assert gradients.keys() == own.keys()
        assert all(torch.equal(gradients[name], own[name]) for name in gradients)
    assert short.lower.calls == 0


def test_texts_read_together_differ_by_rounding_alone(folder: Path, tmp_path: Path) -> None:
    whole, short = attached(model.load_base(folder, "nf4", tiny.CPU)), shortened(folder, tmp_path)
    short.prefix.fill(TEXTS)
    (loss, _), (ours, _) = (loss_and_gradients(one, TEXTS) for one in (whole, short.model))
    assert abs(float(loss - ours)) < 1e-5 * float(loss)


def test_what_nobody_kept_is_computed_when_asked_for_with_the_same_bits(folder: Path, tmp_path: Path) -> None:
    kept, bare = (shortened(folder, tmp_path / name) for name in ("a", "b"))
    kept.prefix.fill(TEXTS)
    for text in TEXTS:
        (loss, _), (ours, _) = (loss_and_gradients(one.model, [text]) for one in (kept, bare))
        assert torch.equal(loss, ours)
    assert bare.lower.calls == len(TEXTS)
    (loss, _), (ours, _) = (loss_and_gradients(one.model, TEXTS) for one in (kept, bare))
    assert torch.equal(loss, ours)
    assert bare.lower.calls == len(TEXTS) + 1, "those that are asked for together come together"


def test_texts_that_will_be_asked_for_are_computed_in_one_go_and_held_for_as_long(folder: Path, tmp_path: Path) -> None:
    kept, ahead = (shortened(folder, tmp_path / name) for name in ("a", "b"))
    kept.prefix.fill(TEXTS)
    ahead.prefix.fill(TEXTS[:1])
    a_text = len(TEXTS[1]) * ahead.lower.width * 4 / 2**30
    ahead.prefix.ahead(TEXTS, 1.5 * a_text)
    assert ahead.lower.calls == 1
    for text in TEXTS[:2]:
        assert torch.equal(loss_and_gradients(kept.model, [text])[0], loss_and_gradients(ahead.model, [text])[0])
    assert ahead.lower.calls == 1
    ahead.prefix.ahead(TEXTS, 1.5 * a_text)
    assert ahead.lower.calls == 1, "what is held is not computed again"
    ahead.prefix.ahead(TEXTS[2:])
    assert ahead.lower.calls == 2
    assert [*ahead.prefix._near] == TEXTS[2:]


def test_generation_uses_the_whole_model_and_leaves_the_short_one(folder: Path, tmp_path: Path) -> None:
    whole, short = attached(model.load_base(folder, "none", tiny.CPU)), shortened(folder, tmp_path, "none")
    words = tiny.tokenizer().backend_tokenizer
    with short.whole():
        said = Speaker(short.model, words, 257).complete(TEXTS, [], 6)
    assert said == Speaker(whole, words, 257).complete(TEXTS, [], 6)
    assert model.bare(short.model).get_input_embeddings() is short.prefix
    short.prefix.fill(TEXTS)
    assert torch.equal(loss_and_gradients(short.model, TEXTS[:1])[0], loss_and_gradients(whole, TEXTS[:1])[0])


def test_a_base_too_large_for_the_device_is_read_but_does_not_write(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = attached(model.load_base(folder, "nf4", tiny.CPU)), shortened(folder, tmp_path)
    monkeypatch.setattr(prefix.Lower, "fits", lambda _self: False)
    for text in TEXTS:
        assert torch.equal(loss_and_gradients(short.model, [text])[0], loss_and_gradients(whole, [text])[0])
    assert short.lower.calls == 0
    with pytest.raises(prefix.NoRoom), short.whole():
        pass


def test_an_adapter_of_the_short_model_is_one_of_the_whole(folder: Path, tmp_path: Path) -> None:
    whole, short = (
        model.attach(model.load_base(folder, "none", tiny.CPU), SHAPE, 5),
        shortened(folder, tmp_path, "none"),
    )
    model.save_adapter(short.model, tmp_path / "adapter", "tiny")
    model.read_weights(whole, tmp_path / "adapter")
    short.prefix.fill(TEXTS)
    assert torch.equal(loss_and_gradients(whole.eval(), TEXTS[:1])[0], loss_and_gradients(short.model, TEXTS[:1])[0])


def test_filling_again_computes_nothing(folder: Path, tmp_path: Path) -> None:
    shortened(folder, tmp_path).prefix.fill(TEXTS)
    assert shortened(folder, tmp_path).prefix.fill(TEXTS).computed == 0


def test_lower_layers_are_loaded_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    load = model.load_base

    def watched(*given: Any) -> Any:
        asked.append(given[3].stop - given[3].start)
        return load(*given)

    monkeypatch.setattr(model, "load_base", watched)
    prefix.streamed(source(folder), TEXTS)
    assert asked == [0, 1, 1, 1, 1]


def test_a_layer_is_gone_before_the_next_one_comes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, seen, left = model.load_base, [], []

    def watched(*given: Any) -> Any:
        left.append(sum(one() is not None for one in seen))
        made = load(*given)
        seen.extend(map(weakref.ref, made.parameters()))
        return made

    monkeypatch.setattr(model, "load_base", watched)
    gc.disable()  # circles stay, as they may for long
    try:
        prefix.streamed(source(folder), TEXTS)
    finally:
        gc.enable()
    assert left == [0] * (1 + LAYERS - TOP)


def test_a_damaged_entry_is_made_again(folder: Path, tmp_path: Path) -> None:
    short = shortened(folder, tmp_path)
    short.prefix.fill(TEXTS)
    victim = next((tmp_path / "depot").glob("*/*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-3] ^= 1
    victim.write_bytes(data)
    again = shortened(folder, tmp_path)
    assert again.prefix.fill(TEXTS).computed == 1
    whole = attached(model.load_base(folder, "nf4", tiny.CPU))
    for text in TEXTS:
        assert torch.equal(loss_and_gradients(again.model, [text])[0], loss_and_gradients(whole, [text])[0])


def test_another_base_quantisation_or_layer_is_another_folder(folder: Path, tmp_path: Path) -> None:
    made = {source(folder, "nf4").made(), source(folder, "none").made(), Source(folder, "nf4", tiny.CPU, 1).made()}
    assert len(made) == 3
    was = source(folder).made()
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())  # rewritten: who knows what is in it
    assert source(folder).made() != was


def test_a_base_that_scales_its_embedding_is_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    about = GraniteConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, embedding_multiplier=2.0,
    )  # fmt: skip
    GraniteForCausalLM(about).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="prefix_gib: 0"):
        prefix.load(Source(tmp_path, "none", tiny.CPU, 2), 1.0, tmp_path / "depot")


def test_a_full_shelf_keeps_what_this_run_needs_and_drops_what_is_longest_unused(tmp_path: Path) -> None:
    one = torch.zeros(1000)  # 4,000 bytes and a header
    old, new = Depot(tmp_path, "old", 10_000), Depot(tmp_path, "new", 10_000)
    assert old.put("a", one)
    assert old.put("b", one)
    assert not old.put("c", one)
    assert new.put("c", one)
    assert new.get("c") is not None
    assert [path.stem for path in sorted(tmp_path.glob("*/*"))].count("c") == 1
    assert len(list(tmp_path.glob("*/*"))) == 2


def test_depot_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.home("prefix") == tmp_path / "minisymposium" / "prefix"


def trained(folder: Path, name: str, **changes: Any) -> runs.RunFolder:
    path = small.recipe(folder, lora={"rank": 4, "alpha": 4, "layers": {"top": 1}}, **changes)
    outcome = night.run(orders.read(Order(str(path), out=folder / name)), Screen(Console(quiet=True)), page=False)
    return runs.RunFolder(outcome.folder)


def losses(run: runs.RunFolder, kind: str) -> list[float]:
    return [row["nll" if kind == "look" else "loss"] for row in runs.read_lines(run.metrics) if row["kind"] == kind]


@pytest.mark.usefixtures("short_drift")
def test_a_night_on_stored_activations_is_the_same_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[list[prefix.Ids]] = []
    real = prefix.Lower.streams
    monkeypatch.setattr(prefix.Lower, "streams", lambda self, texts: asked.append(list(texts)) or real(self, texts))
    stored = trained(tmp_path, "stored", formats={"sampled": 0.3})
    drawn = [ids for some in asked for ids in some]
    assert len(asked) == 1 < len(drawn) == len(set(drawn)), "all drawn formats pass the lower layers at once"
    whole = trained(tmp_path, "whole", formats={"sampled": 0.3}, machine={"prefix_gib": 0})
    for kind in ("step", "look"):
        assert losses(stored, kind) == pytest.approx(losses(whole, kind), rel=1e-4)
    asked = [[row["answer"] for row in runs.read_lines(run.samples)][:2] for run in (stored, whole)]  # the base's own
    assert asked[0] == asked[1]
    told = runs.read_json(stored.run_json)["derived"]
    assert told["stored_activations_gib"]["value"] > 0
    assert "stored_activations_gib" not in runs.read_json(whole.run_json)["derived"]
    assert list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.usefixtures("short_drift")
def test_a_night_that_cannot_write_answers_goes_on_without_them_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(prefix.Lower, "fits", lambda _self: False)
    asked: list[prefix.Ids] = []
    real = prefix.Lower.streams
    monkeypatch.setattr(prefix.Lower, "streams", lambda self, texts: asked.extend(texts) or real(self, texts))
    run = trained(tmp_path, "mute")
    assert asked == [], "looks read nothing that was not stored beforehand"
    assert runs.read_json(run.run_json)["state"] == "finished"
    assert losses(run, "look")
    assert runs.read_lines(run.samples) == []
    assert run.log.read_text().count("No answers are written") == 1
