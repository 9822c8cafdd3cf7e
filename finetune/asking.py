"""What may be asked of a model: to score texts, to write answers. Shapes alone; see speak.Speaker for what they mean.

Nothing here loads, renders or measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Scores(Protocol):
    """Reads given texts, each token given all before it."""

    def score(
        self,
        ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
        temperatures: Sequence[float] = (),
        base: bool = False,
        samplers: Sequence[Any] = (),
        margins: bool = False,
    ) -> Sequence[Any]: ...


class Compares(Scores, Protocol):
    """Also tells how far two distributions lie apart, token by token."""

    def kl(self, one: Any, other: Any) -> Any: ...


class Completes(Protocol):
    """Writes answers to prompts, greedy or drawn."""

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[str],
        max_new_tokens: int,
        base: bool = False,
        sampler: Any = None,
        seed: int = 0,
    ) -> Sequence[Any]: ...
