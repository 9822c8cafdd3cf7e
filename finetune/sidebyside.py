"""Two or more runs on one page: verdicts, what their recipes differ in, and their curves where the comparison is fair.

Fair means at equal train loss or equal travel, not at equal epochs. Runs over other data or another base are
marked as such. It measures nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune import curve, gathered, pages
from finetune.errors import refuse
from finetune.gathered import Run
from finetune.journey import ALONG, Axis
from finetune.plots import NARROW, PAINTS, WIDE, Curve, Panel, Picture, course
from finetune.runs import write_atomic

MOST = len(PAINTS)
About = dict[str, Any]


def write(folders: Sequence[Path], to: Path | None = None) -> Path:
    """Write the page, beside the first run unless told otherwise. Errors: UserError."""
    if not 2 <= len(folders) <= MOST:
        raise refuse(f"{len(folders)} runs cannot be compared on one page.", f"Name 2 to {MOST}.")
    runs = [gathered.read(one) for one in folders]
    path = to or folders[0].resolve().parent / f"{'-vs-'.join(one.name for one in runs)}.html"
    write_atomic(path, html(runs))
    return path


def html(runs: Sequence[Run]) -> str:
    """The page as text."""
    names = _names(runs)
    shown = [one for one in (ALONG[2], ALONG[1], ALONG[0]) if _drawable(runs, one)]
    drawn = [(one, width, _course(runs, names, one, width)) for one in shown for width in (WIDE, NARROW)]
    about = {
        "title": f"{len(runs)} runs: {', '.join(names)}",
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "refresh": None,
        "rows": [_row(run, name) for run, name in zip(runs, names, strict=True)],
        "names": names,
        "axes": shown,
        "drawn": drawn,
        "differences": list(_differences(runs)),
        "strangers": list(_strangers(runs, names)),
        "words": list(_words(runs, names)),
    }
    return pages.render("comparison.html", about, [one for _, _, one in drawn])


def _names(runs: Sequence[Run]) -> list[str]:
    """Folders' names; with their parents' where two are called the same."""
    names = [one.name for one in runs]
    if len(set(names)) < len(names):
        names = [f"{one.folder.resolve().parent.name}/{one.name}" for one in runs]
    return names if len(set(names)) == len(names) else [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def _row(run: Run, name: str) -> About:
    """A run as a line of the table, at its chosen look."""
    look = next((one for one in run.looks if one.step == run.chosen and one.step > 0), None)
    tally = next((one for one in run.tallies if look and one.look.step == look.step), None)
    held = dict(run.series("held_out", "nll_tstar"))
    spent = run.facts.get("spent") or {}
    return {
        "name": name,
        "state": run.facts.get("state", "made elsewhere"),
        "word": (run.verdict or {}).get("verdict"),
        "look": look,
        "base": held.get(0),
        "held": held.get(look.step) if look else None,
        "gain": run.gain(look.step) if look else None,
        "tally": tally,
        "seconds": sum(spent[key] for key in ("training", "looking")) if "training" in spent else None,
    }


# pictures


def _drawable(runs: Sequence[Run], along: Axis) -> bool:
    return any(len(_points(run, along, dict(run.series("held_out", "nll_tstar")))) > 1 for run in runs)


def _course(runs: Sequence[Run], names: Sequence[str], along: Axis, width: int) -> Picture:
    held, gained, echo = [], [], []
    for run, name, paint in zip(runs, names, PAINTS, strict=False):
        series = dict(run.series("held_out", "nll_tstar"))
        held.append(Curve(name, paint, _points(run, along, series)))
        gains = {look.step: run.gain(look.step) for look in run.looks if look.step > 0}
        known = {step: one for step, one in gains.items() if one is not None}
        at = dict(_at(run, along))
        points = _points(run, along, {step: one.value for step, one in known.items()})
        bounds = [(at[step], one.low, one.high) for step, one in known.items() if step in at]
        gained.append(Curve(name, paint, points, bounds))
        shares = {one.look.step: one.windows.yes / one.windows.of for one in run.tallies if one.windows.of}
        echo.append(Curve(name, paint, _points(run, along, shares)))
    panels = [Panel("held-out loss, nats per token", held)]
    if any(one.points for one in gained):
        panels.append(Panel("gain over the base, nats", gained, ("none", 0.0)))
    if any(one.points for one in echo):
        panels.append(Panel("8-word windows echoed", echo, share=True))
    return course(f"vs-{along.name}{width}", panels, along.unit, width, falling=along.name == "train_loss")


def _at(run: Run, along: Axis) -> Iterator[tuple[int, float]]:
    for look in run.looks:
        x = {"epoch": look.epoch, "travel": look.travel, "train_loss": look.train_loss}[along.name]
        if x is not None:
            yield look.step, x


def _points(run: Run, along: Axis, series: Mapping[int, float]) -> list[tuple[float, float]]:
    at = dict(_at(run, along))
    return [(at[step], value) for step, value in sorted(series.items()) if step in at]


# in words


def _words(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """Every pair of neighbours where their train losses are equal, and where their travels are."""
    for (first, second), (one, other) in zip(pairwise(runs), pairwise(names), strict=True):
        said = curve.at_equal_loss(_falling(first), _falling(second)).words
        yield f"{one} and {other}. {said.replace('the first run', one).replace('the second run', other)}"
        yield _at_equal_travel(first, second, one, other)


def _falling(run: Run) -> list[curve.Point]:
    return curve.points(run.metrics, "train_loss", "nll_tstar", ("held_out", run.first_format))


def _at_equal_travel(first: Run, second: Run, one: str, other: str) -> str:
    """Held-out loss of both at the furthest travel that both reached."""
    sides = [_points(run, ALONG[1], dict(run.series("held_out", "nll_tstar"))) for run in (first, second)]
    if any(len(side) < 2 for side in sides):
        return f"{one} and {other}: at equal travel not resolvable, too few looks."
    end = min(side[-1][0] for side in sides)
    found = [_between(side, end) for side in sides]
    gap = found[1] - found[0]
    lower = other if gap < 0 else one
    both = f"{found[0]:.4f} and {found[1]:.4f}"
    return f"At equal travel ({end:.2g}) held-out loss is {both}: {lower} is {abs(gap):.4f} lower."


def _between(points: Sequence[tuple[float, float]], x: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0) if x1 > x0 else y1
    return points[-1][1]


# papers


def _differences(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """Settings that are not the same in all recipes."""
    flat = [dict(_flat(run.settings)) for run in runs]
    for key in dict.fromkeys(key for one in flat for key in one):
        values = [one.get(key, "") for one in flat]
        if len(set(values)) > 1:
            yield key, values


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", "" if value is None else str(value)


def _strangers(runs: Sequence[Run], names: Sequence[str]) -> Iterator[str]:
    """Why some of these runs should not be held against each other."""
    for what, told in (("dataset", "trained on other data"), ("base", "on another base")):
        seen = [(run.facts.get("fingerprints") or {}).get(what) for run in runs]
        if len({one for one in seen if one is not None}) > 1:
            others = [name for name, one in zip(names, seen, strict=True) if one != seen[0]]
            yield f"{', '.join(others)}: {told} than {names[0]}, so their losses cannot be compared."
    splits = [sorted((run.split or {}).get("held_out", ())) for run in runs]
    if any(one != splits[0] for one in splits):
        yield "They hold out different examples, so that held-out losses are of other answers."
