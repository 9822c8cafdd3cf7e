"""Where one training step goes: dequantisation, the base's products, LoRA's, attention, head, casts, optimizer, Python.

    .venv/bin/python tests/bench/profile_step.py [HIDDEN] [LAYERS] [TOKENS]

A random Mistral of that shape (by default 1.0 B weights: 2048 wide, 22 layers, a vocabulary of 32,000), NF4, rank 16 on
seven matrices, one text of TOKENS tokens, half of them in the loss; one thread. Shares are of the wall time of the
second step; what no operator accounts for is Python's. The floor: 4 FLOPs per frozen weight and token at the rate of
one fp32 product of the same size, measured in the same run; unpacking four bits is above it.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import MistralConfig, MistralForCausalLM

from finetune import model, varlen
from finetune.head import summed_nll

RANK, VOCABULARY = 16, 32000
KINDS = (
    ("dequantisation", ("dequantize", "gemm_4bit", "gemv_4bit")),
    ("attention", ("scaled_dot_product", "flash")),
    ("optimizer", ("foreach", "fused_adam", "addcdiv", "addcmul", "sqrt")),
    ("casts and copies", ("copy_", "to_copy", "::cat", "clone", "contiguous", "index")),
    ("norms, gates, residuals", ("mul", "add", "silu", "rsqrt", "pow", "mean", "sum", "neg", "sigmoid", "div", "sub")),
    ("loss", ("log_softmax", "nll_loss", "argmax")),
)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")


def base(folder: Path, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    about = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    MistralForCausalLM(about).to(torch.bfloat16).save_pretrained(folder)
    return folder


def step(net: Any, optimizer: Any, ids: list[int]) -> None:
    plain, half = model.bare(net), len(ids) // 2
    loss = summed_nll(plain, varlen.hidden(plain, [ids])[half:-1], torch.tensor(ids)[half + 1 :]) / half
    torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()


def kind(event: Any) -> str:
    """Which part of a step an operator belongs to, by its name and the sizes it met."""
    name = event.key
    if name in PRODUCTS:
        sizes = {size for shape in event.input_shapes for size in (shape or ())}
        return "head" if VOCABULARY in sizes else "LoRA's products" if RANK in sizes else "the base's products"
    return next((title for title, words in KINDS if any(word in name for word in words)), "other operators")


def rate(hidden: int, tokens: int) -> float:
    """FLOP/s of one fp32 product as the base's largest ones are."""
    one, other = torch.randn(tokens, hidden), torch.randn(hidden, hidden * 11 // 4)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        one @ other
        took.append(time.perf_counter() - began)
    return 2 * tokens * hidden * (hidden * 11 // 4) / sorted(took)[2]


def main() -> None:
    hidden, layers, tokens = (int(one) for one in (*sys.argv[1:4], *("2048", "22", "256")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as name:
        net = model.attach(
            model.load_base(base(Path(name), hidden, layers), "nf4", tiny.CPU),
            model.LoraShape(RANK, float(RANK), 0.0, tiny.ALL),
            0,
        )
        stack = model.decoder_layers(net)
        frozen = sum(2 * weight.numel() for weight in stack.parameters() if weight.dtype == torch.uint8)
        optimizer = torch.optim.AdamW(model.adapter_weights(net).values(), 1e-4)
        ids = list(range(1, tokens + 1))
        step(net, optimizer, ids)
        began = time.perf_counter()
        step(net, optimizer, ids)
        plain = time.perf_counter() - began
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as told:
            began = time.perf_counter()
            step(net, optimizer, ids)
            wall = time.perf_counter() - began
    shares: dict[str, float] = defaultdict(float)
    for event in told.key_averages(group_by_input_shape=True):
        shares[kind(event)] += event.self_cpu_time_total / 1e6
    shares["Python and the rest"] = max(0.0, wall - sum(shares.values()))
    floor = (4 * frozen * tokens + 4 * hidden * VOCABULARY * tokens / 2) / rate(hidden, tokens)
    print(f"{frozen / 1e9:.2f} B weights in the layers, {tokens} tokens: {plain:.2f} s, {wall:.2f} s while profiled")
    print(f"floor, 4 FLOPs a weight and token, the head for half of them: {floor:.2f} s, {floor / plain:.0%}")
    for title, seconds in sorted(shares.items(), key=lambda pair: -pair[1]):
        print(f"{title:26}{seconds:8.2f} s{seconds / wall:8.1%}")


if __name__ == "__main__":
    main()
