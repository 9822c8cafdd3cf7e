"""What a run's rows come to: who echoes since when, the verdict so far, the look whose adapter is kept, verdict.json.

Everything is read from the run folder, so that a run that goes on judges as if it had never stopped. No model.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune import rules, runs, verdict, wording
from finetune.byheart import KINDS, Kind
from finetune.evidence import Count, Row, Setting
from finetune.rules import Rules
from finetune.runs import RunFolder
from finetune.verdict import Judgement

Alarms = dict[tuple[str, Kind], Row]  # the first row of an example that shows it
RUNNING = "it is still running"


@dataclass(frozen=True)
class Chosen:
    """The adapter of a run, and why that one."""

    step: int
    epoch: float
    travel: float
    reason: str


def alarms(rows: Iterable[Row], known: Alarms | None = None) -> Alarms:
    """First 8-word, first 50-token and first whole echo of each trained example, added to those that are known."""
    found = {} if known is None else known
    for row in rows:
        if row["split"] == "train" and row["step"] > 0:
            for kind in _shown(row):
                found.setdefault((row["id"], kind), row)
    return found


def loudest(known: Alarms) -> list[str]:
    """Alarmed examples: those that echo whole first, then 50 tokens, then 8 words; the longest known among them."""
    best: dict[str, tuple[int, int]] = {}
    for strength, wanted in enumerate(KINDS):
        best |= {name: (-strength, int(row["step"])) for (name, kind), row in known.items() if kind == wanted}
    return sorted(best, key=lambda name: (*best[name], name))


def _shown(row: Row) -> Iterator[Kind]:
    if (row.get("windows") or [0])[0]:
        yield "words"
    if row.get("long"):
        yield "long"
    if row.get("echo_whole"):
        yield "whole"


@dataclass
class Keeper:
    """Judges the looks of a run, each once. `setting.running`: more looks will come."""

    run: RunFolder
    setting: Setting
    by: Rules = field(default_factory=rules.read)
    _known: dict[int, Judgement] = field(default_factory=dict)

    def judge(self) -> Judgement | None:
        """The last look's verdict; None before there was one."""
        metrics = runs.read_lines(self.run.metrics)
        taken = sorted({row["step"] for row in metrics if row["kind"] == "look" and row["step"] > 0})
        if missing := [step for step in taken if step not in self._known]:
            examples, findings = runs.read_lines(self.run.examples), runs.read_lines(self.run.findings)
            for one in verdict.judgements(metrics, examples, findings, self.setting, self.by, missing):
                self._known[one.facts.step] = one
        return self._known[max(self._known)] if self._known else None

    @property
    def looks(self) -> list[Judgement]:
        """What was judged so far, in order."""
        return [self._known[step] for step in sorted(self._known)]

    def best(self, kept: Collection[int] | None = None) -> Judgement | None:
        """The look whose adapter is the run's. `kept`: steps whose checkpoint is there."""
        return verdict.chosen(self.looks, kept, running=True)

    def chosen(self, kept: Collection[int] | None = None) -> Chosen | None:
        """The same, with the reason in words; None before the first look."""
        best = self.best(kept)
        if best is None:
            return None
        facts = best.facts
        return Chosen(facts.step, facts.epoch, facts.travel, wording.choice(best.verdict, facts, len(self.looks)))

    def document(self, stopped_by: str, kept: Collection[int] | None, quote: Callable[[Row], str]) -> Any:
        """What verdict.json holds; None before the first look. `quote`: the words of a row's longest run.

        Beside the contract's keys: `headline`, `recited` (who echoes how much at that look, and the words), the same
        and the reason of the last look in `run`, and `parent` of a refit.
        """
        if len(self._known) == 1 and stopped_by != RUNNING:  # the only look there will ever be is judged otherwise
            self.setting, self._known = Setting(**{**asdict(self.setting), "running": False}), {}
            self.judge()
        looks, best = self.looks, self.best(kept)
        found = verdict.conclude(looks, self.by, stopped_by, best)
        if found is None or best is None:
            return None
        rows = [row for row in runs.read_lines(self.run.examples) if row["split"] == "train"]
        last = looks[-1]
        more = {"headline": _headline(best), "recited": list(_recited(rows, best.facts.step, quote))}
        end = {
            "headline": _headline(last),
            "reason": wording.reason(last.facts, last.signs, self.by),
            "next": wording.following(last.verdict, last.facts, last.signs, self.by),
            "recited": list(_recited(rows, last.facts.step, quote)),
        }
        document = found.to_json()
        return {**document, **more, "run": {**document["run"], "step": last.facts.step, **end}, **self._parent()}

    def _parent(self) -> dict[str, Any]:
        """What was said of the run whose refit this is."""
        parent = runs.read_json(self.run.run_json).get("refit_of")
        said = read(RunFolder(parent)) if parent else None
        return (
            {} if said is None else {"parent": {key: said[key] for key in ("verdict", "headline", "reason", "epoch")}}
        )


