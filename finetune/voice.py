"""One answer, token by token: from the adapter, a part of it, another epoch's or the base, drawn as told.

What was read in earlier turns is kept and not read again. It renders nothing, cuts at no stop string (see until), and
leaves weights, adapter and random state as it found them, save that the epoch last asked for stays worn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import DynamicCache

from finetune.errors import UserError, refuse
from finetune.model import frozen_random_state, working_precision
from finetune.odds import Sampler, Scored
from finetune.opened import Worn

_KEPT = 2  # memories of texts already read: two voices side by side need one each


@dataclass(frozen=True)
class Who:
    """Whose answer. `step`: of a kept adapter, None for the base alone. `scale`: how much of the adapter is added."""

    step: int | None
    scale: float = 1.0


@dataclass(frozen=True)
class Draw:
    """How an answer is drawn. A temperature of 0 takes the likeliest token. `limit`: tokens at most."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = 0.05
    seed: int = 0
    limit: int = 512

    @property
    def sampler(self) -> Sampler | None:
        """None: greedy."""
        return Sampler(self.temperature, self.top_k, self.top_p, self.min_p) if self.temperature else None


@dataclass
class _Memory:
    """What one voice has read: token ids, and keys and values of each."""

    ids: list[int] = field(default_factory=list)
    # without the configuration every layer keeps all it read, a sliding window's too, so that turns can be taken back
    cache: Any = field(default_factory=DynamicCache)

    def back_to(self, ids: Sequence[int]) -> list[int]:
        """Forget what differs; returns what is still to be read, at least the last token."""
        pairs = zip(self.ids, ids[:-1], strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(self.ids), len(ids) - 1))
        if same < len(self.ids):
            self.cache.crop(same - len(self.ids))
            del self.ids[same:]
        return list(ids[same:])


class Voice:
    """A loaded model that can speak as any adapter its run kept. `folders`: of the adapters, by step."""

    def __init__(self, worn: Worn, tokenizer: Tokenizer, eos_id: int | None, folders: Mapping[int, Path]) -> None:
        self._worn, self._tokenizer, self._eos, self._folders = worn, tokenizer, eos_id, folders
        self._device = next(worn.model.parameters()).device
        self._memories: dict[Who, _Memory] = {}
        self._step: int | None = None
        worn.model.eval()

    @property
    def room(self) -> int | None:
        """Tokens the base was made for, question and answer together; None where it does not say."""
        found = getattr(self._worn.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    def say(self, prompt: Sequence[int], who: Who, draw: Draw) -> Iterator[tuple[int, str]]:
        """Tokens and their text, "" where a character is not whole yet, up to the base's EOS or the limit."""
        decoder = DecodeStream(ids=list(prompt), skip_special_tokens=False)
        for token in self.tokens(prompt, who, draw):
            if token == self._eos:
                return
            yield token, decoder.step(self._tokenizer, token) or ""

    def tokens(self, prompt: Sequence[int], who: Who, draw: Draw) -> Iterator[int]:
        """At most `draw.limit` tokens, EOS among them. Errors: UserError where the memory is too small."""
        dice = torch.Generator().manual_seed(draw.seed)
        ids = list(prompt)
        for _ in range(draw.limit):
            ids.append(_drawn(self._next(ids, who), draw.sampler, dice))
            yield ids[-1]
            if ids[-1] == self._eos:
                return

    def score(self, ids: Sequence[int], mask: Sequence[bool], who: Who) -> Scored:
        """As `Speaker.score`, of one text, as this voice."""
        with self._as(who):
            return self._worn.speaker.score([ids], [mask])[0]

    def _next(self, ids: Sequence[int], who: Who) -> Tensor:
        """(1, vocabulary) fp32 logits of the token after these."""
        memory = self._memories.pop(who, None) or _Memory()
        fresh = memory.back_to(ids)
        given = torch.tensor([fresh], device=self._device)
        try:
            with frozen_random_state(), torch.no_grad(), working_precision(self._device), self._as(who):
                out = self._worn.model(input_ids=given, past_key_values=memory.cache, use_cache=True, logits_to_keep=1)
        except torch.OutOfMemoryError:
            raise _too_much(len(ids)) from None
        memory.ids += fresh
        self._memories[who] = memory  # only now: an interrupted one is half read, and gone
        while len(self._memories) > _KEPT:
            del self._memories[next(iter(self._memories))]
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def _as(self, who: Who) -> AbstractContextManager[Any]:
        if who.step is None:
            off: AbstractContextManager[Any] = self._worn.model.disable_adapter()
            return off
        if who.step != self._step:
            self._step = None  # should reading fail half-way
            self._worn.change(self._folders[who.step])
            self._step = who.step
        scaled: AbstractContextManager[Any] = rescale_adapter_scale(self._worn.model, who.scale)
        return nullcontext() if who.scale == 1 else scaled


def _drawn(logits: Tensor, sampler: Sampler | None, dice: torch.Generator) -> int:
    if sampler is None:
        return int(logits.argmax(-1))
    odds = torch.softmax(sampler.warp(logits), -1)[0].cpu()
    return int(torch.multinomial(odds, 1, generator=dice))


def _too_much(tokens: int) -> UserError:
    return refuse(f"the memory does not hold a talk of {tokens} tokens.", "Take turns back with /undo, or /clear.")
