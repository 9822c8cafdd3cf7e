"""Which example is recited, since when and how far, with the very words: one row each, and as lines of text.

Made of rows that were measured and of the base's readings; it asks no model and gives no verdict.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune import tables
from finetune.byheart import judge
from finetune.ear import Ear
from finetune.heard import Reading
from finetune.passage import Key

Row = Mapping[str, Any]
_HEAD = ("example", "8 words", "50 tokens", "whole", "run", "base", "bits", "formats", "where")  # a path may be cut
_PLACE = 32  # columns
_QUOTED = 3  # lines that a quotation may take


@dataclass(frozen=True)
class Line:
    """One trained example. `words`, `long`: epoch of the first alarm, None without one; `run`, `base_run`: tokens.

    `quote`: the words of the longest run, formulas inside it included. `whole` is None where it is too short to be
    asked. `formats`: in which trained formats it echoes 8 words or more, of those read.
    """

    example: str
    place: str
    words: float | None
    long: float | None
    whole: bool | None
    run: int
    tokens: int
    base_run: int | None
    bits: float | None
    fragile: bool | None
    quote: str
    formats: tuple[int, int]

    @property
    def loud(self) -> bool:
        """Whether it echoes at all."""
        return self.words is not None or bool(self.whole) or self.formats[0] > 0

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def lines(examples: Sequence[Row], step: int, ear: Ear, base: Mapping[Key, Reading]) -> list[Line]:
    """Trained examples as the closing look at a step found them, the strongest first."""
    first, now = ear.plan.first_format, [row for row in examples if _is_now(row, step)]
    since = _since(examples, step)
    echoed: dict[str, list[bool]] = defaultdict(list)
    for row in now:
        echoed[row["id"]].append(_echoes(row))
    made = [_line(row, ear, base, since, echoed[row["id"]]) for row in now if row["format"] == first]
    return sorted(made, key=lambda one: (not one.whole, one.long is None, not one.loud, -one.run, one.example))


def _is_now(row: Row, step: int) -> bool:
    return row["step"] == step and row["split"] == "train" and row.get("look") == "closing"


def _echoes(row: Row) -> bool:
    return bool((row.get("windows") or [0])[0]) or bool(row.get("echo_whole"))


def _since(examples: Sequence[Row], step: int) -> Mapping[tuple[str, str], float]:
    """(example, kind) to the epoch of its first alarm, of all looks and of the free map."""
    found: dict[tuple[str, str], float] = {}
    for row in examples:
        if row["split"] == "train" and 0 < row["step"] <= step:
            shown = {"words": (row.get("windows") or [0])[0], "long": row.get("long")}
            for kind in (kind for kind, yes in shown.items() if yes):
                key = row["id"], kind
                found[key] = min(float(row["epoch"]), found.get(key, float("inf")))
    return found


def _line(
    row: Row, ear: Ear, base: Mapping[Key, Reading], since: Mapping[tuple[str, str], float], echoed: Sequence[bool]
) -> Line:
    name, key = row["id"], ("train", row["id"], row["format"])
    own = base.get(key)
    return Line(
        example=name,
        place=near(str(ear.plan.conversations[name].origin)),
        words=since.get((name, "words")),
        long=since.get((name, "long")),
        whole=row["echo_whole"],
        run=row["run_max"],
        tokens=row["tokens"],
        base_run=None if own is None else judge(ear.passage(*key), own, None, ear.limits).run_max,  # type: ignore[arg-type]
        bits=row["excess_bits"],
        fragile=row["fragile"],
        quote=ear.quote(row),
        formats=(sum(echoed), len(echoed)),
    )


def near(place: str) -> str:
    """file:line, from the working folder where it lies below it."""
    file, colon, line = place.rpartition(":")
    return f"{os.path.relpath(file)}{colon}{line}" if Path(file).is_relative_to(Path.cwd()) else place


# in words


def table(found: Sequence[Line], width: int | None, elsewhere: bool = False, most: int | None = None) -> list[str]:
    """A line for each, and the words below those that echo. `elsewhere`: no epoch is known; `most`: at most so many."""
    shown = list(found)[:most]
    cells = [_HEAD, *(_cells(one, elsewhere) for one in shown)]
    head, *rows = tables.columns(cells, width)
    told = [head]
    for line, one in zip(rows, shown, strict=True):
        told += [line, *(_quotation(one.quote, width) if one.loud and one.quote else ())]
    left = len(found) - len(shown)
    return [*told, *([f"... and {left} more, none of them stronger; --only echo shows all."] if left else [])]


def _cells(one: Line, elsewhere: bool) -> tuple[str, ...]:
    whole = "-" if one.whole is None else "yes" if one.whole else "no"
    return (
        one.example,
        _since_when(one.words, elsewhere),
        _since_when(one.long, elsewhere),
        f"{whole}{' ~' if one.fragile else ''}",
        f"{one.run}/{one.tokens}",
        "-" if one.base_run is None else str(one.base_run),
        "-" if one.bits is None else f"{one.bits:+.0f}",
        f"{one.formats[0]}/{one.formats[1]}",
        one.place if len(one.place) <= _PLACE else f"…/{Path(one.place).name}",
    )


def _since_when(epoch: float | None, elsewhere: bool) -> str:
    return "never" if epoch is None else "yes" if elsewhere else f"epoch {round(epoch, 1):g}"


def _quotation(text: str, width: int | None) -> Iterator[str]:
    found = tables.wrapped(f"«{' '.join(text.split())}»", width or 100, "    ")
    yield from found[:_QUOTED]
    if len(found) > _QUOTED:
        yield f"    … {len(found) - _QUOTED} more lines"


LEGEND = (
    "8 words, 50 tokens: when it was first heard to echo so much in excess of the base. whole: the answer from the "
    "bare question, - where it is too short to count, ~ where noise of this machine could decide otherwise. run: "
    "tokens hit in a row, of all; base: the same without the adapter. bits: adapter over base, all tokens. formats: "
    "trained ones in which it echoes."
)


def summary(found: Sequence[Line], held_out: Sequence[Row]) -> str:
    """How many echo, and the false positives beside them: the same on held-out answers."""
    heard = [one for one in found if one.whole is not None]
    whole, loud = sum(bool(one.whole) for one in heard), sum(one.loud for one in found)
    long = sum(one.long is not None for one in found)
    asked = [row for row in held_out if row.get("echo_whole") is not None]
    words = [row for row in held_out if row.get("windows")]
    told = f"{loud} of {len(found)} trained examples echo 8 words or more, {long} have echoed 50 tokens, "
    told += f"{whole} of the {len(heard)} that are long enough echo whole"
    if not words:
        return f"{told}."
    false = sum(_echoes(row) for row in words)
    whole = sum(bool(row["echo_whole"]) for row in asked)
    return f"{told}. Of held-out ones, never trained: {false} of {len(words)}, {whole} of {len(asked)} whole."