def read(run: RunFolder) -> dict[str, Any] | None:
    """A run's verdict.json; None before its first look."""
    found: dict[str, Any] | None = runs.read_json(run.verdict) if run.verdict.is_file() else None
    return found


def _headline(one: Judgement) -> str:
    return wording.headline(one.verdict, one.facts, one.signs)


def _recited(rows: Iterable[Row], step: int, quote: Callable[[Row], str]) -> Iterator[dict[str, Any]]:
    """Examples that echo in their newest measurement up to a step, the strongest first, with the words they recite.

    Of one look's formats the one in which an example echoes most stands for it.
    """
    heard = (row for row in rows if row["step"] <= step and row.get("windows") is not None)
    past = sorted(heard, key=lambda row: (row["step"], row["map"] != "free", *_strength(row)))
    since = alarms(past)
    loud = [row for row in {row["id"]: row for row in past}.values() if any(_shown(row))]
    for row in sorted(loud, key=_strength, reverse=True):
        first = {kind: known["epoch"] for (name, kind), known in since.items() if name == row["id"]}
        told = {key: row[key] for key in ("id", "format", "epoch", "run_max", "excess_bits", "echo_whole", "long")}
        yield {**told, "since": first, "words": quote(row)}


def _strength(row: Row) -> tuple[bool, bool, int]:
    return bool(row["echo_whole"]), bool(row["long"]), int(row["run_max"] or 0)


def measured(one: Judgement) -> dict[str, Any]:
    """A look in three figures, for a screen: its word, who recites, and the change of held-out loss (nats a token)."""
    echo, gain = one.facts.echo, one.signs.axes["learned"].value
    long = echo.long if echo else Count(0, 0)
    return {
        "verdict": one.verdict,
        "recited": None if not long.of else (long.yes, long.of),
        "whole": None if echo is None or not echo.whole.of else (echo.whole.yes, echo.whole.of),
        "change": None if gain is None else -gain,
    }


# in words, for the end of a run

_NAMED = 5  # examples that are named on the screen; verdict.json has all


def told(document: Mapping[str, Any], run: RunFolder, places: Mapping[str, str]) -> Iterator[str]:
    """The verdict for a person: the word, why, who recites what, what to do. `places`: file:line of examples."""
    end = document["run"]
    apart = end["step"] != document["step"]
    if apart:
        yield f"At the last look, epoch {end['epoch']:g}: {end['verdict']}: {end['headline']}. {end['reason']}"
        yield from _named(end["recited"], end["epoch"], places)
    kept = f"Kept: the adapter of epoch {document['epoch']:g}" if apart else "Verdict"
    yield f"{kept}: {document['verdict']}: {document['headline']}. {document['reason']}"
    if document.get("parent"):
        parent = document["parent"]
        yield f"The run it was refitted from: {parent['verdict']}: {parent['headline']} (epoch {parent['epoch']:g})."
    yield from _named(document["recited"], document["epoch"], places)
    name = shlex.quote(str(run.path))
    yield f"Next: {document['next']}".replace("RUN", name)
    if apart and end["next"] != document["next"]:
        yield f"For another run: {end['next']}".replace("RUN", name)


def _named(recited: list[Mapping[str, Any]], epoch: float, places: Mapping[str, str]) -> Iterator[str]:
    loud = [one for one in recited if one["echo_whole"] or one["long"]] or recited
    if loud:
        counts = loud[0]["echo_whole"] or loud[0]["long"]
        yield f"Recited at epoch {epoch:g}:" if counts else f"Echoed in part at epoch {epoch:g}, under 50 tokens:"
    for one in loud[:_NAMED]:
        how = "whole" if one["echo_whole"] else f"{one['run_max']} tokens"
        since = math.ceil(min(one["since"].values(), default=one["epoch"]))
        words = _opened(" ".join(one["words"].split()).lstrip(" #:.,"))
        words = words if len(words) <= 160 else words[:157] + "..."
        yield f"  {_near(places.get(one['id'], ''))}  {one['id']}, {how}, since epoch {since:g}: «{words}»"
    if len(loud) > _NAMED:
        yield f"  and {len(loud) - _NAMED} more, all in verdict.json."


def _opened(words: str) -> str:
    """Without the mark of a heading that began before them."""
    return words[2:].lstrip() if words.startswith("** ") else words


def _near(place: str) -> str:
    """A file below the working folder is named from there."""
    file = Path(place)
    return str(file.relative_to(Path.cwd())) if file.is_relative_to(Path.cwd()) else place
