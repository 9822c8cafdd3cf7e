"""How answers are drawn, where they end, how many are written at once: by lots, at stop strings, as memory allows.

A draw depends on its prompt, its seed and how often that prompt was asked before in the same call; not on what is
answered beside it, and not on any global random state, which stays as it is. No answer is read here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

_SHARE = 0.5  # of the free memory that keys and values may take: the rest is for what is computed with them
_HOST = 2**30  # bytes, where no card says what is free


class Lots(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Leaves one token of each row possible: the one its lot falls on, by the odds that `warp` makes of the logits."""

    def __init__(self, warp: Callable[[Tensor], Tensor], lots: np.ndarray[Any, Any], start: int) -> None:
        self._warp, self._lots, self._start = warp, torch.from_numpy(lots), start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (n, vocabulary), 0 at the drawn token and -inf elsewhere."""
        reached = torch.softmax(self._warp(scores.float()), -1).double().cumsum(-1)
        step = input_ids.shape[1] - self._start
        lots = self._lots[:, step : step + 1].to(scores.device) * reached[:, -1:]
        drawn = torch.searchsorted(reached, lots, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


class Stops(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped
    """Ends a row when its new text holds a stop string; looks at a tail only, long enough for the longest stop."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._start = tokenizer, start
        self._stops = [stop for stop in stops if stop]
        self._tail = 2 + max((len(stop.encode()) for stop in self._stops), default=0)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_unused: Any) -> Tensor:
        tails = [row[self._start :][-self._tail :].tolist() for row in input_ids]
        texts = [self._tokenizer.decode(tail, skip_special_tokens=False) for tail in tails]
        return torch.tensor([any(stop in text for stop in self._stops) for text in texts], device=input_ids.device)


def lots(prompts: Sequence[Sequence[int]], seed: int, steps: int) -> np.ndarray[Any, Any]:
    """(prompts, steps) numbers in [0, 1). The same prompt again in this call has others. `seed` from 0."""
    asked: Counter[tuple[int, ...]] = Counter()
    rows = []
    for prompt in map(tuple, prompts):
        rows.append(np.random.default_rng([seed, asked[prompt], *prompt]).random(steps))
        asked[prompt] += 1
    return np.stack(rows)


def room(config: Any, device: torch.device) -> int:
    """Tokens whose keys and values fit, at four bytes a number: half of a card's free memory, or 1 GiB."""
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    each = 2 * config.num_hidden_layers * kept * width * 4
    return max(1, int((_SHARE * free(device) if device.type == "cuda" else _HOST) // each))


def free(device: torch.device) -> int:
    """Bytes of a card that nothing uses: what the driver has left, and what torch holds back for later."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + held)
