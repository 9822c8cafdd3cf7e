"""A base in three settings, an adapter that is fp32 and portable, a residual stream that loses nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM

from finetune import model, packed
from finetune.errors import UserError
from finetune.model import LoraShape

IDS = tuple(range(40, 70))
SETTINGS = ["none", "nf4", "int8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("model") / "llama")


def in_bf16(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    """A bf16 base under bf16 autocast, as on a GPU, but on the CPU."""
    monkeypatch.setattr(model, "working_precision", lambda _device: torch.autocast("cpu", torch.bfloat16))
    tiny.base(folder, dtype=torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def test_the_residual_stream_is_fp32_even_for_a_bf16_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = in_bf16(monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match="bfloat16"):
        model.assert_fp32_residual(bare)
    model._residual_in_fp32(bare)
    model.assert_fp32_residual(model.attach(bare, tiny.SHAPE, seed=0))
    assert bare.get_input_embeddings().weight.dtype == torch.bfloat16


def test_norms_alone_do_not_make_the_residual_stream_fp32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = in_bf16(monkeypatch, tmp_path)
    for module in bare.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    with pytest.raises(RuntimeError, match="bfloat16"):
        model.assert_fp32_residual(bare)


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("quantization", SETTINGS)
def test_every_setting_of_every_family_has_an_fp32_adapter_and_residual(
    kind: str, quantization: str, tmp_path: Path
) -> None:
    adapted = tiny.adapted(tiny.base(tmp_path, kind, torch.bfloat16), quantization)
    model.assert_fp32_adapter(adapted)
    model.assert_fp32_residual(adapted)
    assert len(model.adapter_weights(adapted)) == 2 * 7 * 2


def test_a_bf16_adapter_is_refused(base: Path) -> None:
    adapted = tiny.adapted(base)
    next(iter(model.adapter_weights(adapted).values())).data = torch.zeros(4, 64, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"1 adapter weights are not fp32, first .*lora_A"):
        model.assert_fp32_adapter(adapted)


def test_unknown_targets_name_what_there_is(base: Path) -> None:
    with pytest.raises(UserError, match=r"no c_attn\..*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"):
        tiny.adapted(base, shape=LoraShape(4, 4.0, 0.0, ("q_proj", "c_attn")))


def test_only_the_top_layers_get_an_adapter(tmp_path: Path) -> None:
    adapted = tiny.adapted(tiny.base(tmp_path, layers=3), shape=LoraShape(4, 4.0, 0.0, ("q_proj", "up_proj"), top=2))
    layers = {name.split(".layers.")[1].split(".")[0] for name in model.adapter_weights(adapted)}
    assert layers == {"1", "2"}


def test_too_many_top_layers_are_refused(base: Path) -> None:
    with pytest.raises(UserError, match=r"top 3 of 2 layers\.  Give at most 2"):
        tiny.adapted(base, shape=LoraShape(4, 4.0, 0.0, ("q_proj",), top=3))


@pytest.mark.parametrize("quantization", SETTINGS)
def test_the_fresh_adapter_changes_nothing(base: Path, quantization: str) -> None:
    bare = tiny.logits(model.load_base(base, quantization, tiny.CPU), IDS)
    adapted = tiny.adapted(base, quantization)
    assert torch.equal(tiny.logits(adapted, IDS), bare)
    assert not torch.equal(tiny.logits(tiny.stirred(adapted), IDS), bare)


@pytest.mark.parametrize("quantization", SETTINGS)
def test_turning_the_adapter_off_gives_the_base(base: Path, quantization: str) -> None:
    bare = tiny.logits(model.load_base(base, quantization, tiny.CPU), IDS)
    adapted = tiny.stirred(tiny.adapted(base, quantization))
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted, IDS), bare)


def gradients(adapted: Any) -> list[torch.Tensor]:
    """Of the adapter, after one backward pass in train mode."""
    adapted.train()
    adapted.zero_grad()
    ids = torch.tensor([IDS])
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [weight.grad.clone() for weight in model.adapter_weights(adapted).values()]


@pytest.mark.parametrize("quantization", SETTINGS)
def test_a_look_between_steps_changes_nothing(base: Path, quantization: str) -> None:
    adapted = tiny.stirred(tiny.adapted(base, quantization))
    before = gradients(adapted)
    first = tiny.logits(adapted, IDS)
    again = gradients(adapted)
    assert torch.equal(tiny.logits(adapted, IDS), first)
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))


@pytest.mark.parametrize("quantization", ["none", "nf4"])  # int8 on a CPU trains on unrounded inputs, looks on rounded
def test_a_look_sees_what_training_computes(base: Path, quantization: str) -> None:
    adapted = tiny.stirred(tiny.adapted(base, quantization))
    with torch.no_grad():
        trained = adapted.train()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0]
    assert torch.equal(tiny.logits(adapted, IDS), trained)


def unpacked(base: Path) -> Any:
    """The same base with NF4's rounded weights in plain fp32 matrices."""
    plain, packed = (model.load_base(base, setting, tiny.CPU) for setting in ("none", "nf4"))
    for name, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(rounded)
    return plain


