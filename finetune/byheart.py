"""What one reading of one example tells: runs, windows in excess over the base, chances of drawing it. Numbers only.

Definitions are those of echo; what counts as much is in `eval/echo.yaml`. It asks no model and compares no examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from finetune import runlength, starters, yamlfile
from finetune.errors import UserError
from finetune.heard import Reading
from finetune.passage import Key, Passage
from finetune.runlength import Bools, Floats, Windows

VERSION = 1
Kind = Literal["words", "long", "whole"]
KINDS: tuple[Kind, ...] = ("words", "long", "whole")  # by strength


@dataclass(frozen=True)
class Limits:
    """What counts; `eval/echo.yaml` says what each means and where it comes from."""

    version: int
    words: int
    tokens: int
    characters: int
    whole: int
    near: float
    bits: float
    bits_per_token: float
    shortest_formula: int
    longest_formula: int
    noise_factor: float


def limits(path: Path | None = None) -> Limits:
    """Those of a suite file, of the shipped one by default. UserError naming every key that is missing or wrong."""
    document = yamlfile.read(path or starters.find("echo", "suites"))
    known = {one.name: one.type == "int" for one in fields(Limits)}
    for name in dict.fromkeys((*document.data, *known)):
        value = document.data.get(name)
        if name not in known:
            document.refuse((name,), f"{name} is no limit of echo.", "Remove it.")
        elif isinstance(value, bool) or not isinstance(value, int if known[name] else int | float) or value <= 0:
            what = f"{name} must be a {'whole ' if known[name] else ''}number above 0."
            document.refuse((name,), what, "See the suite that is shipped.")
        elif name == "version" and value != VERSION:
            document.refuse((name,), f"version {value} is not known.", f"This program reads version {VERSION}.")
    if document.problems:
        raise UserError(document.problems)
    return Limits(**document.data)


class Share(NamedTuple):
    """So many, of so many; a share of nothing is None."""

    yes: int
    of: int

    @property
    def value(self) -> float | None:
        return self.yes / self.of if self.of else None


@dataclass(frozen=True)
class Found:
    """One example in one format. None: not eligible, or not measured, for want of base rows or margins.

    `nll`: nats per token. `run_max`: counted tokens hit in a row, `run_start`: the first among those read, from 0.
    `words`: windows echoed in excess; `long`, `whole`: whether it has such a run; `nearly`: whole only by a greedy
    answer. `excess_bits`: adapter over base, all counted tokens. `log10_pz`: the likeliest long window. `margin`: the
    logits by which the strongest echo holds; `fragile`: noise would decide otherwise. `end_nll`: nats of end marks.
    """

    key: Key
    nll: float | None
    tokens: int
    bytes: int
    hits: int
    run_max: int
    run_start: int | None
    words: Share | None
    long: bool | None
    whole: bool | None
    excess_bits: float | None
    log10_pz: float | None
    margin: float | None
    fragile: bool | None
    template_share: float | None
    nearly: bool = False
    end_nll: float | None = None


@dataclass(frozen=True, eq=False)
class _Lens:
    """Windows of each kind, in counted tokens, and (W,) which are in excess once they are hit; None without a base."""

    windows: Mapping[Kind, Windows]
    excess: Mapping[Kind, Bools] | None

    def echoed(self, kind: Kind, hits: Bools) -> Bools:
        """(W,) hit throughout and in excess."""
        if self.excess is None:
            raise ValueError("no excess without the base's rows")
        return runlength.all_of(hits, self.windows[kind]) & self.excess[kind]

    def decided(self, kind: Kind, hits: Bools) -> bool | None:
        """Whether any window is echoed; None where there is none, or no base."""
        eligible = self.excess is not None and len(self.windows[kind]) > 0
        return bool(self.echoed(kind, hits).any()) if eligible else None


@lru_cache(maxsize=1024)  # a run asks the same passages every epoch, and a few in formats that come once
def _windows(passage: Passage, limits: Limits) -> Mapping[Kind, Windows]:
    parts, signs = passage.parts[passage.counted], passage.signs[passage.counted]
    by_tokens = runlength.of_tokens(parts, limits.tokens)
    return {
        "words": passage.word_windows(limits.words),
        "long": runlength.joined(by_tokens, runlength.of_weight(parts, signs, limits.characters)),
        "whole": runlength.of_parts(parts, limits.whole),
    }


def _lens(passage: Passage, reading: Reading, base: Reading | None, limits: Limits) -> _Lens:
    windows = _windows(passage, limits)
    if base is None:
        return _Lens(windows, None)
    bits, known = _bits(passage, reading, base), base.hits[passage.counted]
    return _Lens(windows, {kind: _in_excess(some, bits, known, limits) for kind, some in windows.items()})


def _bits(passage: Passage, reading: Reading, base: Reading) -> Floats:
    """(K,) adapter over base, bits for each counted token."""
    return (reading.log_p - base.log_p)[passage.counted] / log(2)


def _in_excess(windows: Windows, bits: Floats, known: Bools, limits: Limits) -> Bools:
    """(W,) whether the base fails somewhere, and the adapter's gain is large enough for the window's length."""
    wanted = np.maximum(limits.bits, limits.bits_per_token * windows.sizes)
    found: Bools = ~runlength.all_of(known, windows) & (runlength.totals(bits, windows) >= wanted)
    return found


def judge(
    passage: Passage, reading: Reading, base: Reading | None, limits: Limits, noise: float | None = None
) -> Found:
    """What a reading tells. `noise`: logits a margin moves by on this machine; without it fragility is unknown."""
    counted, lens = passage.counted, _lens(passage, reading, base, limits)
    hits = reading.hits[counted]
    runs = runlength.lengths(hits, passage.parts[counted])
    longest = int(runs.max(initial=0))
    return Found(
        key=passage.key,
        nll=-float(reading.log_p.mean()) if len(reading.log_p) else None,
        tokens=len(reading.hits),
        bytes=passage.size,
        hits=int(reading.hits.sum()),
        run_max=longest,
        run_start=int(np.flatnonzero(counted)[runs.argmax()]) if longest else None,
        words=Share(int(lens.echoed("words", hits).sum()), len(lens.windows["words"])) if base else None,
        long=lens.decided("long", hits),
        whole=lens.decided("whole", hits),
        excess_bits=float(_bits(passage, reading, base).sum()) if base else None,
        log10_pz=log10_pz(passage, reading, limits.tokens),
        margin=_margin(lens, hits, reading.margins, counted),
        fragile=_fragile(lens, reading.margins, counted, None if noise is None else noise * limits.noise_factor),
        template_share=passage.template_share,
        end_nll=-float(reading.log_p[passage.ends].sum()) if passage.ends.any() else None,
    )


def suspect(passage: Passage, reading: Reading, limits: Limits) -> bool:
    """Whether any window is hit throughout, so that the base must be asked."""
    hits = reading.hits[passage.counted]
    return any(bool(runlength.all_of(hits, some).any()) for some in _windows(passage, limits).values())


def unsuspected(passage: Passage, reading: Reading, limits: Limits) -> Found:
    """What a reading tells where no window is hit throughout: that none is echoed, whatever the base says."""
    windows = _windows(passage, limits)
    long, whole = (False if len(windows[kind]) else None for kind in ("long", "whole"))
    found = judge(passage, reading, None, limits)
    return replace(found, words=Share(0, len(windows["words"])), long=long, whole=whole)


def log10_pz(passage: Passage, reading: Reading, size: int) -> float | None:
    """The likeliest window of `size` counted tokens: log10 of the chance that one draw gives it. None if all are less.

    Drawn by the sampler that was read, else at temperature 1 from the whole vocabulary.
    """
    values = reading.log_p if reading.log_q is None else reading.log_q
    windows = runlength.of_tokens(passage.parts[passage.counted], size)
    found = runlength.totals(values[passage.counted], windows) / log(10)
    return min(float(found.max()), 0.0) if len(found) else None


def _margin(lens: _Lens, hits: Bools, margins: Floats | None, counted: Bools) -> float | None:
    """The smallest margin of the window that decides; of several windows the firmest. None where nothing is echoed."""
    if margins is None or lens.excess is None:
        return None
    for kind in reversed(KINDS):
        if (echoed := lens.echoed(kind, hits)).any():
            return float(runlength.least(margins[counted], lens.windows[kind])[echoed].max())
    return None


def _fragile(lens: _Lens, margins: Floats | None, counted: Bools, band: float | None) -> bool | None:
    """Whether `long` or `whole` comes out otherwise when every token within the band of a tie hits, or misses."""
    if margins is None or band is None or lens.excess is None:
        return None
    most, fewest = margins[counted] >= -band, margins[counted] > band
    return any(lens.decided(kind, most) != lens.decided(kind, fewest) for kind in ("long", "whole"))


def last_in_excess(passage: Passage, reading: Reading, base: Reading, limits: Limits) -> bool:
    """Whether the last answer is eligible, and its gain over the base enough for an echo of the whole."""
    lens, parts = _lens(passage, reading, base, limits), passage.parts[passage.counted]
    windows = lens.windows["whole"]
    if lens.excess is None or not len(windows) or not passage.answer:
        return False
    return bool(parts[windows.starts[-1]] == passage.parts[-1] and lens.excess["whole"][-1])
