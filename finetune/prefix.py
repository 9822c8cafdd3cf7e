"""Activations below the lowest trained layer, computed once: what nobody trains need not be computed every epoch.

The input to the first trained layer never changes while nothing below it is trained or random. It is computed layer by
layer, one layer on the device at a time, kept on the disk, and handed to the upper layers in the embedding's place. A
text nobody kept is computed when it is asked for. It decides nothing about training and knows no recipe.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor, nn

from finetune import lots, model, slices
from finetune.depot import Depot, name_of
from finetune.disk import home
from finetune.errors import refuse
from finetune.slices import Slice

Ids = tuple[int, ...]
PROOF: Ids = (0,)  # the text `model.assert_fp32_residual` reads
_PROBE = (1, 2, 3, 4, 5, 6, 7, 0)  # a text for the start-up checks; its tokens mean nothing
_GIB = 2**30


@dataclass(frozen=True)
class Source:
    """Whose lower layers: the `first` ones of the base in `folder`, loaded as the run loads it."""

    folder: Path
    quantization: str
    device: torch.device
    first: int

    def made(self) -> str:
        """All that an activation depends on beside its tokens."""
        versions = torch.__version__, transformers.__version__, bitsandbytes.__version__
        machine = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.processor()
        base = model.fingerprint(self.folder), slices.stamp(self.folder)
        return repr((base, self.quantization, self.first, versions, str(self.device), machine))


class NoRoom(RuntimeError):
    """The lower layers cannot come back, so nothing can be generated here."""


class Below(nn.Module):
    """Stands where a lower layer was; its work was done beforehand."""

    def forward(self, hidden_states: Tensor, *_more: Any, **_named: Any) -> Tensor:
        """As it came."""
        return hidden_states


def _passed_on(source: Source, part: Slice, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each text's stream (T, hidden) after the layers of one slice, alone: no other text changes a bit of it."""
    loaded = model.load_base(source.folder, source.quantization, source.device, part)
    decoder = loaded.get_decoder()
    decoder.norm = nn.Identity()
    for one in hidden:
        with torch.no_grad(), model.working_precision(source.device):
            given = one[None].to(source.device)
            yield decoder(inputs_embeds=given, use_cache=False).last_hidden_state[0].float().cpu()
    model.let_go(loaded)


def _embedded(source: Source, texts: Sequence[Ids]) -> list[Tensor]:
    table = model.load_base(source.folder, source.quantization, source.device, Slice(0, 0)).get_input_embeddings()
    return [table(torch.tensor(ids, device=source.device)).detach().float().cpu() for ids in texts]


def streamed(source: Source, texts: Sequence[Ids]) -> list[Tensor]:
    """Input to the first trained layer, (T, hidden) fp32 each, with one layer on the device at a time."""
    hidden = _embedded(source, texts)
    for number in range(source.first):
        hidden = list(_passed_on(source, Slice(number, number + 1, outside=False), hidden))
    return hidden


def check(source: Source) -> None:
    """Whether two layers in two pieces are two layers in one, to the bit. Errors: UserError where they are not."""
    text = torch.tensor([_PROBE], device=source.device) % _vocabulary(source.folder)
    whole = model.load_base(source.folder, source.quantization, source.device, Slice(0, 2)).get_decoder()
    whole.norm = nn.Identity()
    with torch.no_grad(), model.working_precision(source.device):
        at_once = whole(input_ids=text, use_cache=False).last_hidden_state[0].float().cpu()
    model.let_go(whole)
    apart = streamed(Source(source.folder, source.quantization, source.device, 2), [tuple(text[0].tolist())])[0]
    if not torch.equal(at_once, apart):
        what = f"base: the layers of {type(whole).__name__} cannot be computed one by one."
        raise refuse(what, "Set machine.prefix_gib: 0 to train without stored activations.")


def _vocabulary(folder: Path) -> int:
    return int(slices.config(folder, Slice(0, 0)).get_text_config().vocab_size)


@dataclass(frozen=True)
class Filled:
    """What filling took. `kept`: texts on the disk now; the other ones are computed whenever they are asked for."""

    texts: int
    computed: int
    kept: int
    gib: float
    seconds: float