def test_nf4_computes_with_its_rounded_weights_and_nothing_else_is_rounded(base: Path) -> None:
    packed, plain = tiny.adapted(base, "nf4"), model.attach(unpacked(base), tiny.SHAPE, seed=0)
    assert torch.allclose(tiny.logits(tiny.stirred(packed), IDS), tiny.logits(tiny.stirred(plain), IDS), atol=1e-5)
    for one, other in zip(gradients(packed), gradients(plain), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("quantization", SETTINGS)
def test_the_adapter_loads_with_plain_peft(base: Path, tmp_path: Path, quantization: str) -> None:
    adapted = tiny.stirred(tiny.adapted(base, quantization))
    model.save_adapter(adapted, tmp_path, "tiny")
    again = PeftModel.from_pretrained(model.load_base(base, quantization, tiny.CPU), str(tmp_path))
    assert torch.equal(tiny.logits(again, IDS), tiny.logits(adapted, IDS))
    fresh = tiny.adapted(base, quantization)
    model.read_weights(fresh, tmp_path)
    assert torch.equal(tiny.logits(fresh, IDS), tiny.logits(adapted, IDS))


def test_saving_twice_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        model.save_adapter(tiny.stirred(tiny.adapted(base)), tmp_path / name, "tiny")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {model.ADAPTER_CONFIG, model.ADAPTER_WEIGHTS}


def test_an_adapter_names_its_base_and_no_path(base: Path, tmp_path: Path) -> None:
    model.save_adapter(tiny.adapted(base), tmp_path, "owner/tiny")
    text = (tmp_path / model.ADAPTER_CONFIG).read_text()
    assert json.loads(text)["base_model_name_or_path"] == "owner/tiny"
    assert str(base.parent) not in text


def test_an_adapter_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    model.save_adapter(tiny.adapted(base, shape=LoraShape(4, 4.0, 0.0, ("q_proj",))), tmp_path, "tiny")
    with pytest.raises(UserError, match="another shape than the recipe's"):
        model.read_weights(tiny.adapted(base), tmp_path)


def test_an_adapter_of_another_rank_is_refused(base: Path, tmp_path: Path) -> None:
    model.save_adapter(tiny.adapted(base, shape=LoraShape(8, 8.0, 0.0, tiny.ALL)), tmp_path, "tiny")
    with pytest.raises(UserError, match="another shape than the recipe's"):
        model.read_weights(tiny.adapted(base), tmp_path)


def test_no_base_is_loaded_without_saying_why(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(UserError, match=r"base: empty cannot be loaded.*config\.json"):
        model.load_base(folder, "none", tiny.CPU)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"base: empty cannot be loaded.*safetensors"):
        model.load_base(folder, "none", tiny.CPU)


def test_no_base_is_found_without_saying_why() -> None:
    with pytest.raises(UserError, match=r"base: nobody/no-such-base .*name a folder, or `base: pocket`"):
        model.find_base("nobody/no-such-base")
    with pytest.raises(UserError, match="hf download nobody/no-such-base"):
        model.find_base("nobody/no-such-base", online=False)


def test_a_base_is_named_without_a_path(base: Path) -> None:
    assert model.find_base(str(base)).name == "llama"
    assert model.find_base("pocket").name == "pocket"


def test_the_fingerprint_follows_what_decides_the_tokens(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path)
    before = model.fingerprint(folder)
    assert model.fingerprint(folder) == before
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("</s>", "</e>"))
    assert model.fingerprint(folder) != before


def test_movement_counts_entries_and_distance(base: Path) -> None:
    adapted = tiny.adapted(base, shape=LoraShape(4, 4.0, 0.0, ("q_proj",), top=1))
    start = model.Start(adapted)
    none = start.movement(adapted)
    assert (none.share, none.distance, none.mean) == (0.0, 0.0, 0.0)
    by_name = {name.split(".")[-3]: weight for name, weight in model.adapter_weights(adapted).items()}
    by_name["lora_A"].data[:1] += 0.5  # 64 of 256 entries
    by_name["lora_B"].data[:1] += 0.5  # 4 entries, not in the share
    found = start.movement(adapted)
    assert found.share == pytest.approx(0.25)
    assert found.distance == pytest.approx((68 * 0.25) ** 0.5)
    assert found.mean == pytest.approx(68 * 0.5 / 512)


def test_gradients_are_compared_with_eps(base: Path) -> None:
    adapted = tiny.adapted(base, shape=LoraShape(4, 4.0, 0.0, ("q_proj",)))
    assert model.gradient_over_eps(adapted, 1e-8) is None
    for weight in model.adapter_weights(adapted).values():
        weight.grad = torch.full_like(weight, 3e-8)
    assert model.gradient_over_eps(adapted, 1e-8) == pytest.approx(3.0, rel=1e-4)


def test_the_random_state_survives_what_happens_inside() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with model.frozen_random_state():
        torch.rand(100)
    assert torch.equal(torch.rand(3), wanted)


def test_a_large_base_is_quantised_once_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "_WORTH", 1)
    folder = tiny.base(tmp_path / "base")
    first, second = (model.load_base(folder, "nf4", tiny.CPU) for _ in range(2))
    (kept,) = (tmp_path / "cache").glob("*/quantised/*")
    ids = torch.tensor([[1, 2, 3, 200]])
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    assert second.config._name_or_path == str(kept)
    (kept / "model.safetensors").write_bytes(b"damaged")
    third = model.load_base(folder, "nf4", tiny.CPU)
    assert torch.equal(first(input_ids=ids).logits, third(input_ids=ids).logits)
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, (1, 1))  # touched: who knows what is in it
    model.load_base(folder, "nf4", tiny.CPU)
    (other,) = (tmp_path / "cache").glob("*/quantised/*")
    assert other != kept


def test_a_full_disk_keeps_no_quantised_base_and_harms_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "_WORTH", 1)
    (tmp_path / "cache").write_text("a file, so that nothing can be written below it")
    assert model.load_base(tiny.base(tmp_path / "base"), "nf4", tiny.CPU) is not None
