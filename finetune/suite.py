"""The drift suite: what a model is asked that no dataset is about, and how much change is still healthy on which base.

Read from `eval/drift.yaml` and `eval/probes/`; for pocket drawn from its little world, beyond which all English is
noise to it. It asks no model; `fit` turns healthy runs into cuts, which a person then writes into the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import facts, starters, world, yamlfile
from finetune.errors import UserError, refuse
from finetune.facts import Fact

Axis = Literal["general", "kl", "script", "script_neutral", "stock", "facts"]
AXES: tuple[Axis, ...] = ("general", "kl", "script", "script_neutral", "stock", "facts")
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Cut = Annotated[float, Field(gt=0)]
_MARGIN = 1.25  # over the largest change a healthy run showed
_LEAST = 0.02


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class World(_Strict):
    """How much of pocket's world is drawn, from which seed."""

    seed: int
    texts: Count
    dialogues: Count
    facts: Count


class Calibration(_Strict):
    """Cuts for one base, told by name and by the fingerprint of its files, and where they come from."""

    base: str
    fingerprint: str
    origin: str
    cuts: Mapping[Axis, Cut]


class Suite(_Strict):
    """`eval/drift.yaml`; what each number means is said there."""

    version: Literal[1]
    sure: Share
    floor: Share
    held_out: Count
    openings_after: Count
    prompts: Count
    pocket: World
    calibrated: tuple[Calibration, ...] = ()

    def cuts(self, base: str, fingerprint: str) -> Mapping[Axis, float]:
        """For this very base; empty where none were fitted: then drift is told and decides nothing."""
        fits = [one for one in self.calibrated if (one.base, one.fingerprint) == (base, fingerprint)]
        return dict(fits[-1].cuts) if fits else {}


@dataclass(frozen=True)
class Snippet:
    """A neutral text. `kind`: its register. `source`: where it stands or was drawn."""

    id: str
    kind: str
    text: str
    source: str


def read(path: Path | None = None) -> Suite:
    """Of a file, by default the shipped one. UserError naming line and key of every fault."""
    document = yamlfile.read(path or starters.find("drift", "suites"))
    try:
        found = Suite.model_validate(document.data)
    except ValidationError as error:
        for one in error.errors():
            key = tuple(one["loc"])
            document.refuse(key, f"{'.'.join(map(str, key))}: {one['msg'].lower()}.", "See the file that is shipped.")
    if document.problems:
        raise UserError(document.problems)
    return found


def snippets(base: str, suite: Suite) -> list[Snippet]:
    """Neutral texts: the shipped ones, or paragraphs and questions with answers of pocket's world."""
    if base != "pocket":
        return _shipped()
    ours = suite.pocket
    drawn = [("world", text) for text in world.held_out_text(ours.seed, ours.texts)]
    asked = world.questions(ours.seed, ours.dialogues)
    drawn += [("dialogue", f"Question: {one.question}\nAnswer: {one.answer}") for one in asked]
    return [Snippet(f"{kind}-{n}", kind, text, f"world, seed {ours.seed}") for n, (kind, text) in enumerate(drawn, 1)]


def known(base: str, suite: Suite) -> list[Fact]:
    """Facts with choices: the shipped ones, or those of pocket's world."""
    if base != "pocket":
        return facts.read(_probes() / "facts.jsonl")
    return list(_of_pocket(suite.pocket.seed, suite.pocket.facts))


@lru_cache(maxsize=4)  # to draw them takes longer than to read a recipe
def _of_pocket(seed: int, count: int) -> tuple[Fact, ...]:
    drawn, source = world.fact_choices(seed, count), f"world, seed {seed}"
    return tuple(
        Fact(f"{one.kind}-{n}", one.question, one.choices, one.right, source) for n, one in enumerate(drawn, 1)
    )


def openings() -> list[str]:
    """First words that chat models begin with and people seldom do; none begins another."""
    found = yamlfile.read(_probes() / "stock.yaml").data["openings"]
    return [str(one) for one in found]


def everyday(base: str, suite: Suite, count: int, seed: int) -> list[str]:
    """Ordinary questions, in no suite that is measured: for answers of the base's own (self-replay)."""
    if base == "pocket":
        return [one.question for one in world.questions(seed + 1, count, "seen")]
    rows = (_probes() / "everyday.txt").read_text(encoding="utf-8").splitlines()
    return [row for row in rows if row.strip() and not row.startswith("#")][:count]


def _probes() -> Path:
    return starters.shelf("suites") / "probes"


def _shipped() -> list[Snippet]:
    path, found = _probes() / "neutral.jsonl", []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            row = _row(line, path, number)
            found.append(Snippet(row["id"], row["register"], row["text"], f"probes/{path.name}:{number}"))
    return found


def _row(line: str, path: Path, number: int) -> dict[str, str]:
    try:
        row = json.loads(line)
        return {key: str(row[key]) for key in ("id", "register", "text")}
    except (ValueError, TypeError, KeyError):
        remedy = 'Write {"id": "...", "register": "...", "text": "..."}.'
        raise refuse("this is no neutral text.", remedy, path, number) from None


# calibration


def fit(changes: Iterable[Mapping[Axis, float]]) -> dict[Axis, float]:
    """Cuts from looks of healthy runs: for each axis the largest change, as a share of the base's, and a quarter more.

    `changes`: a mapping a look, from axis to mean change / |mean of the base|. An alarm needs the lower bound above the
    cut, so that chance is not counted twice. ValueError of nothing.
    """
    seen: Sequence[Mapping[Axis, float]] = list(changes)
    axes = [axis for axis in AXES if any(axis in one for one in seen)]
    if not axes:
        raise ValueError("nothing was measured")
    largest = {axis: max(one[axis] for one in seen if axis in one) for axis in axes}
    return {axis: _rounded_up(max(_MARGIN * value, _LEAST)) for axis, value in largest.items()}


def _rounded_up(value: float) -> float:
    """To two figures."""
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / step - 1e-9) * step, 10)
