"""Several texts in one forward without padding, each attending only to itself.

They lie one behind another in one row. Attention is asked for each apart, by transformers' own sdpa, so there is no
mask and nothing of one text reaches another. A base whose attention does not hear of it reads its texts one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_varlen"  # what a base is loaded with: `attn_implementation`
_PROBE = 7  # tokens of each of the two texts of the proof
_ISOLATES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@runtime_checkable
class Several(Protocol):
    """What stands in an embedding table's place and does several texts at once better than one by one.

    No forward hook of the table sees them: nothing below needs a gradient, nor does non-reentrant checkpointing.
    """

    def several(self, texts: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]: ...


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **named: Any
) -> tuple[Tensor, None]:
    """Heads (1, heads, T, width) to (1, T, heads, width). `pieces`: lengths of the texts that lie in T, if several."""
    sizes: Sequence[int] | None = named.pop("pieces", None)
    if sizes is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **named)
        return whole
    parts = zip(*(torch.split(states, list(sizes), dim=2) for states in (query, key, value)), strict=True)
    window = named.get("sliding_window")
    each = [sdpa_attention_forward(module, *part, _band(part[0], window), **named)[0] for part in parts]
    return torch.cat(each, dim=1), None


def _band(query: Tensor, window: int | None) -> Tensor | None:
    """A mask (1, 1, T, T) for a text longer than the window it may look back; None leaves causality to the kernel."""
    size = query.shape[2]
    if window is None or size <= window:
        return None
    at = torch.arange(size, device=query.device)
    back = at[:, None] - at[None, :]
    return ((back >= 0) & (back < window))[None, None]


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


def hidden(plain: Any, texts: Sequence[Sequence[int]]) -> Tensor:
    """Last hidden states of a bare model, (sum of lengths, hidden), text after text. Gradients flow as ever."""
    embedded = _embedded(plain, texts)
    if len(texts) > 1 and not _isolates(plain, embedded[0]):
        return torch.cat([_read(plain, one, [one.shape[1]]) for one in embedded])
    return _read(plain, torch.cat(embedded, dim=1), [one.shape[1] for one in embedded])


def _embedded(plain: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """(1, T, hidden) each."""
    table, device = plain.get_input_embeddings(), next(plain.parameters()).device
    if isinstance(table, Several):
        return table.several([tuple(ids) for ids in texts], device)
    return [table(torch.tensor([list(ids)], device=device)) for ids in texts]


def _read(plain: Any, embedded: Tensor, sizes: list[int]) -> Tensor:
    """(1, T, hidden) to (T, hidden)."""
    named: dict[str, Any] = {}
    if len(sizes) > 1:
        device = embedded.device
        positions = torch.cat([torch.arange(size, device=device) for size in sizes])
        unused = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)  # of four dimensions: no mask is made
        named = {"position_ids": positions[None], "attention_mask": unused, "pieces": sizes}
    read: Tensor = plain.get_decoder()(inputs_embeds=embedded, use_cache=False, **named).last_hidden_state[0]
    return read


def _isolates(plain: Any, like: Tensor) -> bool:
    """Whether a text's states are the same to the bit whatever lies before it; found out once for each model."""
    if plain not in _ISOLATES:
        _ISOLATES[plain] = _prove(plain, like)
    return _ISOLATES[plain]


def _prove(plain: Any, like: Tensor) -> bool:
    draw = torch.Generator().manual_seed(0)
    one, two, same = torch.randn((3, _PROBE, like.shape[-1]), generator=draw).to(like.device, like.dtype) * like.std()
    training = plain.training
    plain.eval()
    try:
        with torch.no_grad():
            told = [_read(plain, torch.cat([first, same])[None], [_PROBE, _PROBE])[_PROBE:] for first in (one, two)]
            alone = _read(plain, same[None], [_PROBE])
    except (RuntimeError, TypeError, ValueError):  # an attention of its own, which stumbles over what it is not told
        return False
    finally:
        plain.train(training)
    near = torch.allclose(told[0].float(), alone.float(), rtol=0.05, atol=0.05 * float(alone.float().std()))
    return torch.equal(*told) and near
