"""What `sft eval` found, as sections of lines for a terminal and as one document. It measures and prints nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from finetune import bench, forgotten, grid, keeping, lineup, minutes, reciters, runs, siblings, tables, trend
from finetune.examine import Exam
from finetune.reciters import Line
from finetune.robustness import Robustness

Row = Mapping[str, Any]
_NAMED = 8  # examples and leaks that a summary shows; --only shows all
_LOOKS = 12  # rows of the table of looks
_HEAD = ("epoch", "travel", "train loss", "held-out", "at best T", "accuracy", "twins", "8 words", "50 tokens", "whole")
_LEAKS = {"confirmed": "confirmed", "single": "once, and not again"}


def sections(exam: Exam, probes: Sequence[str], width: int) -> Iterator[tuple[str, list[str]]]:
    """(title, lines), the verdict last, where the eye is. A single probe is told whole."""
    whole = len(probes) == 1
    if not whole and exam.trends:
        yield "How it learned", [line for one in exam.trends for line in tables.wrapped(one.words, width, "  ")]
        yield "Look by look", ["  " + line for line in looks(exam, width - 2)]
    tellers = {"echo": _echo, "leak": _leaks, "formats": _formats, "drift": _drift}
    for probe in probes:
        yield from tellers[probe](exam, width, whole)
    yield "Verdict", list(_verdict(exam, width))


# by heart


def _echo(exam: Exam, width: int, whole: bool) -> Iterator[tuple[str, list[str]]]:
    found, held_out = by_heart(exam), _held_out(exam)
    most = None if whole else _NAMED
    lines = tables.wrapped(reciters.summary(found, held_out), width, "  ")
    table = reciters.table(found, width - 2, exam.subject.elsewhere, most)
    yield "By heart", [*lines, *(f"  {line}" for line in table), *tables.wrapped(reciters.LEGEND, width, "  ")]


def by_heart(exam: Exam) -> list[Line]:
    """Every trained example, the strongest first."""
    return reciters.lines(exam.rows.examples, exam.verdict.step, exam.bench.ear, exam.bench.base.readings)


def _held_out(exam: Exam) -> list[Row]:
    first = exam.subject.plan.first_format
    return [row for row in _closing(exam, "echo") if (row.get("split"), row.get("format")) == ("held_out", first)]


def _closing(exam: Exam, probe: str) -> list[Row]:
    """Rows of the closing look at the chosen adapter, of examples.jsonl for echo, else of findings.jsonl."""
    rows = exam.rows.examples if probe == "echo" else exam.rows.findings
    return [row for row in rows if bench.is_closing(row, exam.verdict.step, {probe})]


# leaks


def _leaks(exam: Exam, width: int, whole: bool) -> Iterator[tuple[str, list[str]]]:
    rows = _closing(exam, "leak")
    asked = [row for row in rows if row["probe"] == "leak"]
    leaked = [row for row in asked if row["leak"] != "none"]
    answers = sum(row["answers"] for row in asked)
    lines = [f"{len(leaked)} of {len(asked)} prompts brought out training text, in {answers} answers."]
    lines += [line for row in leaked[: None if whole else _NAMED] for line in _leak(row)]
    crossed = [row for row in rows if row["probe"] == "cross_talk" and row.get("recites")]
    of = sum(row["probe"] == "cross_talk" for row in rows)
    lines.append(f"Asked its own question, {len(crossed)} of {of} trained examples recite another one.")
    lines += [f"  {row['id']}: {row['why']}" for row in crossed[: None if whole else _NAMED]]
    cut = [tables.wrapped(one.lstrip(), width, "    " if one[:1] == " " else "  ") for one in lines]
    yield "Leaks", [line for some in cut for line in some]


def _leak(row: Row) -> Iterator[str]:
    asked = f"«{' '.join(row['prompt'].split())}»" if row["prompt"] else f"({row['id']}: no question)"
    yield f"  {asked}: {_LEAKS[row['leak']]}, {row['tokens']} tokens of {reciters.near(str(row['source']))}"
    yield f"  «{' '.join(str(row['span']).split())}»"


# the same in other formats


def _formats(exam: Exam, width: int, whole: bool) -> Iterator[tuple[str, list[str]]]:
    found = formats(exam)
    if found is None:
        return
    lines = [line for one in grid.words(found) for line in tables.wrapped(one, width, "  ")]
    if whole:
        lines += [*(f"  {line}".rstrip() for line in grid.table(found, width - 2)), ""]
        lines += [f"  {line}".rstrip() for line in grid.side_by_side(found, width - 2)]
    yield "Formats", lines


def formats(exam: Exam) -> Robustness | None:
    """As the rows of the closing look say; None where they were not asked."""
    return minutes.read(_closing(exam, "formats"), lineup.suite(), exam.verdict.step)


# what was known before


def _drift(exam: Exam, width: int, whole: bool) -> Iterator[tuple[str, list[str]]]:
    found = forgotten.summary(_closing(exam, "drift"))
    if found is not None:
        yield "What the base knew", [f"  {line}" for line in forgotten.lines(found)]


# look by look


def looks(exam: Exam, width: int | None) -> list[str]:
    """At most a dozen, evenly chosen, the first and the last among them."""
    rows = trend.table(siblings.course(exam.subject.opened, exam.rows))
    step = (len(rows) - 1) / (_LOOKS - 1)
    shown = rows if len(rows) <= _LOOKS else [rows[round(i * step)] for i in range(_LOOKS)]
    return tables.columns([_HEAD, *(_cells(row) for row in shown)], width)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    losses = [_number(row[key]) for key in ("train_loss", "held_out_nll", "held_out_nll_tstar")]
    accuracy = "-" if row["held_out_accuracy"] is None else f"{row['held_out_accuracy']:.1%}"
    echoes = ["-" if row[f"echo_{key}"] is None else str(row[f"echo_{key}"]) for key in ("words", "long", "whole")]
    return (f"{row['epoch']:g}", f"{row['travel']:.1e}", *losses, accuracy, _number(row["twin_nll"]), *echoes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# the verdict


def _verdict(exam: Exam, width: int) -> Iterator[str]:
    subject = exam.subject
    if subject.adapter is None:
        places = {name: str(one.origin) for name, one in subject.plan.conversations.items()}
        said = keeping.told(keeping.read(subject.run) or {}, subject.run, places)
    else:
        told = exam.verdict
        said = iter([f"Verdict: {told.verdict}.", told.reason, f"Next: {told.next}".replace("RUN", subject.adapter.of)])
    for one in said:
        yield from tables.wrapped(one.lstrip().removeprefix("Verdict: "), width, "    " if one[:1] == " " else "  ")


# for programs


def document(exam: Exam, probes: Collection[str]) -> dict[str, Any]:
    """What `--json` prints."""
    found: dict[str, Any] = {
        "run": str(exam.subject.run.path),
        "step": exam.verdict.step,
        "probes": list(probes),
        "seconds": exam.seconds,
        "remarks": list(exam.subject.remarks),
        "verdict": runs.read_json(exam.subject.run.verdict),
    }
    if exam.trends:
        found["curves"] = [one.as_dict() for one in exam.trends]
        found["looks"] = trend.table(siblings.course(exam.subject.opened, exam.rows))
    if "echo" in probes:
        found["echo"] = [one.as_dict() for one in by_heart(exam)]
    if "drift" in probes:
        summary = forgotten.summary(_closing(exam, "drift"))
        found["drift"] = None if summary is None else summary.as_dict()
    if "formats" in probes:
        said = formats(exam)
        found["formats"] = None if said is None else grid.document(said)
    return found | {probe: _closing(exam, probe) for probe in ("leak",) if probe in probes}
