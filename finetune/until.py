"""A text that arrives in pieces, given on as far as it is sure that no stop string begins there.

Pure strings: it knows no token, no format, and nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class Until:
    """Holds back the end of a text that may yet become a stop string, or white space that nothing follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._begun = self.stopped = False

    def feed(self, piece: str) -> str:
        """What may be shown now. After a stop string nothing comes any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        cuts = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return self._shown(text[: min(cuts)].rstrip())
        safe = len(text) - max((_begun(text, stop) for stop in self._stops), default=0)
        shown = text[:safe].rstrip()
        self._held = text[len(shown) :]
        return self._shown(shown)

    def rest(self) -> str:
        """What was held back when the text ended without a stop string; white space at the end is dropped."""
        held, self._held = self._held.rstrip(), ""
        return self._shown(held)

    def _shown(self, text: str) -> str:
        """White space before the first word belongs to the format, not to the answer."""
        text = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(text)
        return text


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The same pieces, or parts of them, up to the first stop string; it asks for no piece after that."""
    gate = Until(stops)
    for piece in pieces:
        if shown := gate.feed(piece):
            yield shown
        if gate.stopped:
            return
    if rest := gate.rest():
        yield rest


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text that are the first ones of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
