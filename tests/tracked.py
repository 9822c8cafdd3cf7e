"""The memory of a whole training step, tracked on a CPU in the dtypes of CUDA, beside what `memory.bill` says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import tiny
import torch

from finetune import bases, head, memory, model, peaks
from finetune.memory import GIB, Load

ABSENT = ("CUDA", "margin")  # lines of the bill that no CPU can show


@dataclass(frozen=True)
class Cell:
    """One of the grid. `micro`: micro-batches of a step; `twice`: lower layers alone that are computed twice."""

    rank: int
    length: int
    batch: int
    checkpointing: bool
    quantization: str = "nf4"
    micro: int = 1
    twice: int = 0


def tracked(folder: Path, cell: Cell) -> float:
    """GiB of all tensors at the peak of the second step, the first one's optimizer state included."""
    shape = model.LoraShape(cell.rank, cell.rank, 0.0, tiny.ALL)
    net = model.attach(peaks.as_on_cuda(model.load_base(folder, cell.quantization, tiny.CPU)), shape, 0)
    if cell.checkpointing or cell.twice:
        net.activation_checkpointing_enable({"use_reentrant": False})
    for depth, layer in enumerate(model.trained_layers(net)):
        layer.gradient_checkpointing = cell.checkpointing or depth < cell.twice
    plain, weights = model.bare(net), [*model.adapter_weights(net).values()]
    optimizer = torch.optim.AdamW(weights, 1e-4, foreach=True)  # as on CUDA
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    state = [one for kept in optimizer.state.values() for one in kept.values()]
    ids = torch.randint(0, plain.config.vocab_size, (cell.batch, cell.length))

    def step() -> None:
        for _ in range(cell.micro):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = plain.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                nll, _ = head.token_nll(plain, hidden.reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1))
                loss = nll.sum() / nll.numel()
                del hidden
            torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    there = [*peaks.held(net), *state]
    return (peaks.bytes_of(there) + peaks.used(tiny.CPU, there, step).most) / GIB


def load_of(folder: Path, cell: Cell) -> Load:
    shape = bases.shape_in(folder)
    assert shape is not None
    adapter = memory.adapter_weights(shape, cell.rank, memory.MATRICES, shape.layers)
    twice = shape.layers if cell.checkpointing else cell.twice
    load = Load(shape, cell.quantization, adapter, shape.layers, "adamw", cell.batch * cell.length, twice)
    return replace(load, accumulated=cell.micro > 1)


def estimated(folder: Path, cell: Cell) -> float:
    return sum(line.gib for line in memory.bill(load_of(folder, cell)) if line.name not in ABSENT)
