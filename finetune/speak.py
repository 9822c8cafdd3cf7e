"""complete(prompts) and score(tokens): all that a probe may ask of a model, base or adapter.

Teacher-forced passes in eval mode, dropout off, no cache; answers with a KV cache. What it will not: judge, render, or
change any training state (weights, random state, train mode are left as found).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft.helpers import rescale_adapter_scale
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from finetune import lots, odds, varlen
from finetune.model import bare, frozen_random_state, logits_of, working_precision
from finetune.odds import Asked, Sampler, Scored, joined, score_row
from finetune.runlength import Bools


@dataclass(frozen=True)
class Contrast:
    """One text's T supervised tokens, adapter beside base; float32, cpu. Nats but for `mass`, a share of probability.

    `kl`: how far the adapter has left the base, KL(base || adapter), whose own uncertainty is `base_entropy`. `mass`:
    of the marked tokens, above their median: what is spread evenly over tokens a base never met means none of them.
    """

    log_p: Tensor
    base_log_p: Tensor
    kl: Tensor
    base_entropy: Tensor
    mass: Tensor
    base_mass: Tensor


@dataclass(frozen=True)
class Answer:
    """One generated answer, stop string cut off. `ended`: by a stop string or EOS, not by the length limit.

    `stop`: the string that ended it, "" for EOS, None at the limit.
    """

    text: str
    ended: bool
    tokens: int
    stop: str | None = None


@dataclass(frozen=True)
class Pass:
    """A text read once. `at`: which of its tokens are asked for, each given all before it; `base`: adapter off."""

    ids: Sequence[int]
    at: Sequence[int]
    base: bool = False


class Speaker:
    """A loaded model with or without an adapter, and the raw tokenizer that belongs to it."""

    def __init__(self, model: Any, tokenizer: Tokenizer, eos_id: int | None, batch_tokens: int = 4096) -> None:
        self._model, self._tokenizer, self._eos = model, tokenizer, eos_id
        self._batch_tokens, self._exact = batch_tokens, False
        self._device = next(model.parameters()).device
        self.whole: Callable[[], AbstractContextManager[None]] = nullcontext  # entered while an answer is written
        self.hidden: Callable[[Any, Sequence[Sequence[int]]], Tensor] = varlen.hidden  # how texts are read

    def score(
        self,
        ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
        temperatures: Sequence[float] = (),
        base: bool = False,
        samplers: Sequence[Sampler] = (),
        margins: bool = False,
    ) -> list[Scored]:
        """Score the tokens where a mask is true, each given all before it. `base`: with the adapter off."""
        asked = Asked(temperatures, samplers, margins)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, Scored] = {}
        with self._quiet(base):
            for batch in _batches(order, [len(row) for row in ids], self._batch_tokens):
                scored = self._score_batch([ids[i] for i in batch], [masks[i] for i in batch], asked)
                found.update(zip(batch, scored, strict=True))
        return [found[i] for i in range(len(ids))]

    def _score_batch(
        self, ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], asked: Asked
    ) -> Iterator[Scored]:
        plain = bare(self._model)
        hidden = torch.split(self.hidden(plain, ids), [len(tokens) for tokens in ids])
        for read, tokens, mask in zip(hidden, ids, masks, strict=True):
            at, wanted = self._asked(tokens, mask)
            yield score_row(plain, read[at - 1], wanted, asked)

    def _asked(self, tokens: Sequence[int], mask: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Where a text's scored tokens stand, the first never among them, and which they are; (T,) each."""
        at = torch.tensor([t for t in range(1, len(tokens)) if mask[t]], dtype=torch.long, device=self._device)
        return at, torch.tensor(list(tokens), device=self._device)[at]

    def contrast(
        self, ids: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], marked: Sequence[Bools]
    ) -> list[Contrast]:
        """Both models' whole distributions where a mask is true; `marked`: for each text (vocabulary,) bool."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found: dict[int, Contrast] = {}
        for batch in _batches(order, [len(row) for row in ids], self._batch_tokens):
            hidden = []
            for base in (False, True):
                with self._quiet(base):
                    read = self.hidden(bare(self._model), [ids[i] for i in batch])
                    hidden.append(torch.split(read, [len(ids[i]) for i in batch]))
            for i, *pair in zip(batch, *hidden, strict=True):
                at, wanted = self._asked(ids[i], masks[i])
                found[i] = self._contrast_row([read[at - 1] for read in pair], wanted, marked[i])
        return [found[i] for i in range(len(ids))]

    def _contrast_row(self, hidden: Sequence[Tensor], targets: Tensor, marked: Bools) -> Contrast:
        """Two of (T, hidden) against (T,); both logits are held for a few positions at a time."""
        parts: list[list[Tensor]] = []
        for start in range(0, len(targets), odds.HEAD_TOKENS // 2):
            place = slice(start, start + odds.HEAD_TOKENS // 2)
            with self._quiet(False):
                own, base = (torch.log_softmax(logits_of(bare(self._model), one[place]), -1) for one in hidden)
            wanted, chance = targets[place][:, None], base.exp()
            kl = (chance * (base - own)).sum(-1).clamp(min=0)  # rounding goes below nothing
            mark = torch.zeros(own.shape[-1], dtype=torch.bool)  # a head may have more rows than there are tokens
            mark[: len(marked)] = torch.from_numpy(marked)
            mark = mark.to(own.device)
            said = [one.gather(-1, wanted)[:, 0] for one in (own, base)]
            masses = [_mass(own[:, mark].exp()), _mass(chance[:, mark])]
            parts.append([*said, kl, -(chance * base).sum(-1), *masses])
        return Contrast(*(joined([part[k] for part in parts], torch.float32) for k in range(6)))

    def change(self, ids: Sequence[int], mask: Sequence[bool], exact: bool = False) -> float | None:
        """NLL with the adapter on minus off, nats per token. `exact`: in fp32, None where the base cannot."""
        if exact and not self._has_fp32():
            return None
        with self._in_fp32() if exact else nullcontext():
            tuned, base = (self.score([ids], [mask], base=off)[0] for off in (False, True))
        return (tuned.nll - base.nll) / max(len(tuned.log_p), 1)

    def kl(self, one: Pass, other: Pass) -> Tensor:
        """KL(one || other), nats, (n,) float32 on the CPU, for pairs of tokens; 256 distributions are held at once."""
        hidden = [self._hidden(asked) for asked in (one, other)]
        parts = []
        for pieces in zip(*(torch.split(rows, odds.HEAD_TOKENS // 2) for rows in hidden), strict=True):
            with self._quiet(one.base):
                p, q = (torch.log_softmax(logits_of(bare(self._model), piece), -1) for piece in pieces)
            parts.append((p.exp() * (p - q)).sum(-1).clamp(min=0))  # rounding goes below nothing
        return joined(parts, torch.float32)

    def _hidden(self, asked: Pass) -> Tensor:
        """(n, hidden) from which the tokens asked for are told."""
        at = torch.tensor(list(asked.at), dtype=torch.long, device=self._device)
        with self._quiet(asked.base):
            read = self.hidden(bare(self._model), [asked.ids])
        return read[at - 1]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        max_new_tokens: int,
        base: bool = False,
        sampler: Sampler | None = None,
        seed: int = 0,
    ) -> list[Answer]:
        """Answers to prompts given as token ids, batched with a KV cache; each stops at a stop string or EOS.

        Greedy without a `sampler`; with one, a draw of each prompt that `seed` (from 0) decides and not its batch; the
        same prompt again in this call is drawn anew. As many at once as the memory takes.
        """
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        room = lots.room(bare(self._model).config, self._device)
        sizes = [max(len(row) / self._batch_tokens, (len(row) + max_new_tokens) / room) for row in prompts]
        drawn = lots.lots(prompts, seed, max_new_tokens) if sampler and prompts else None
        found: dict[int, Answer] = {}
        share = 1.0
        while order:
            batch = next(_batches(order, sizes, share))
            some = [prompts[i] for i in batch]
            warped = (sampler.warp, drawn[batch]) if sampler is not None and drawn is not None else None
            try:
                with self.whole(), self._quiet(base):
                    told = self._complete(some, stops, max_new_tokens, warped)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                half = len(batch) // 2
                share = half * sizes[batch[half - 1]]
                continue
            found.update(zip(batch, told, strict=True))
            order = order[len(batch) :]
        return [found[i] for i in range(len(prompts))]

    def _complete(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[str], most: int, warped: tuple[Any, Any] | None
    ) -> list[Answer]:
        """One batch; `warped`: how logits become odds, and a lot for each answer and token."""
        inputs, attention = _pad(prompts, self._device)
        start = inputs.shape[1]
        config = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,  # a lot leaves one token possible
            eos_token_id=self._eos,
            pad_token_id=self._eos or 0,
            use_cache=True,
            repetition_penalty=1.0,  # what is left out, the base's own generation_config would fill in
            no_repeat_ngram_size=0,
        )
        out = self._model.generate(
            input_ids=inputs,
            attention_mask=attention,
            generation_config=config,
            logits_processor=LogitsProcessorList([lots.Lots(*warped, start)] if warped else []),
            stopping_criteria=StoppingCriteriaList([lots.Stops(self._tokenizer, stops, start)]),
        )
        return [self._answer(row[start:].tolist(), stops) for row in out]

    def _answer(self, ids: list[int], stops: Sequence[str]) -> Answer:
        ended = self._eos in ids
        ids = ids[: ids.index(self._eos)] if ended and self._eos is not None else ids
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        cuts = [(text.index(stop), stop) for stop in stops if stop and stop in text]
        if cuts:
            at, stop = min(cuts, key=lambda cut: cut[0])
            return Answer(text[:at], True, len(ids), stop)
        return Answer(text, ended, len(ids), "" if ended else None)

    def dialled(self, scale: float) -> AbstractContextManager[None]:
        """Inside, the adapter has `scale` times its effect; afterwards exactly its own."""
        inside: AbstractContextManager[None] = rescale_adapter_scale(self._model, scale)
        return inside

    def _has_fp32(self) -> bool:
        """4-bit matrices unpack to any dtype; bf16 and int8 ones do not."""
        layers = [
            m for m in self._model.modules() if isinstance(m, torch.nn.Linear) and not hasattr(m, "compute_dtype")
        ]
        head = bare(self._model).get_output_embeddings()
        return all(layer.weight.dtype == torch.float32 for layer in layers if layer is not head)

    @contextmanager
    def _in_fp32(self) -> Iterator[None]:
        """4-bit layers compute in fp32 and autocast is off; left as found. A base that is itself bf16 keeps its own."""
        layers = [module for module in self._model.modules() if hasattr(module, "compute_dtype")]
        found = [layer.compute_dtype for layer in layers]
        for layer in layers:
            layer.compute_dtype = torch.float32
        self._exact = bool(layers)
        try:
            yield
        finally:
            self._exact = False
            for layer, dtype in zip(layers, found, strict=True):
                layer.compute_dtype = dtype

    @contextmanager
    def _quiet(self, base: bool) -> Iterator[None]:
        training = self._model.training
        self._model.eval()
        try:
            precision = nullcontext() if self._exact else working_precision(self._device)
            with frozen_random_state(), torch.no_grad(), precision:
                if base and hasattr(self._model, "disable_adapter"):
                    with self._model.disable_adapter():
                        yield
                else:
                    yield
        finally:
            self._model.train(training)


def _mass(chances: Tensor) -> Tensor:
    """(n, marked) to (n,)."""
    if chances.shape[-1] == 0:
        return chances.sum(-1)
    return (chances - chances.median(-1, keepdim=True).values).clamp(min=0).sum(-1)


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T), padded with 0 on the left."""
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    seen = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(list(row))
        seen[i, width - len(row) :] = 1
    return ids.to(device), seen.to(device)


def _batches(order: Sequence[int], lengths: Sequence[float], budget: float) -> Iterator[list[int]]:
    """Rows of like length together, within `budget` tokens as if padded; a longer row goes alone."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
