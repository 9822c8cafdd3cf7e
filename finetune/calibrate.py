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
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from finetune import bases, disk, head, looks, model, odds, peaks
from finetune.odds import Asked
from finetune.rates import Calibration
from finetune.slices import Slice

_WEIGHTS, _LAYERS = 5e7, 4  # small layers are measured several at once, or their difference drowns in noise
_NOISE = 2**20  # random weights that are repeated all over: drawing billions takes longer than measuring them
_PROBE = 8  # tokens of the first, cheap pass
_TRACED = (8, 24)  # tokens of the passes whose memory is watched
_ONE_COUNT = 0.4  # of the time left that the first passes of one token count may take
_PROMPT, _WRITTEN = 256, 4  # tokens that answers are written after, at most, and tokens that are written
_ASKED = Asked(looks.TEMPERATURES, (odds.CUSTOMARY,), True)
_SPECK = 1e-6  # seconds a token that no machine is faster than


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
    """Some layers with an adapter, and what is done with them. `each`: tokens of a text; `answers`: of a look."""

    net: Any
    layers: int
    device: torch.device
    optimizer: Any
    each: int
    answers: int = 1
    _written: Any = None  # the cache of answers that are being written

    def hidden(self, tokens: int) -> Tensor:
        """(texts, tokens / texts, hidden) of texts of zeros: attention looks at one's own text alone."""
        texts = -(-tokens // self.each)
        ids = torch.zeros((texts, tokens // texts), dtype=torch.long, device=self.device)
        last: Tensor = model.bare(self.net).get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
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

    def begin(self, tokens: int) -> None:
        """Read prompts of so many tokens, so that answers can be written after them."""
        self._written = DynamicCache(config=model.bare(self.net).config)
        self._cached(min(tokens, _PROMPT))

    def writing(self, _tokens: int) -> None:
        """A few tokens of every answer, one after another."""
        for _ in range(_WRITTEN):
            self._cached(1)

    def _cached(self, tokens: int) -> None:
        ids = torch.zeros((self.answers, tokens), dtype=torch.long, device=self.device)
        with torch.no_grad(), model.working_precision(self.device):
            model.bare(self.net).get_decoder()(input_ids=ids, past_key_values=self._written, use_cache=True)

    def stepping(self, _tokens: int) -> None:
        """One optimizer step, gradients clipped."""
        torch.nn.utils.clip_grad_norm_(model.adapter_weights(self.net).values(), 1.0)
        self.optimizer.step()

    def kept(self, tokens: int) -> int:
        """Bytes that a forward pass keeps, in the dtypes of CUDA, as if other layers were below."""
        decoder = model.bare(self.net).get_decoder()
        width = decoder.config.get_text_config().hidden_size
        given = torch.zeros((1, tokens, width), device=self.device, requires_grad=True)
        with torch.autocast(self.device.type, torch.bfloat16):
            known = [*peaks.held(self.net), given]
            return peaks.used(self.device, known, lambda: decoder(inputs_embeds=given, use_cache=False)).kept


def _piece(folder: Path, part: Slice, asked: Mapping[str, Any], device: torch.device) -> Piece:
    shape = model.LoraShape(asked["rank"], asked["rank"], asked["dropout"], tuple(asked["targets"]))
    net = model.attach(model.load_base(folder, asked["quantization"], device, part), shape, 0)
    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    kind = kinds.get(asked["optimizer"], torch.optim.AdamW) if device.type == "cuda" else torch.optim.AdamW
    return Piece(
        net, part.stop, device, kind(model.adapter_weights(net).values(), 1e-9), asked["each"], asked["answers"]
    )


@dataclass(frozen=True)
class Head:
    """The head at the real vocabulary; the stream it is given is random."""

    plain: Any
    device: torch.device

    def training(self, tokens: int) -> None:
        """The loss of so many tokens, its hits and its gradient."""
        torch.autograd.backward(self._nll(tokens, True).sum())

    def reading(self, tokens: int) -> None:
        """All that a look asks."""
        hidden = self._hidden(tokens)
        with torch.no_grad(), model.working_precision(self.device):
            odds.score_row(self.plain, hidden, torch.zeros_like(hidden[:, 0]).long(), _ASKED)

    def writing(self, answers: int) -> None:
        """Logits of the next token of every answer, a few times."""
        with torch.no_grad(), model.working_precision(self.device):
            for _ in range(_WRITTEN):
                model.logits_of(self.plain, self._hidden(answers))

    def _nll(self, tokens: int, trained: bool) -> Tensor:
        hidden = self._hidden(tokens).requires_grad_(trained)
        with model.working_precision(self.device):
            return head.token_nll(self.plain, hidden, torch.zeros_like(hidden[:, 0]).long(), trained)[0]

    def _hidden(self, tokens: int) -> Tensor:
        return torch.randn((tokens, self.plain.config.get_text_config().hidden_size), device=self.device)


class Clock:
    """Seconds of pieces of work, by name and token count, within a budget. `now`: what tells them."""

    def __init__(self, device: torch.device, budget: float, now: Callable[[], float]) -> None:
        self._device, self._now, self._end = device, now, now() + budget
        self.took: dict[tuple[str, int], list[float]] = defaultdict(list)

    @property
    def left(self) -> float:
        return self._end - self._now()

    def time(self, name: str, tokens: int, work: Callable[[int], object]) -> float:
        """Do it once, and write down how long that took."""
        self._wait()
        began = self._now()
        work(tokens)
        self._wait()
        self.took[name, tokens].append(self._now() - began)
        return self.took[name, tokens][-1]

    def last(self, tokens: int) -> float:
        """Of the last round at one token count, all pieces together."""
        return sum(took[-1] for (_, count), took in self.took.items() if count == tokens)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def median(self, name: str, tokens: int, less: str = "") -> float:
        """Of all rounds; of differences within a round where something is taken off. The first round warms up."""
        took = self.took[name, tokens]
        if less:
            took = [a - b for a, b in zip(took, self.took[less, tokens], strict=True)]
        return statistics.median(took[1:] or took)


@dataclass
class Rig:
    """One layer, several, and a head, with a clock to time them by."""

    one: Piece
    more: Piece
    head: Head
    clock: Clock
    twice: bool  # whether layers may be computed twice; on a CPU they are not unless the recipe says so

    def once(self, tokens: int) -> float:
        """Time all there is at one token count; seconds of it all."""
        all_there_is: dict[str, Callable[[int], object]] = {
            "one": self.one.training,
            "more": self.more.training,
            "one reads": self.one.reading,
            "more reads": self.more.reading,
            "head": self.head.training,
            "head reads": self.head.reading,
            "one steps": self.one.stepping,
            "more steps": self.more.stepping,
            "one begins": self.one.begin,
            "more begins": self.more.begin,
            "one writes": self.one.writing,
            "more writes": self.more.writing,
            "head writes": lambda _: self.head.writing(self.one.answers),
        }
        all_there_is |= {"one again": self.one.again, "more again": self.more.again} if self.twice else {}
        return sum(self.clock.time(name, tokens, work) for name, work in all_there_is.items())

    def found(self, counts: Sequence[int], took: float) -> Calibration:
        """What the rounds at these token counts amount to, and the memory of a few passes more."""
        layer = [self._layer("", tokens) for tokens in counts]
        again = [self._layer(" again", tokens) for tokens in counts] if self.twice else layer
        step, write, median = self._layer(" steps", counts[0]), self._layer(" writes", counts[0]), self.clock.median
        on_card = self.one.device.type == "cuda"
        return Calibration(
            tuple(counts),
            tuple(layer),
            tuple(max(0.0, both - own) for both, own in zip(again, layer, strict=True)),
            tuple(self._layer(" reads", tokens) for tokens in counts),
            tuple(max(0.0, median("one", tokens) - own) for tokens, own in zip(counts, layer, strict=True)),
            tuple(median("head", tokens) for tokens in counts),
            tuple(median("head reads", tokens) for tokens in counts),
            step,
            max(0.0, median("one steps", counts[0]) - step),
            self._kept(),
            took,
            write / _WRITTEN,
            (max(0.0, median("one writes", counts[0]) - write) + median("head writes", counts[0])) / _WRITTEN,
            torch.cuda.get_device_properties(self.one.device).total_memory / 2**30 if on_card else None,
        )

    def _layer(self, name: str, tokens: int) -> float:
        """Seconds by which a layer more takes longer; of a base with one layer all there is."""
        between = self.more.layers - self.one.layers
        if not between:
            return self.clock.median(f"one{name}", tokens)
        return max(0.0, self.clock.median(f"more{name}", tokens, less=f"one{name}") / between)

    def _kept(self) -> float:
        """Bytes a token and layer that a forward keeps on a card; what does not grow with the text falls out."""
        few, many = _TRACED
        if self.one.device.type == "cpu":
            peaks.as_on_cuda(self.one.net)
            peaks.as_on_cuda(self.more.net)
        else:  # an allocator's smallest block would blur so few
            few, many = 64 * few, 64 * many
        if self.more.layers == self.one.layers:
            return 0.0
        rise = [piece.kept(many) - piece.kept(few) for piece in (self.one, self.more)]
        return max(0.0, (rise[1] - rise[0]) / (many - few) / (self.more.layers - self.one.layers))


def rig(asked: Mapping[str, Any], now: Callable[[], float] = time.monotonic) -> Rig:
    """Make the pieces; the clock starts when they are there. Errors: UserError, OSError, whatever a device raises."""
    device = model.pick_device()
    model.spare_a_core()
    with tempfile.TemporaryDirectory(prefix="sft-calibration-") as name:
        layers = _layers(asked["config"])
        folder = random_base(asked["config"], layers, Path(name))
        one = _piece(folder, Slice(0, 1), asked, device)
        more = _piece(folder, Slice(0, layers, outside=False), asked, device)
    clock, twice = Clock(device, asked["budget"], now), asked["twice"] or device.type != "cpu"
    return Rig(one, more, Head(model.bare(one.net), device), clock, twice)


def _layers(config: Mapping[str, Any]) -> int:
    """How many the larger model has: two, or more where they are small."""
    shape = bases.shape_of(config)
    if shape is None:
        return 2
    return min(shape.layers, max(2, min(_LAYERS, int(_WEIGHTS * shape.layers / shape.in_layers))))


def measure(asked: Mapping[str, Any]) -> Calibration:
    """Time everything at the wanted token counts, or at as many tokens as the budget allows, until it is spent."""
    began, made = time.monotonic(), rig(asked)
    counts = _rounds(made, sorted(asked["tokens"]))
    return made.found(counts, time.monotonic() - began)


def _rounds(made: Rig, wanted: Sequence[int]) -> list[int]:
    """Again and again until the time is up; which token counts that were."""
    probe, budget = min(_PROBE, wanted[0]), made.clock.left
    if made.once(probe) > _ONE_COUNT * budget:  # too slow for more than a line through two points
        made.once(4 * probe)
        return [probe, 4 * probe]
    last, cost = 0, 0.0
    slope = made.once(probe) / probe  # seconds a token: rather too many, until two counts tell
    counts: list[int] = []
    for tokens in wanted:
        most = int(last + (_ONE_COUNT * made.clock.left - cost) / max(slope, _SPECK))
        if min(tokens, most) < last * 3 // 2 and counts:
            break
        took = made.once(now := max(probe, min(tokens, most)))
        slope, last, cost = (took - cost) / (now - last), now, took
        counts.append(now)
    while made.clock.left > sum(made.clock.last(tokens) for tokens in counts):
        for tokens in counts:
            made.once(tokens)
    return counts


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
