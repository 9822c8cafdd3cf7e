"""What each section of a run's page says: figures, sentences and pictures, from the rows of the run.

Every section is a mapping for its template, or None where nothing of it was measured. It judges nothing by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from finetune import chance, forgotten, prompts, scaffold, transfer, trend
from finetune.errors import UserError
from finetune.evidence import Row
from finetune.gathered import Run
from finetune.plots import NARROW, Bar, Curve, Panel, course, intervals
from finetune.trend import Trend

About = Mapping[str, Any]
SENTENCES = {
    "ok": "It learned, and knows no answer by heart.",
    "watch": "Look at it before you use it.",
    "overfit": "It memorised: do not publish this adapter.",
    "undertrained": "It has not learned yet.",
    "underpowered": "There is too little to tell.",
}
AXES = {
    "learned": ("gain over the base on held-out answers", "nats per token, at the best temperature"),
    "learned_accuracy": ("the same in accuracy", "share of tokens"),
    "recites": ("trained answers echoed whole", "share of those long enough"),
    "recites_50": ("trained answers echoed for 50 tokens or more", "share of those long enough"),
    "recites_8": ("8-word windows echoed, trained above held-out", "share of windows"),
    "recites_held_out": ("held-out answers echoed whole: false alarms", "share of those long enough"),
    "leak": ("unrelated prompts that brought out training text", "share of prompts"),
    "script": ("answers in a script nobody asked for", "share of answers"),
    "harmed": ("held-out loss above its best", "nats per token, at the best temperature"),
    "harmed_accuracy": ("held-out tokens missed, above the fewest", "share of tokens"),
    "harmed_format": ("held-out loss in the worst format never trained, above its best", "nats per token"),
}
DRIFT = forgotten.NAMES
_GROUPS = {
    "trained": "trained",
    "near": "held out, of a trained family",
    "held_out": "held out",
    "slip": "slips of the hand",
    "sampled": "drawn from the grammar",
    "own": "your own",
}
_RECENT = 200  # steps


# verdict


def verdict(run: Run) -> About:
    """The word, why, what to do, and each axis with its bounds."""
    found = run.verdict
    if found is None:
        looked = any(one.step > 0 for one in run.looks)
        why = "Its first look is still to come." if run.running and not looked else "This run was not judged."
        return {"word": None, "sentence": f"No verdict yet. {why}" if run.running else why, "axes": ()}
    axes = [dict(zip(("name", "unit"), _named(name), strict=True)) | axis for name, axis in found["axes"].items()]
    return {**found, "word": found["verdict"], "sentence": SENTENCES.get(found["verdict"], ""), "axes": axes}


def _named(axis: str) -> tuple[str, str]:
    """In words, and what it is measured in."""
    if axis.startswith("drift_"):
        return f"{DRIFT.get(axis[6:], (axis[6:], 0))[0]}, above its best", ""
    return AXES.get(axis, (axis.replace("_", " "), ""))


def chosen(run: Run) -> About | None:
    """Which look's adapter is the run's, and what is known of it."""
    look = next((one for one in run.looks if one.step == run.chosen and one.step > 0), None)
    if look is None:
        return None
    about = run.facts.get("chosen") or {}
    held = dict(run.series("held_out", "nll_tstar")).get(look.step)
    base = dict(run.series("held_out", "nll_tstar")).get(0)
    reason = about.get("reason")
    return {"look": look, "reason": reason, "held": held, "base": base, "gain": run.gain(look.step)}


# formats


@dataclass(frozen=True)
class _Gauge:
    """What a format is to the run: see transfer.Measured."""

    name: str
    group: str
    family: str


def formats(run: Run) -> About | None:
    """Held-out answers in each format at the newest look that read several, not after the chosen one; worst first."""
    rows = [row for row in run.examples if row["split"] == "held_out" and row.get("map") != "free" and row["step"] > 0]
    steps = sorted({int(row["step"]) for row in rows if row["format"] != run.first_format})
    upto = [one for one in steps if run.chosen is None or one <= run.chosen] or steps
    if not upto:
        return _plain_formats(run)
    step = upto[-1]
    tuned, base = transfer.sheet(run.examples, step), transfer.sheet(run.examples, 0)
    found = transfer.transfer(tuned, base, [_gauge(name, run) for name in tuned])
    if not found.standings:
        return None
    epoch = next(row["epoch"] for row in rows if row["step"] == step)
    groups = [
        (title, [_bar(one) for one in found.standings if one.group == name])
        for name, title in _GROUPS.items()
        if any(one.group == name for one in found.standings)
    ]
    unit = "gain over the base, bits per byte"
    drawn = [(width, intervals(f"formats{width}", groups, unit, width)) for width in (600, NARROW)]
    return {"found": found, "epoch": epoch, "drawn": drawn, "titles": _GROUPS, "plain": (), "kept": _kept(run)}


def _plain_formats(run: Run) -> About | None:
    """Sums alone, without intervals: what a look wrote where no example was read for itself."""
    names = {row["format"] for row in run.metrics if row["kind"] == "look" and row["split"] == "held_out"}
    plain = []
    for name in names:
        both = dict(run.series("held_out", "bpb", name))
        later = [step for step in both if step > 0 and (run.chosen is None or step <= run.chosen)]
        if later:
            plain.append({"name": name, "base": both.get(0), "now": both[max(later)], "group": _gauge(name, run).group})
    plain.sort(key=lambda one: (one["base"] or one["now"]) - one["now"])
    return {"found": None, "plain": plain, "titles": _GROUPS, "drawn": (), "epoch": None, "kept": ()} if plain else None


def _kept(run: Run, most: int = 12) -> list[Row]:
    """What full looks said of formats, those where it can be told; the first, the last and others evenly."""
    rows = [row for row in run.findings if row["probe"] == "formats" and row.get("suite") == "look"]
    told = [row for row in rows if row["score"] is not None]
    return [told[round(i * (len(told) - 1) / (most - 1))] for i in range(most)] if len(told) > most else told


def _gauge(name: str, run: Run) -> _Gauge:
    if name in run.trained_formats:
        return _Gauge(name, "trained", name)
    if name.startswith("sampled:") or "~" in name:
        return _Gauge(name, "sampled" if name.startswith("sampled:") else "slip", name)
    try:
        (one,) = prompts.load([name])
        near = scaffold.near(one, prompts.load(run.trained_formats))
        return _Gauge(name, "near" if near else "held_out", one.family)
    except UserError:  # a format of the user's own, moved since
        return _Gauge(name, "held_out", name)


def _bar(one: transfer.Standing) -> Bar:
    gain = one.gain
    low, high = (gain.low, gain.high) if gain is not None else (None, None)
    paint = "train" if one.group == "trained" else "held"
    return Bar(one.format, gain.value if gain is not None else one.base - one.tuned, low, high, paint)


def several(run: Run) -> list[tuple[str, list[Row]]]:
    """Questions that were answered in several formats, with each answer."""
    asked: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in (*run.samples, *run.findings):
        if row.get("answer") is not None and row.get("prompt") and row.get("format"):
            asked[row["prompt"], int(row["step"])][row["format"]] = row
    newest = {
        prompt: (step, rows)
        for (prompt, step), rows in sorted(asked.items(), key=lambda one: one[0][1])
        if len(rows) > 1
    }
    return [(prompt, list(rows.values())) for prompt, (_, rows) in newest.items()]


# leaks, drift


def leaks(run: Run) -> About | None:
    """Of the chosen adapter, or of the newest one that was tested."""
    rows = [row for row in run.findings if row["probe"] == "leak" and row.get("leak")]
    steps = {int(row["step"]) for row in rows}
    if not steps:
        return None
    step = run.chosen if run.chosen in steps else max(steps)
    order = ("confirmed", "single", "none")
    own = sorted((row for row in rows if row["step"] == step), key=lambda row: order.index(row["leak"]))
    return {"rows": own, "found": [row for row in own if row["leak"] != "none"], "step": step}


def drift(run: Run) -> About | None:
    """Each axis beside its base, over the looks; facts and manner of answers; answers in a foreign script."""
    summary = forgotten.summary(run.findings, run.chosen) or forgotten.summary(run.findings)
    if summary is None:
        return None
    own = forgotten.once(row for row in run.findings if row["probe"] == "drift" and row["step"] == summary.step)
    strange = [row for row in own if row.get("wrong_script")]
    epoch = next((row["epoch"] for row in own if row.get("epoch") is not None), None)
    panels = [_drifting(run, one.axis) for one in summary.moved]
    drawn = [
        (one.axis, course(f"drift-{one.axis}", [panel], "epoch", NARROW))
        for one, panel in zip(summary.moved, panels, strict=True)
        if panel
    ]
    return {"found": summary, "names": DRIFT, "epoch": epoch, "strange": strange, "drawn": drawn}


def _drifting(run: Run, axis: str) -> Panel | None:
    """Change since the base over looks, with its bounds; None with a single look."""
    rows: dict[float, list[float]] = defaultdict(list)
    for row in forgotten.once(row for row in run.findings if row["probe"] == "drift" and row.get("axis") == axis):
        if row.get("epoch") is not None:
            rows[float(row["epoch"])].append(float(row["score"]) - float(row["base"]))
    found = [(epoch, chance.mean(values)) for epoch, values in sorted(rows.items())]
    known = [(epoch, one) for epoch, one in found if one is not None]
    if len(known) < 2:
        return None
    name, _ = DRIFT[axis]
    curve = Curve(
        "change since the base",
        "held",
        [(x, one.value) for x, one in known],
        [(x, one.low, one.high) for x, one in known],
    )
    return Panel(name, [curve], ("none", 0.0))


# words


def words(run: Run) -> list[Trend]:
    """The curve in sentences, those that say something first."""
    if run.per_epoch is None:
        return []
    told = trend.told(trend.Course(run.metrics, run.examples, run.per_epoch, run.first_format, lambda _: None))
    return sorted(told, key=lambda one: not one.resolved)


def answers(run: Run, most: int = 8) -> list[About]:
    """Answers to one's own questions and held-out ones, look by look; where one did not change it is told once."""
    asked: dict[tuple[str, str], dict[int, Row]] = defaultdict(dict)
    for row in run.samples:
        asked[row["id"], row["prompt"]][int(row["step"])] = row
    found: list[About] = []
    for (example, prompt), rows in asked.items():
        told = _changes([rows[step] for step in sorted(rows)])
        kept = _few(told, most, run.chosen)
        found.append(
            {"own": not example, "example": example, "prompt": prompt, "rows": kept, "left_out": len(told) - len(kept)}
        )
    return found


