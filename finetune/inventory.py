"""What there is: starter recipes, formats, datasets, runs. One row each; a damaged one is a row that says so.

Reads and lists only: judges nothing, opens no weights, asks no network.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import corpus, prompts, runs, starters
from finetune.errors import UserError
from finetune.runs import RunFolder

Row = dict[str, Any]


def recipes() -> list[Row]:
    """Starters, each with the first line of its comment."""
    return [{"name": one.stem, "about": starters.describe(one)} for one in starters.starters("recipes")]


def formats() -> list[Row]:
    """Every shipped format, and the base's own."""
    found = [prompts.NATIVE, *prompts.load(prompts.shipped())]
    return [
        {"name": one.name, "family": one.family, "aliases": list(one.aliases), "source": list(one.source)}
        for one in found
    ]


def datasets() -> list[Row]:
    """Shipped ones, with the number of their examples; None where they cannot be read."""
    return [
        {"name": one.name, "examples": _examples(one), "about": starters.describe(one)}
        for one in starters.starters("datasets")
    ]


def _examples(folder: Path) -> int | None:
    try:
        return len(corpus.read(folder))
    except UserError:
        return None


def every_run(shelf: Path = Path("runs")) -> list[Row]:
    """Run folders below `shelf`, the newest last. `state` is None, and `about` says why, where one cannot be read."""
    folders = [one.parent for one in shelf.glob("*/run.json")]
    return [_run(RunFolder(one)) for one in sorted(folders, key=lambda one: (one.stat().st_mtime, one.name))]


def _run(run: RunFolder) -> Row:
    row: Row = {"folder": str(run.path), "state": None, "epoch": None, "epochs": None, "chosen": None, "about": ""}
    try:
        facts = runs.read_json(run.run_json)
        chosen = facts.get("chosen")
        row |= {"state": str(facts["state"]), "epochs": facts.get("epochs"), "epoch": _last_epoch(run)}
        row["chosen"] = chosen["epoch"] if chosen else None
    except (UserError, OSError, KeyError, TypeError, AttributeError) as error:
        row["about"] = f"cannot be read ({type(error).__name__ if not isinstance(error, UserError) else 'damaged'})"
    return row


def _last_epoch(run: RunFolder) -> float | None:
    """Of the newest complete row of metrics.jsonl."""
    if not run.metrics.is_file():
        return None
    with run.metrics.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - 2**14))
        lines = file.read().splitlines()
    for line in reversed(lines):
        try:
            return float(json.loads(line)["epoch"])
        except (ValueError, KeyError, TypeError):  # a torn line
            continue
    return None


KINDS: dict[str, Callable[[], list[Row]]] = {
    "recipes": recipes,
    "formats": formats,
    "datasets": datasets,
    "runs": every_run,
}
NONE = dict.fromkeys(KINDS, "none installed") | {"runs": "none in ./runs: `sft train` writes them there"}


def cells(kind: str, row: Row) -> tuple[str, ...]:
    """One row in words."""
    if kind == "formats":
        also = f"also {', '.join(row['aliases'])}" if row["aliases"] else ""
        return row["name"], row["family"], also, row["source"][0] if row["source"] else ""
    if kind == "datasets":
        count = "cannot be read" if row["examples"] is None else f"{row['examples']} examples"
        return row["name"], count, row["about"]
    if kind == "runs":
        at = "" if row["epoch"] is None else f"epoch {row['epoch']:g} of {row['epochs']}"
        chosen = "no adapter yet" if row["chosen"] is None else f"adapter of epoch {row['chosen']:g}"
        return row["folder"], row["state"] or row["about"], at, chosen if row["state"] else ""
    return row["name"], row["about"]
