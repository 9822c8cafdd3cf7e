"""Files that were written, read again: how far their logits are from the model that was trained, and what they recite.

One layer of the files is on the device at a time, so that 16-bit files of a model that was trained in 4 bits can be
read where it was. It writes nothing and gives no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from finetune import asking, echo, heard, model, prefix, slices
from finetune.ear import Ear
from finetune.echo import Echo
from finetune.model import bare, logits_of, working_precision
from finetune.opened import Worn
from finetune.passage import Key, Passage
from finetune.prefix import Ids, Source
from finetune.slices import Slice
from finetune.speak import Speaker

_AT_ONCE = 128  # positions whose logits are held at a time, of up to four models
_MOST = 4096  # tokens whose logits are compared; beyond that the figures stand still


@dataclass
class Files:
    """A model in files, as `Speaker` asks one: each text is passed through the layers one by one, and kept.

    `outside`: the embedding, the last norm and the head alone.
    """

    folder: Path
    device: torch.device
    outside: Any = None
    kept: dict[Ids, Tensor] = field(default_factory=dict)  # (T, hidden) after the last norm, fp32, cpu
    training: bool = False

    def learn(self, texts: Sequence[Ids]) -> None:
        """Pass texts through all layers, each layer loaded once."""
        new = [ids for ids in dict.fromkeys(texts) if ids not in self.kept]
        if not new:
            return
        if self.outside is None:
            self.outside = model.load_base(self.folder, "none", self.device, Slice(0, 0))
        source = Source(self.folder, "none", self.device, slices.layer_count(self.folder))
        norm = self.outside.get_decoder().norm
        for ids, stream in zip(new, prefix.streamed(source, new), strict=True):
            with torch.no_grad(), working_precision(self.device):
                self.kept[ids] = norm(stream.to(self.device)).float().cpu()

    @property
    def config(self) -> Any:
        return self.outside.config

    def get_output_embeddings(self) -> Any:
        return self.outside.get_output_embeddings()

    def hidden(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """What was kept of texts, one after another, (sum of lengths, hidden)."""
        rows = [tuple(ids) for ids in texts]
        self.learn(rows)
        return torch.cat([self.kept[row] for row in rows]).to(self.device)

    def parameters(self) -> Any:
        yield torch.empty(0, device=self.device)

    def eval(self) -> Files:
        return self

    def train(self, _mode: bool = True) -> Files:
        return self


def speaker(files: Files, tokenizer: Tokenizer, texts: Sequence[Ids]) -> Speaker:
    """A speaker for files that scores these texts, and others at the cost of loading every layer again."""
    files.learn(texts)
    made = Speaker(files, tokenizer, None)
    made.hidden = lambda _files, rows: files.hidden(rows)
    return made


# --- logits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gap:
    """Over `tokens` positions of answers: root mean squares of centred logits, the largest difference, nats per token.

    `gap`: files against the adapter on the base as trained; `effect`: adapter on against off. `lost`: share of that
    effect the files lack, differences between the two bases left out.
    """

    tokens: int
    gap: float
    largest: float
    effect: float
    lost: float | None
    kl: float
    kl_effect: float
    same_top: float


@dataclass
class _Sums:
    tokens: int = 0
    entries: int = 0
    gap: float = 0.0
    largest: float = 0.0
    effect: float = 0.0
    lacking: float = 0.0
    kl: float = 0.0
    kl_effect: float = 0.0
    same: int = 0


def gap(worn: Worn, files: Files, passages: Sequence[Passage], plain: Files | None = None) -> Gap | None:
    """None where no token was read. `plain`: the base in files, where it is not the one that was trained on."""
    chosen: list[Passage] = []
    for one in passages:
        if sum(sum(p.read) for p in chosen) < _MOST:
            chosen.append(one)
    texts = [one.ids for one in chosen]
    files.learn(texts)
    if plain is not None:
        plain.learn(texts)
    sums = _Sums()
    for one in chosen:
        at = torch.tensor([t for t in range(1, len(one.ids)) if one.read[t]], dtype=torch.long)
        if len(at):
            _compare(sums, worn, files, plain, one.ids, at - 1)
    if not sums.tokens:
        return None
    rms = {name: math.sqrt(getattr(sums, name) / sums.entries) for name in ("gap", "effect", "lacking")}
    lost = rms["lacking"] / rms["effect"] if rms["effect"] else None
    kl, kl_effect, same = (value / sums.tokens for value in (sums.kl, sums.kl_effect, sums.same))
    return Gap(sums.tokens, rms["gap"], sums.largest, rms["effect"], lost, kl, kl_effect, same)


def _compare(sums: _Sums, worn: Worn, files: Files, plain: Files | None, ids: Ids, at: Tensor) -> None:
    """Adapter on, adapter off, files, and the plain base, at some positions of a text."""
    on, off = (_hidden(worn, ids, base)[at] for base in (False, True))
    there = [one.kept[ids][at] for one in (files, plain) if one is not None]
    for start in range(0, len(at), _AT_ONCE):
        place = slice(start, start + _AT_ONCE)
        tuned, base = (_logits(bare(worn.model), rows[place], files.device) for rows in (on, off))
        written = _logits(files, there[0][place], files.device)
        ground = _logits(plain, there[1][place], files.device) if plain is not None else base
        effect, difference = tuned - base, written - tuned
        sums.tokens += len(tuned)
        sums.entries += tuned.numel()
        sums.gap += float(difference.double().square().sum())
        sums.largest = max(sums.largest, float(difference.abs().max()))
        sums.effect += float(effect.double().square().sum())
        sums.lacking += float((written - ground - effect).double().square().sum())
        sums.kl += _kl(tuned, written)
        sums.kl_effect += _kl(tuned, base)
        sums.same += int((tuned.argmax(-1) == written.argmax(-1)).sum())


def _hidden(worn: Worn, ids: Ids, base: bool) -> Tensor:
    """(T, hidden) after the last norm, cpu."""
    net = worn.model
    device = next(net.parameters()).device
    given = torch.tensor([ids], device=device)
    with torch.no_grad(), working_precision(device):
        if base:
            with net.disable_adapter():
                found = bare(net).get_decoder()(input_ids=given, use_cache=False).last_hidden_state[0]
        else:
            found = bare(net).get_decoder()(input_ids=given, use_cache=False).last_hidden_state[0]
    rows: Tensor = found.float().cpu()
    return rows


def _logits(net: Any, hidden: Tensor, device: torch.device) -> Tensor:
    """(n, vocabulary), each row with a mean of 0: what is added to all tokens alike says nothing."""
    with torch.no_grad(), working_precision(device):
        found = logits_of(net, hidden.to(device))
    return found - found.mean(-1, keepdim=True)


def _kl(true: Tensor, other: Tensor) -> float:
    log_p, log_q = torch.log_softmax(true, -1), torch.log_softmax(other, -1)
    return float((log_p.exp() * (log_p - log_q)).sum().double())


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Held-out loss in nats per token, None without held-out examples; what is recited, split by split."""

    nll: float | None
    echoes: tuple[Echo, ...]

    def of(self, split: str) -> Echo | None:
        """A split's, None where it was not read."""
        return next((one for one in self.echoes if one.split == split), None)


def base_readings(worn: Worn, passages: Sequence[Passage]) -> Mapping[Key, heard.Reading]:
    """What the base alone says: reciting is what goes beyond it."""
    return heard.read(worn.speaker, passages, base=True)


def scores(ear: Ear, reader: asking.Scores, passages: Sequence[Passage], base: Mapping[Key, heard.Reading]) -> Scores:
    """Of any model, by the same judge as at looks."""
    found = echo.measure(reader, passages, base, ear.limits).found
    held = [one for one in found if one.key[0] == "held_out" and one.nll is not None]
    tokens = sum(one.tokens for one in held)
    nll = sum(one.nll * one.tokens for one in held if one.nll is not None) / tokens if tokens else None
    return Scores(nll, tuple(echo.summary(found)))
