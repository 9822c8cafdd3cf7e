"""How long a layer, the head and a step take on this machine: `python -m finetune.calibrate`, JSON in, JSON out.

A base of the recipe's shape with one and with a few layers is drawn at random, written aside and loaded as a run loads
its own, so that quantising, hooks and LoRA are the real ones; the difference of the two is a layer. The texts mean
nothing. It keeps nothing, and stops when its seconds are spent.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from finetune import bases, disk, model, peaks, train
from finetune.rates import Calibration
from finetune.slices import Slice

_WEIGHTS, _LAYERS = 5e7, 8  # small layers are measured several at once, or their difference drowns in noise
_NOISE = 2**20  # random weights that are repeated all over: drawing billions takes longer than measuring them
_PROBE = 16  # tokens of the first, cheap pass
_TRACED = (8, 24)  # tokens of the passes whose memory is watched
_ONE_COUNT = 0.4  # of the time left that the first passes of one token count may take
_LEAST = 8  # tokens


def random_base(config: Mapping[str, Any], layers: int, folder: Path) -> Path:
    """A base of this configuration with `layers` layers and random bf16 weights. OSError where the disk is full."""
    about = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    if isinstance(about.get("text_config"), dict):
        about["text_config"] = _of(about["text_config"], layers)
    (folder / "config.json").write_text(json.dumps(_of(about, layers)))
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    noise = (0.02 * torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))).to(torch.bfloat16)
    save_file({name: _filled(weight, noise) for name, weight in net.named_parameters()}, folder / "model.safetensors")
    return folder


def _of(about: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The same settings, of so many layers."""
    kinds = about.get("layer_types")
    return {**about, "num_hidden_layers": layers} | ({"layer_types": kinds[:layers]} if isinstance(kinds, list) else {})


