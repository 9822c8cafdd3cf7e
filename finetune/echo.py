"""Which example is known by heart: what greedy decoding and sampling would repeat, read off one teacher-forced pass.

Greedy decoding from an example's first tokens repeats the next k of them if and only if the argmax hits all k. Nothing
is generated here, nothing written, and no verdict given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean, median
from typing import Any, Literal

import numpy as np

from finetune import regroup
from finetune.asking import Scores
from finetune.byheart import Found, Kind, Limits, Share, judge, last_in_excess
from finetune.byheart import limits as limits  # what a caller passes in
from finetune.heard import Reading, read
from finetune.looks import Place
from finetune.odds import Sampler
from finetune.passage import Key, Passage, edits
from finetune.regroup import Above
from finetune.runlength import Ints

Map = Literal["free", "light", "full"]


@dataclass(frozen=True)
class Measured:
    """One look: what was found, in the order asked, and the readings it was found in."""

    found: tuple[Found, ...]
    readings: Mapping[Key, Reading]


def measure(
    speaker: Scores,
    passages: Sequence[Passage],
    base: Mapping[Key, Reading],
    limits: Limits,
    noise: float | None = None,
    sampler: Sampler | None = None,
    temperatures: Sequence[float] = (),
) -> Measured:
    """Read with the adapter on and judge. `base`: rows read once with it off; without them nothing is in excess."""
    readings = read(speaker, passages, sampler=sampler, temperatures=temperatures)
    found = tuple(judge(one, readings[one.key], base.get(one.key), limits, noise) for one in passages)
    return Measured(found, readings)


def nearly(
    measured: Measured,
    passages: Sequence[Passage],
    base: Mapping[Key, Reading],
    greedy: Mapping[Key, str],
    limits: Limits,
) -> Measured:
    """The same look once alarmed examples were asked their bare prompt: almost verbatim counts as whole."""
    told = [
        replace(found, whole=True, nearly=True)
        if found.whole is False
        and one.key in greedy
        and edits(one.answer.strip(), greedy[one.key].strip()) <= limits.near
        and last_in_excess(one, measured.readings[one.key], base[one.key], limits)
        else found
        for found, one in zip(measured.found, passages, strict=True)
    ]
    return Measured(tuple(told), measured.readings)


def rows(found: Iterable[Found], place: Place, of: Map) -> Iterator[dict[str, Any]]:
    """Rows for examples.jsonl."""
    for one in found:
        split, example, format_ = one.key
        yield {
            "epoch": place.epoch,
            "step": place.step,
            "travel": place.travel,
            "id": example,
            "split": split,
            "format": format_,
            "nll": one.nll,
            "tokens": one.tokens,
            "bytes": one.bytes,
            "hits": one.hits,
            "run_max": one.run_max,
            "run_start": one.run_start,
            "echo_whole": one.whole,
            "long": one.long,
            "windows": None if one.words is None else list(one.words),
            "excess_bits": one.excess_bits,
            "log10_pz50": one.log10_pz,
            "fragile": one.fragile,
            "masked_share": one.template_share,
            "map": of,
            "end_nll": one.end_nll,
        }


def alarms(found: Iterable[Found]) -> set[tuple[str, Kind]]:
    """Trained examples that echo at all, and how; new ones call for a full look."""
    trained = [one for one in found if one.key[0] == "train"]
    reached: Mapping[Kind, list[Found]] = {
        "words": [one for one in trained if one.words and one.words.yes],
        "long": [one for one in trained if one.long],
        "whole": [one for one in trained if one.whole],
    }
    return {(one.key[1], kind) for kind, some in reached.items() for one in some}


@dataclass(frozen=True)
class Echo:
    """A split in one format. `r8x`: word windows; `l50`, `whole`: eligible examples. Nothing measured: a share of 0.

    `log10_pz50`: median and largest over the `pz50_of` examples that are long enough. `fragile`: how many, of those
    judged. `template_share`: mean over examples.
    """

    split: str
    format: str
    examples: int
    r8x: Share
    l50: Share
    whole: Share
    fragile: Share
    log10_pz50: tuple[float, float] | None
    pz50_of: int
    template_share: float | None


def summary(found: Iterable[Found]) -> list[Echo]:
    """One for each split and format, sorted."""
    ordered = sorted(found, key=_group)
    return [_echo(group, list(some)) for group, some in groupby(ordered, key=_group)]


def _group(one: Found) -> tuple[str, str]:
    return one.key[0], one.key[2]


def _echo(group: tuple[str, str], some: list[Found]) -> Echo:
    likely = [one.log10_pz for one in some if one.log10_pz is not None]
    shares = [one.template_share for one in some if one.template_share is not None]
    windows = [one.words for one in some if one.words]
    return Echo(
        split=group[0],
        format=group[1],
        examples=len(some),
        r8x=Share(sum(one.yes for one in windows), sum(one.of for one in windows)),
        l50=_yes([one.long for one in some]),
        whole=_yes([one.whole for one in some]),
        fragile=_yes([one.fragile for one in some]),
        log10_pz50=(median(likely), max(likely)) if likely else None,
        pz50_of=len(likely),
        template_share=fmean(shares) if shares else None,
    )


def _yes(answers: list[bool | None]) -> Share:
    return Share(answers.count(True), len(answers) - answers.count(None))


@dataclass(frozen=True)
class Against:
    """Train above held-out by permutation; None where one side has nothing to count."""

    r8x: Above | None
    l50: Above | None
    whole: Above | None


def against(train: Sequence[Found], held_out: Sequence[Found], seed: int = 0) -> Against:
    """Both sides in the same format, of the same look."""

    def test(pick: Callable[[Found], Share]) -> Above | None:
        ones, others = (_table([pick(one) for one in side]) for side in (train, held_out))
        return regroup.above(ones, others, seed)

    r8x = test(lambda one: one.words or Share(0, 0))
    return Against(r8x, test(lambda one: _yes([one.long])), test(lambda one: _yes([one.whole])))


def _table(shares: list[Share]) -> Ints:
    """(n, 2)."""
    return np.array(shares, dtype=np.int64).reshape(-1, 2)
