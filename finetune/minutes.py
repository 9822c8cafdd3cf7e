"""What was found about formats as rows of findings.jsonl, and those rows read again: nothing is lost on the way.

One row a format with every example's figures, one an answer, one of the examples' kinds. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from typing import Any

from finetune.lineup import Suite
from finetune.reach import Apart
from finetune.replies import Reply
from finetune.robustness import Known, Robustness
from finetune.transfer import Cell

Row = Mapping[str, Any]
PROBE = "formats"


def rows(found: Robustness) -> Iterator[dict[str, Any]]:
    """Rows that `read` makes the same again of. `score` of a format: the kept share of the gain; of an answer: 1 if it
    ended rightly, is built like the house and leaks nothing, else 0."""
    head = {"probe": PROBE, "suite": PROBE, "version": found.suite.version, "step": found.step}
    blank = {"prompt": "", "answer": "", "score": None, "source": ""}
    yield {**head, **blank, "of": "examples", "why": "kinds of held-out examples", "kinds": dict(found.kinds)}
    standings = {one.format: one for one in found.transfer.standings}
    apart = {one.format: one.pairs for one in found.apart}
    for one in found.formats:
        own = standings.get(one.name)
        tau = None if own is None or own.tau is None else own.tau.value
        why = "not measured" if own is None else f"{own.tuned:.3f} bits per byte, the base {own.base:.3f}"
        cells = {
            side: _cells(sheet.get(one.name, {})) for side, sheet in (("tuned", found.tuned), ("base", found.base))
        }
        about = {"format": one.name, "group": one.group, "family": one.family, "near": one.of, "side": one.side}
        yield {
            **head,
            **blank,
            "of": "format",
            "score": tau,
            "why": why,
            **about,
            **cells,
            "apart": apart.get(one.name),
        }
    for reply in found.replies:
        yield {**head, **_answer(reply)}


def _cells(cells: Mapping[str, Cell]) -> dict[str, list[float | int | None]]:
    return {name: list(astuple(cell)) for name, cell in cells.items()}


def _answer(one: Reply) -> dict[str, Any]:
    good = one.outcome == "ended" and not one.leaks and one.in_house is not False
    return {
        "prompt": one.question,
        "answer": one.text,
        "score": float(good),
        "why": one.why,
        "source": one.example,
        "of": "answer",
        "format": one.format,
        "group": one.group,
        "kind": one.kind,
        "tokens": one.tokens,
        "outcome": one.outcome,
        "stop": one.stop,
        "leaks": list(one.leaks),
        "in_house": one.in_house,
        "base": one.base,
        "draw": one.draw,
    }


def read(rows: Iterable[Row], wanted: Suite, step: int) -> Robustness | None:
    """What a closing look found of the adapter of a step; None where it did not look at formats."""
    own = [row for row in rows if (row["probe"], row["suite"], row["step"]) == (PROBE, PROBE, step)]
    formats = [row for row in own if row["of"] == "format"]
    if not formats:
        return None
    kinds: dict[str, str] = next((row["kinds"] for row in own if row["of"] == "examples"), {})
    known = (Known(row["format"], row["group"], row["family"], row["near"], row["side"]) for row in formats)
    tuned, base = (
        {row["format"]: {name: Cell(*cell) for name, cell in row[side].items()} for row in formats}
        for side in ("tuned", "base")
    )
    apart = (Apart(row["format"], tuple((a, b) for a, b in row["apart"])) for row in formats if row["apart"])
    answers = (_reply(row) for row in own if row["of"] == "answer")
    return Robustness(wanted, step, tuple(known), tuned, base, tuple(apart), kinds, tuple(answers))


def _reply(row: Row) -> Reply:
    return Reply(
        format=row["format"],
        group=row["group"],
        example=row["source"],
        kind=row["kind"],
        question=row["prompt"],
        text=row["answer"],
        tokens=row["tokens"],
        outcome=row["outcome"],
        stop=row["stop"],
        leaks=tuple(row["leaks"]),
        in_house=row["in_house"],
        base=row["base"],
        draw=row["draw"],
    )
