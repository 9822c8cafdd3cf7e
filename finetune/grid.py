"""What was found about formats, as lines of text: a table worst first, answers side by side, and sentences.

Made of `robustness.Robustness`; every number is told with what it was made of, and what was not measured is not shown
as nothing. It prints nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from finetune import tables
from finetune.chance import Interval
from finetune.lineup import GROUPS
from finetune.replies import Reply, Tally
from finetune.robustness import Robustness
from finetune.transfer import Headline, Standing, Transfer

_TITLES: Mapping[str, str] = {
    "trained": "Trained formats",
    "held_out": "Never trained, of no trained family",
    "near": "Never trained, of a trained family",
    "own": "Your own formats",
    "sampled": "Drawn from the grammar, never trained",
    "slip": "Slips of trained formats (white space, letter case, a missing system text)",
}
_HEAD = ("format", "family", "bits/byte", "base", "kept", "p(end)", "base", "ended", "base", "turn", "leaks", "style")
_UNITS: Mapping[str, str] = {"held_out": "families", "near": "families"}
_NONE = "·"  # not measured


def table(found: Robustness, width: int | None = None) -> list[str]:
    """Every format, group by group, worst first; the base beside the adapter. A legend closes it."""
    lines: list[str] = []
    for group in GROUPS:
        rows = [one for one in found.transfer.standings if one.group == group]
        if rows:
            cells = [_HEAD, *(_cells(one, found) for one in rows)]
            title = f"{_TITLES[group]} ({len(rows)})"
            lines += ["", *tables.wrapped(title, width or 100), *tables.columns(cells, width)]
    return [*lines, "", *_legend(found, width or 100)] if lines else ["No held-out example: formats were not measured."]


def _cells(one: Standing, found: Robustness) -> tuple[str, ...]:
    tuned, base = (found.tallies.get((one.format, side)) for side in (False, True))
    below = " !" if one.below else ""
    return (
        one.format,
        one.family,
        f"{one.tuned:.3f}{below}",
        f"{one.base:.3f}",
        _NONE if one.tau is None else f"{one.tau.value:.2f}",
        *((_NONE, _NONE) if one.end is None else (f"{one.end[0]:.0%}", f"{one.end[1]:.0%}")),
        _of(tuned, "ended"),
        _of(base, "ended"),
        _of(tuned, "turn"),
        _of(tuned, "leaks"),
        _NONE if tuned is None or not tuned.shaped else f"{tuned.in_house}/{tuned.shaped}",
    )


def _of(tally: Tally | None, what: str) -> str:
    if tally is None:
        return _NONE
    return f"{ {'ended': tally.ended, 'turn': tally.turn, 'leaks': tally.leaks}[what] }/{tally.n}"


def _legend(found: Robustness, width: int) -> Iterator[str]:
    n = max((one.n for one in found.transfer.standings), default=0)
    told = (
        f"bits/byte: of the words of {n} held-out answers, lower is better; ! is surely worse than the base, all "
        f"{len(found.transfer.standings)} formats considered (Holm). kept: gain over the base as a share of the mean "
        "gain in trained formats. p(end): chance of ending where the answer ends. ended, turn, leaks, style: of "
        "greedy answers, how many ended rightly, went on to the user's turn, held another format's marks, are built "
        f"like the taught ones. {_NONE}: not measured."
    )
    yield from tables.wrapped(told, width)


# --- in words


def words(found: Robustness) -> list[str]:
    """One sentence a finding, goals beside what was measured; the first says whether transfer can be told at all."""
    lines = [reference(found.transfer, found.suite.standard_errors)]
    for group in GROUPS:
        if (headline := found.transfer.headlines.get(group)) is not None:
            lines.append(_headline(headline, found))
    lines += [*worst(found.transfer), *_spreads(found), *_apart(found), *_kinds(found)]
    return [*lines, *_stops(found), *_consistency(found)]


def reference(found: Transfer, errors: float) -> str:
    """Whether anything was gained in trained formats that others could keep. `errors`: standard ones it must exceed."""
    if found.reference is None:
        return "Transfer: not measured, it takes two held-out examples in a trained format."
    gain = f"{_bounds(found.reference)} bits per byte in trained formats, {found.reference.n} held-out examples"
    if not found.resolvable:
        return f"Transfer: not resolvable, the gain is {gain}: less than {errors:g} standard errors."
    return f"Gain over the base: {gain}."


def _headline(one: Headline, found: Robustness) -> str:
    units = _UNITS.get(one.group, "formats")
    goals, told = found.suite.goals, ""
    if one.group == "held_out":
        sides = found.sides
        told = f", {sum(sides.values())} different prompts"
    tau = one.least.tau
    least = f"least {tau.value:.2f} ({one.least.name}, between {tau.low:.2f} and {tau.high:.2f})"
    wanted = f" Goal: {goals.median:g} and {goals.least:g}." if one.group == "held_out" else ""
    title = _TITLES[one.group][0].lower() + _TITLES[one.group][1:]
    return (
        f"Kept of that gain, {title}: median {one.median:.2f}, {least}, over {len(one.reaches)} {units}{told}.{wanted}"
    )


def worst(found: Transfer) -> Iterator[str]:
    """The format that gained least, and those that surely lost."""
    least = found.worst
    if least is None or least.surest is None or least.p_worse is None:
        return
    told = f"Least gained: {least.format}, {least.base - least.tuned:+.3f} bits per byte over the base (at least "
    told += f"{least.surest.low:+.3f}, at most {least.surest.high:+.3f} with all formats in mind"
    p = f"; by luck so far below once in {1 / least.p_worse:.0f}" if 0 < least.p_worse < 0.5 else ""
    yield f"{told}{p})."
    if below := found.below:
        yield f"Surely worse than the base in {', '.join(one.format for one in below)}."


def _spreads(found: Robustness) -> Iterator[str]:
    for name, one in found.transfer.spreads.items():
        inner = "" if one.excess_80 is None else f"; from the 10th to the 90th percentile {one.excess_80:+.3f}"
        goal = f" Goal: at most {found.suite.goals.spread:g}." if name == "named" else ""
        told = f"Spread over {one.formats} {name} formats: {one.tuned:.3f} bits per byte, the base's {one.base:.3f}"
        yield f"{told}, so {one.excess:+.3f}{inner}.{goal}"


def _apart(found: Robustness) -> Iterator[str]:
    known = [one for one in found.apart if one.lost]
    if known:
        far = max(known, key=lambda one: one.tuned)
        told = f"Furthest from the first trained format along the same answer: {far.format}, KL {far.tuned:.3f} nats"
        yield f"{told} per token, the base's {far.base:.3f}."


def _kinds(found: Robustness) -> Iterator[str]:
    kinds = found.by_kind if len(found.by_kind) > 1 else ()
    for one in kinds:
        trained, held_out = (_bounds(gain) if gain else "not resolvable" for gain in (one.trained, one.held_out))
        yield f"Gain on {one.n} {one.name} examples: {trained} in trained formats, {held_out} in untouched ones."


def _stops(found: Robustness) -> Iterator[str]:
    if not found.replies:
        yield "No answers were asked for: stops, leaks and style are not measured."
        return
    all_, goals = found.written, found.suite.goals
    rate = all_.stop
    if rate is not None:
        parts = f"{all_.early} too early, {all_.turn} into the next turn, {all_.ran_on} not at all"
        yield f"Of {all_.n} answers {rate.value:.1%} ended rightly ({parts}). Goal: {goals.stop:.0%}."
        yield f"Marks of another format in {all_.leaks} of {all_.n} answers. Goal: {goals.leaks}."
    if all_.kept is not None:
        yield f"Built like the taught answers: {all_.kept.value:.1%} of {all_.shaped}."


def _consistency(found: Robustness) -> Iterator[str]:
    one = found.consistency
    if one.across is None or one.within is None or one.lost is None:
        return
    floor = "" if one.unrelated is None else f", answers to different questions {one.unrelated:.2f}"
    told = (
        f"Words shared by answers to one question: {one.across.value:.2f} across formats, {one.within.value:.2f} in one"
    )
    yield f"{told}{floor}. Another format costs {_bounds(one.lost)} beyond another draw."


def _bounds(one: Interval) -> str:
    return f"{one.value:+.3f} (between {one.low:+.3f} and {one.high:+.3f})"


# --- side by side


def side_by_side(found: Robustness, width: int = 100, example: str | None = None) -> list[str]:
    """One question's greedy answers in three formats: the first trained one, the worst untouched one, a sampled one."""
    greedy = found.greedy()
    names = _three(found, greedy)
    asked = example or next((one.example for one in greedy), None)
    shown = [one for name in names for one in greedy if (one.format, one.example) == (name, asked)]
    if not shown:
        return []
    size = max(24, (width - 2 * (len(shown) - 1)) // len(shown))
    blocks = [_block(one, size) for one in shown]
    height = max(map(len, blocks))
    rows = [[*block, *[""] * (height - len(block))] for block in blocks]
    return [*tables.wrapped(f"> {shown[0].question}", width), "", *tables.columns([*zip(*rows, strict=True)])]


def _three(found: Robustness, greedy: Sequence[Reply]) -> list[str]:
    """Worst by what was kept; formats that were asked for answers alone."""
    asked = {one.format for one in greedy}
    ranked = [one for one in found.transfer.standings if one.format in asked]
    first = next((one.name for one in found.formats if one.name in asked), None)
    worst = {group: next((one.format for one in ranked if one.group == group), None) for group in GROUPS}
    chosen = [first, worst["own"], worst["held_out"], worst["near"], worst["sampled"], worst["trained"]]
    return [*dict.fromkeys(name for name in chosen if name)][:3]


def _block(one: Reply, size: int) -> list[str]:
    lines = [one.format, "-" * min(size, len(one.format))]
    for paragraph in tables.harmless(one.text).split("\n"):
        lines += textwrap.wrap(paragraph, size) or [""]
    return [*lines, *(f"({line}" if not at else line for at, line in enumerate(textwrap.wrap(one.why + ")", size - 1)))]


# --- as data


def document(found: Robustness) -> dict[str, Any]:
    """What `--json` prints: the same, unrounded, answers included."""
    whole = found.transfer
    tallies = {f"{name}{' (base)' if base else ''}": vars(one) for (name, base), one in found.tallies.items()}
    return {
        "suite": found.suite.model_dump(),
        "step": found.step,
        "resolvable": whole.resolvable,
        "reference": whole.reference,
        "formats": whole.standings,
        "headlines": whole.headlines,
        "spreads": whole.spreads,
        "sides": found.sides,
        "apart": [
            {"format": one.format, "tuned": one.tuned, "base": one.base, "lost": one.lost} for one in found.apart
        ],
        "kinds": found.by_kind,
        "answers": tallies,
        "consistency": found.consistency,
        "words": words(found),
    }
