"""How many layers give up their activations, and compute them twice, so that a micro-batch fits the memory.

Arithmetic only; how much a layer keeps is memory's to say, how much is free the model's.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Headroom:
    """Of `layers` trained layers, lowest first. `kept`: bytes a token that one keeps, `stream`: those of its input.

    `room`: bytes for all of them; None where nothing need be given up, 0 where everything shall.
    """

    layers: int
    kept: float = 0.0
    stream: float = 0.0
    room: float | None = None

    def recomputed(self, tokens: int) -> int:
        """Layers to compute twice for a micro-batch of `tokens`: as few as fit, all of them where nothing does."""
        room = self.room
        if room is None:
            return 0
        fits = (count for count in range(self.layers + 1) if self.bytes(tokens, count) < room)
        return next(fits, self.layers)

    def bytes(self, tokens: int, recomputed: int) -> float:
        """Held at once: at first what the upper layers keep, then one lower layer after another in full."""
        first = (self.layers - recomputed) * self.kept + recomputed * self.stream
        later = recomputed * self.stream + self.kept if recomputed else 0.0
        return tokens * max(first, later)