class Prefix(nn.Module):
    """Takes the embedding's place: token ids of one text (1, T) to its kept stream (1, T, hidden)."""

    def __init__(self, source: Source, depot: Depot, lower: Lower) -> None:
        super().__init__()
        self._source, self._depot, self._lower = source, depot, lower
        self._kept: set[Ids] = set()  # on the disk, as far as `fill` knows
        self._near: dict[Ids, Tensor] = {}  # held in memory, for they will be asked for soon

    def fill(self, texts: Iterable[Ids], gib_at_once: float = 2.0) -> Filled:
        """Compute and keep whatever is not kept yet, as many texts at once as fit into `gib_at_once` of memory."""
        began = time.monotonic()
        wanted = list(dict.fromkeys(texts))
        missing = [ids for ids in wanted if self._depot.get(name_of(ids)) is None]
        kept = {*wanted} - {*missing}
        for some in _portions(missing, self._lower.width, gib_at_once * _GIB):
            made = zip(some, streamed(self._source, some), strict=True)
            kept |= {ids for ids, hidden in made if self._depot.put(name_of(ids), hidden)}
        self._kept |= kept
        gib = sum(len(ids) for ids in wanted) * self._lower.width * 4 / _GIB
        return Filled(len(wanted), len(missing), len(kept), gib, time.monotonic() - began)

    def ahead(self, texts: Iterable[Ids], gib: float = 1.0) -> None:
        """Hold in memory the first of these texts that are not kept, up to `gib`; computed in one go.

        What was held before and is not among them goes.
        """
        wanted: dict[Ids, Tensor | None] = {}
        room = gib * _GIB
        for ids in texts:
            if ids in self._kept or ids in wanted:
                continue
            room -= len(ids) * self._lower.width * 4
            if room < 0:
                break
            wanted[ids] = self._near.get(ids)
        missing = [ids for ids, hidden in wanted.items() if hidden is None]
        made = dict(zip(missing, self._lower.streams(missing), strict=True)) if missing else {}
        self._near = {ids: made[ids] if hidden is None else hidden for ids, hidden in wanted.items()}

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, T) to (1, T, hidden) fp32."""
        return self.several([tuple(input_ids[0].tolist())], input_ids.device)[0]

    def several(self, texts: Sequence[Ids], device: torch.device) -> list[Tensor]:
        """The same of each text, on a device. Those that are not kept pass the lower layers in one go."""
        known = {ids: self._near[ids] if ids in self._near else self._depot.get(name_of(ids)) for ids in texts}
        missing = [ids for ids, hidden in known.items() if hidden is None]
        known |= dict(zip(missing, self._lower.streams(missing), strict=True)) if missing else {}
        return [hidden[None].to(device) for ids in texts if (hidden := known[ids]) is not None]


def _portions(texts: list[Ids], width: int, size: float) -> Iterator[list[Ids]]:
    some: list[Ids] = []
    for ids in texts:
        if some and sum(map(len, some), len(ids)) * width * 4 > size:
            yield some
            some = []
        some.append(ids)
    if some:
        yield some


@dataclass
class Lower:
    """The lower layers themselves, brought to the device when they are needed and sent back to the host after.

    `calls`, `seconds`: how often, and what loading, moving and using them took.
    """

    source: Source
    width: int
    layer_bytes: int
    calls: int = 0
    seconds: float = 0.0
    _loaded: Any = field(default=None, repr=False)

    @contextmanager
    def here(self) -> Iterator[Any]:
        """A model of these layers with its embedding, on the device while inside."""
        began = time.monotonic()
        if self._loaded is None:
            part = Slice(0, self.source.first)
            self._loaded = model.load_base(self.source.folder, self.source.quantization, self.source.device, part)
        try:
            self._loaded.to(self.source.device)
            yield self._loaded
        finally:
            if self.source.device.type != "cpu":
                self._loaded.to("cpu")
            self.calls, self.seconds = self.calls + 1, self.seconds + time.monotonic() - began

    def fits(self) -> bool:
        """Whether the device has room for all of them beside what is there; a tenth is left for their work."""
        if self.source.device.type != "cuda":
            return True
        return lots.free(self.source.device) * 0.9 > self.layer_bytes * self.source.first

    def streams(self, texts: Sequence[Ids]) -> list[Tensor]:
        """Each (T, hidden) fp32 on the host, alone; the same bits whether all layers fit at once or one by one."""
        if not self.fits():
            return streamed(self.source, texts)
        with self.here() as loaded:
            decoder = loaded.get_decoder()
            norm, decoder.norm = decoder.norm, nn.Identity()
            try:
                with torch.no_grad(), model.working_precision(self.source.device):
                    given = [torch.tensor([ids], device=self.source.device) for ids in texts]
                    read = [decoder(input_ids=one, use_cache=False).last_hidden_state[0].float().cpu() for one in given]
            finally:
                decoder.norm = norm
        return read


@dataclass
class Shortened:
    """A base whose lower layers were done beforehand. `whole` brings them back for as long as a text is generated."""

    model: Any
    prefix: Prefix
    lower: Lower

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The full model while inside: generation writes tokens nobody has computed yet. Errors: NoRoom."""
        if not self.lower.fits():
            raise NoRoom(f"the {self.lower.source.first} lower layers do not fit on the device beside the upper ones")
        plain = model.bare(self.model)
        layers = model.decoder_layers(plain)
        with self.lower.here() as loaded:
            below = list(layers)[: self.lower.source.first]
            _put(layers, loaded.get_decoder().layers)
            plain.set_input_embeddings(loaded.get_input_embeddings())
            try:
                yield
            finally:
                _put(layers, below)
                plain.set_input_embeddings(self.prefix)


def _put(layers: nn.ModuleList, lowest: Iterable[nn.Module]) -> None:
    for number, layer in enumerate(lowest):
        layers[number] = layer


def load(source: Source, limit_gib: float, root: Path | None = None) -> Shortened:
    """The upper layers of a base, under the names they have in the whole one. Errors: UserError, see `check`."""
    check(source)
    count = slices.layer_count(source.folder)
    upper = model.load_base(source.folder, source.quantization, source.device, Slice(source.first, count))
    inner, whole = upper.config.get_text_config(), slices.config(source.folder, Slice(0, count)).get_text_config()
    decoder = upper.get_decoder()
    for layer in decoder.layers:
        layer.self_attn.layer_idx += source.first
    decoder.layers = nn.ModuleList([*(Below() for _ in range(source.first)), *decoder.layers])
    inner.num_hidden_layers = count
    if getattr(whole, "layer_types", None):
        inner.layer_types = whole.layer_types
    lower = Lower(source, int(inner.hidden_size), _bytes(decoder.layers[-1]))
    made = Prefix(source, Depot(root or home("prefix"), source.made(), int(limit_gib * _GIB)), lower)
    upper.set_input_embeddings(made)
    return Shortened(upper, made, lower)


def _bytes(layer: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in layer.parameters())
