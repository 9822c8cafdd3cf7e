"""Tiny random bases, texts and trainings for tests: real libraries, small numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from finetune import model, train
from finetune.batches import Epochs, Item, Packing
from finetune.estimate import Length, steps_per_epoch
from finetune.recipe import Optimizer
from finetune.train import Job, Progress

CPU = torch.device("cpu")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHAPE = model.LoraShape(rank=4, alpha=4.0, dropout=0.0, targets=ALL)
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 2) -> Path:
    """A random base of width 64 with a byte-level tokenizer of its own; weights are large, so that it has opinions."""
    config, kind_of_model = KINDS[kind]
    torch.manual_seed(0)
    made = kind_of_model(
        config(
            vocab_size=258,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            max_position_embeddings=512,
            bos_token_id=256,
            eos_token_id=257,
        )
    )
    made.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then BOS and EOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


def texts(lengths: Sequence[int], prompt: int = 4, vocabulary: int = 256) -> list[Item]:
    """Random texts of these lengths; all after the first `prompt` tokens is supervised."""
    draw = random.Random(7)
    return [
        Item(f"e{i}", "a", tuple(draw.randrange(vocabulary) for _ in range(n)), tuple(t >= prompt for t in range(n)))
        for i, n in enumerate(lengths)
    ]


@dataclass
class Notes:
    """A watcher that writes down what it is told and asks for nothing."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def step(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def pause(self, step: int, progress: Progress, gradient: float | None) -> bool:
        return False

    def wants(self, step: int) -> bool:
        return False

    def stop(self) -> bool:
        return False

    def say(self, text: str) -> None:
        self.said.append(text)


@contextmanager
def nowhere(_step: int) -> Iterator[Path]:
    """For a training that saves nothing."""
    raise AssertionError("no checkpoint was asked for")
    yield Path()


def job(folder: Path, items: Sequence[Item], steps: int, batch_size: int = 1, **changes: Any) -> Job:
    """Items in the order given, each epoch the same. `optimizer`: settings of it; the rest: fields of Job."""
    keyed = {(item.example, item.format): item for item in items}
    names = {item.example: [one.format for one in items if one.example == item.example] for item in items}
    epochs = Epochs(lambda *key: keyed[key], list(names), lambda _epoch, one: names[one], 0, "never", batch_size)
    optimizer: Mapping[str, Any] = {"learning_rate": 1e-3, **changes.pop("optimizer", {})}
    length = Length(steps_per_epoch(epochs.size, batch_size), steps, optimizer.get("warmup_steps", 0))
    packing = Packing(texts=changes.pop("micro_batch", None))
    settings = Optimizer(**optimizer)
    made = Job(epochs, settings, length, batch_size, packing, 0, "tiny", folder / "work", nowhere)
    return replace(made, **changes)


def adapted(folder: Path, quantization: str = "none", shape: model.LoraShape = SHAPE) -> Any:
    """A base with a fresh adapter, on the CPU."""
    return model.attach(model.load_base(folder, quantization, CPU), shape, seed=0)


def trained(folder: Path, work: Job, net: Any = None) -> tuple[Any, list[dict[str, Any]]]:
    """The model after a training, and a row for each step."""
    net, notes = net if net is not None else adapted(folder), Notes()
    train.train(net, folder, work, notes)
    return net, notes.rows


def stirred(net: Any, size: float = 0.05) -> Any:
    """The same model with an adapter that says something: lora_B drawn at random."""
    draw = torch.Generator().manual_seed(3)
    for name, weight in model.adapter_weights(net).items():
        if "lora_B" in name:
            weight.data.copy_(size * torch.randn(weight.shape, generator=draw))
    return net


def weights(net: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights."""
    return {name: weight.detach().clone() for name, weight in model.adapter_weights(net).items()}


def logits(net: Any, ids: Sequence[int]) -> torch.Tensor:
    """Next-token logits (T, vocabulary) of one text, in eval mode."""
    net.eval()
    with torch.no_grad():
        found: torch.Tensor = net(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return found