def _changes(rows: Sequence[Row]) -> list[About]:
    told: list[dict[str, Any]] = []
    for row in rows:
        if told and told[-1]["answer"] == row["answer"]:
            told[-1]["until"], told[-1]["until_step"] = row["epoch"], row["step"]
        else:
            told.append({**row, "until": row["epoch"], "until_step": row["step"]})
    return list(told)


def _few(rows: Sequence[About], most: int, chosen: int | None) -> list[About]:
    """The first, the last, the chosen one, the others evenly."""
    wanted = {0, len(rows) - 1}
    wanted |= {i for i, row in enumerate(rows) if chosen is not None and row["step"] <= chosen <= row["until_step"]}
    left = [i for i in range(len(rows)) if i not in wanted]
    room = max(0, most - len(wanted))
    wanted |= set(left if len(left) <= room else (left[i * len(left) // room] for i in range(room)))
    return [row for i, row in enumerate(rows) if i in wanted]


# the machine


def moved(run: Run) -> About | None:
    """Whether the adapter moved and is felt, at the chosen look or the last one."""
    rows = [row for row in run.metrics if row["kind"] == "look" and row["step"] > 0 and row.get("moved") is not None]
    at = run.chosen if any(row["step"] == run.chosen for row in rows) else max((row["step"] for row in rows), default=0)
    own = [row for row in rows if row["step"] == at]
    if not own:
        return None
    keys = ("moved", "distance", "per_travel", "gradient_over_eps", "change", "change_fp32")
    return {key: next((row[key] for row in own if row.get(key) is not None), None) for key in keys} | {
        "epoch": own[0]["epoch"]
    }


def cost(run: Run) -> About | None:
    """Speed, memory, time and energy; None of what nobody measured."""
    if not run.steps:
        return None
    rates = [row["tokens"] / row["seconds"] for row in run.steps[-_RECENT:] if row.get("seconds")]
    spent = dict(run.facts.get("spent") or {})
    training = sum(row["seconds"] for row in run.steps)
    looking = sum(row["seconds"] for row in run.metrics if row["kind"] == "look")
    looking += sum(row.get("seconds") or 0.0 for row in run.samples)
    gib = [row["gib"] for row in run.steps if row.get("gib") is not None]
    hours = [row["wh"] for row in run.metrics if row.get("wh") is not None]
    return {
        "rate": median(rates) if rates else None,
        "step": fmean(row["seconds"] for row in run.steps[-_RECENT:]),
        "gib": max(gib, default=None),
        "training": spent.get("training", training),
        "looking": spent.get("looking", looking),
        "share": spent.get("share_looking", looking / max(training + looking, 1e-9)),
        "closing": (run.facts.get("closing") or {}).get("seconds"),
        "wh": spent.get("wh", sum(hours) if hours else None),
        "tokens": sum(row["tokens"] for row in run.steps),
    }
