"""Most bytes of tensors alive at once while something is computed: CUDA's own counter, or, on a CPU, by watching.

A CPU's allocator counts nothing, but every tensor was made by some operator: each one's storage is counted while it
lives. What an operator takes for itself and gives back before it ends is seen on CUDA alone. It times nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """`now` and `most` bytes of all storages alive that were made inside."""

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        for one in known:  # a view of it is no new storage
            self._count(one)
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._count(one)
        return made

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_ref: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class Bytes:
    """Beside those there before: at the peak, and once it is done and its result still held."""

    most: int
    kept: int


def used(device: torch.device, known: Iterable[Tensor], work: Callable[[], object]) -> Bytes:
    """What `work` needs; `known`: tensors there before that it reads."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = int(torch.cuda.memory_allocated(device))
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        most, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        del result
        return Bytes(int(most) - before, int(kept) - before)
    watched = Watched(known)
    with watched:
        result = work()
    found = Bytes(watched.most, watched.now)
    del result
    return found


def held(net: nn.Module) -> Iterator[Tensor]:
    """Every tensor of a model: weights, buffers, and what quantised ones carry with them."""
    yield from (*net.parameters(), *net.buffers())
    for weight in net.parameters():
        state = getattr(weight, "quant_state", None)  # of Params4bit
        if state is not None:
            yield from (state.absmax, state.code)
            yield from (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
        yield from (one for name in ("CB", "SCB") if isinstance(one := getattr(weight, name, None), Tensor))  # int8


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all storages behind them, each once."""
    return sum({(one := tensor.untyped_storage())._cdata: one.nbytes() for tensor in tensors}.values())


def as_on_cuda(net: Any) -> Any:
    """A base on the CPU, in the dtypes a card would have: what is not a norm or an adapter in bf16."""
    for module in net.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.bfloat16, True
            module.weight.quant_state.dtype = torch.bfloat16
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight
            if not weight.requires_grad and weight.dtype == torch.float32:
                weight.data = weight.data.to(torch.bfloat16)
    return net