def _filled(weight: Tensor, noise: Tensor) -> Tensor:
    if weight.ndim == 1:
        return torch.ones(weight.shape, dtype=torch.bfloat16)
    return noise.repeat(-(-weight.numel() // noise.numel()))[: weight.numel()].reshape(weight.shape).contiguous()


@dataclass
class Piece:
    """Some layers with an adapter, and what is done with them."""

    net: Any
    layers: int
    device: torch.device
    optimizer: Any

    def hidden(self, tokens: int) -> Tensor:
        """(tokens, hidden) of a text of zeros."""
        ids = torch.zeros((1, tokens), dtype=torch.long, device=self.device)
        last: Tensor = model.bare(self.net).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        return last

    def training(self, tokens: int) -> None:
        """Forward and backward, without a head."""
        with model.working_precision(self.device):
            total = self.hidden(tokens).sum()
        torch.autograd.backward(total)

    def again(self, tokens: int) -> None:
        """The same, each layer's forward done twice."""
        self.net.activation_checkpointing_enable({"use_reentrant": False})
        self.training(tokens)
        self.net.activation_checkpointing_disable()

    def reading(self, tokens: int) -> None:
        """Forward alone."""
        with torch.no_grad(), model.working_precision(self.device):
            self.hidden(tokens)

    def stepping(self, _tokens: int) -> None:
        """One optimizer step, gradients clipped."""
        torch.nn.utils.clip_grad_norm_(model.adapter_weights(self.net).values(), 1.0)
        self.optimizer.step()

    def kept(self, tokens: int) -> int:
        """Bytes of a forward pass at its peak, in the dtypes of CUDA."""
        with torch.autocast(self.device.type, torch.bfloat16):
            return peaks.most(self.device, peaks.held(self.net), lambda: self.hidden(tokens))


def _piece(folder: Path, part: Slice, asked: Mapping[str, Any], device: torch.device) -> Piece:
    shape = model.LoraShape(asked["rank"], asked["rank"], asked["dropout"], tuple(asked["targets"]))
    net = model.attach(model.load_base(folder, asked["quantization"], device, part), shape, 0)
    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    kind = kinds.get(asked["optimizer"], torch.optim.AdamW) if device.type == "cuda" else torch.optim.AdamW
    return Piece(net, part.stop, device, kind(model.adapter_weights(net).values(), 1e-9))


@dataclass(frozen=True)
class Head:
    """The head at the real vocabulary; the stream it is given is random."""

    plain: Any
    device: torch.device

    def training(self, tokens: int) -> None:
        """The loss of so many tokens, its hits and its gradient."""
        torch.autograd.backward(self._nll(tokens, True).sum())

    def reading(self, tokens: int) -> None:
        """The loss alone."""
        with torch.no_grad():
            self._nll(tokens, False)

    def _nll(self, tokens: int, trained: bool) -> Tensor:
        width = self.plain.config.get_text_config().hidden_size
        hidden = torch.randn((tokens, width), device=self.device).requires_grad_(trained)
        with model.working_precision(self.device):
            return train.token_nll(self.plain, hidden, torch.zeros_like(hidden[:, 0]).long(), trained)[0]


class Clock:
    """Seconds of pieces of work, by name and token count, within a budget."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self._device, self._end = device, time.monotonic() + budget
        self.took: dict[tuple[str, int], list[float]] = defaultdict(list)

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def time(self, name: str, tokens: int, work: Callable[[int], object]) -> float:
        """Do it once, and write down how long that took."""
        self._wait()
        began = time.monotonic()
        work(tokens)
        self._wait()
        self.took[name, tokens].append(time.monotonic() - began)
        return self.took[name, tokens][-1]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def median(self, name: str, tokens: int, less: str = "") -> float:
        """Of all rounds; of differences within a round where something is taken off. The first round warms up."""
        took = self.took[name, tokens]
        if less:
            took = [a - b for a, b in zip(took, self.took[less, tokens], strict=True)]
        return statistics.median(took[1:] or took)


def measure(asked: Mapping[str, Any]) -> Calibration:
    """Make the pieces, time them, watch their memory. Errors: UserError, OSError, whatever a device raises."""
    began, device = time.monotonic(), model.pick_device()
    model.spare_a_core()
    with tempfile.TemporaryDirectory(prefix="sft-calibration-") as name:
        layers = _layers(asked["config"])
        folder = random_base(asked["config"], layers, Path(name))
        one = _piece(folder, Slice(0, 1), asked, device)
        more = _piece(folder, Slice(0, layers, outside=False), asked, device)
    clock = Clock(device, asked["budget"])
    head = Head(model.bare(one.net), device)
    counts = _rounds(clock, one, more, head, sorted(asked["tokens"]))
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else None
    return _summed(clock, counts, layers - 1, _a_layer(one, more), time.monotonic() - began, gib)


def _layers(config: Mapping[str, Any]) -> int:
    """How many the larger model has: two, or more where they are small."""
    shape = bases.shape_of(config)
    if shape is None:
        return 2
    return min(shape.layers, max(2, min(_LAYERS, int(_WEIGHTS * shape.layers / shape.in_layers))))


def _rounds(clock: Clock, one: Piece, more: Piece, head: Head, wanted: Sequence[int]) -> list[int]:
    """Time all there is, again and again until the time is up; which token counts that were."""

    all_there_is: dict[str, Callable[[int], object]] = {
        "one": one.training,
        "more": more.training,
        "one again": one.again,
        "more again": more.again,
        "one reads": one.reading,
        "more reads": more.reading,
        "head": head.training,
        "head reads": head.reading,
        "one steps": one.stepping,
        "more steps": more.stepping,
    }

    def once(tokens: int) -> float:
        return sum(clock.time(name, tokens, work) for name, work in all_there_is.items())

    once(min(_PROBE, wanted[0]))
    rate = once(min(_PROBE, wanted[0])) / min(_PROBE, wanted[0])  # seconds a token: rather too many
    clock.took.clear()
    most = int(_ONE_COUNT * clock.left / rate / 2)
    counts: list[int] = []
    for tokens in wanted if wanted[0] <= most else (max(_LEAST, most // 2), max(2 * _LEAST, most)):
        if counts and rate * tokens > _ONE_COUNT * clock.left:
            break
        once(tokens)
        counts.append(tokens)
        rate = once(tokens) / tokens
    while clock.left > rate * sum(counts):
        for tokens in counts:
            once(tokens)
    return counts


def _a_layer(one: Piece, more: Piece) -> float:
    """Bytes a token and layer that a forward pass keeps on a card; what does not grow with the text falls out."""
    few, many = _TRACED if one.device.type == "cpu" else tuple(64 * size for size in _TRACED)
    if one.device.type == "cpu":
        peaks.as_on_cuda(one.net)
        peaks.as_on_cuda(more.net)
    if more.layers == one.layers:
        return 0.0
    rise = [piece.kept(many) - piece.kept(few) for piece in (one, more)]
    return max(0.0, (rise[1] - rise[0]) / (many - few) / (more.layers - one.layers))


def _summed(
    clock: Clock, counts: Sequence[int], between: int, a_layer: float, took: float, gib: float | None
) -> Calibration:
    """`between`: layers by which the two models differ; 0 where the base has only one."""

    def a_layer_of(name: str, tokens: int) -> float:
        if not between:
            return clock.median(f"one{name}", tokens)
        return max(0.0, clock.median(f"more{name}", tokens, less=f"one{name}") / between)

    layer = [a_layer_of("", tokens) for tokens in counts]
    step = a_layer_of(" steps", counts[0])
    return Calibration(
        tuple(counts),
        tuple(layer),
        tuple(max(0.0, a_layer_of(" again", tokens) - own) for tokens, own in zip(counts, layer, strict=True)),
        tuple(a_layer_of(" reads", tokens) for tokens in counts),
        tuple(max(0.0, clock.median("one", tokens) - own) for tokens, own in zip(counts, layer, strict=True)),
        tuple(clock.median("head", tokens) for tokens in counts),
        tuple(clock.median("head reads", tokens) for tokens in counts),
        step,
        max(0.0, clock.median("one steps", counts[0]) - step),
        a_layer,
        took,
        gib,
    )


def main() -> int:
    """A request on stdin, a calibration on stdout; what failed in one line on stderr."""
    try:
        found = measure(json.load(sys.stdin))
    except Exception as fault:  # a device, a disk and four libraries: whatever it is, `check` goes on without figures
        full = "no space is left on the disk" if disk.is_full(fault, Path(tempfile.gettempdir())) else ""
        print(" ".join((full or f"{type(fault).__name__}: {fault}").split()), file=sys.stderr)
        return 2
    print(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
