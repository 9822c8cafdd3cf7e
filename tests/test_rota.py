"""Strange formats in turn at full looks: what is read, what is said of it, and that nothing else is disturbed by it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import small
import test_planted
import tiny

from finetune import burden, ear, grammar, lineup, minutes, plan, prompts, reach, recipe, robustness, rota, runs
from finetune.hearing import Hearing
from finetune.looks import Place
from finetune.masks import encode
from finetune.model import POCKET
from finetune.plan import Plan
from finetune.rota import Rota
from finetune.runs import RunFolder
from finetune.speak import Speaker

PLACES = [Place("full", step, float(step), 1e-3 * step) for step in (0, 4, 8, 12)]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    formats = {"held_out": ["zephyr", "guanaco"], "sampled": 0.3}
    path = small.recipe(
        tmp_path_factory.mktemp("rota"), 12, quantization="none", formats=formats, data={"held_out": 0.33}
    )
    return plan.make(recipe.load(path), POCKET)


@pytest.fixture(scope="module")
def speaker(made: Plan) -> Speaker:
    net = tiny.stirred(tiny.adapted(POCKET), 0.02)
    return Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)


def night(made: Plan, speaker: Any, folder: Path, places: list[Place], known: list[Row] | None = None) -> list[Row]:
    """Full looks one after another, as a vigil takes them; all rows of examples. `known`: those of a killed run."""
    run = RunFolder(folder)
    folder.mkdir(exist_ok=True)
    runs.append_lines(run.examples, known or [])
    hearing = Hearing(run, ear.ear(made), speaker, ear.base(run), rota.of(made), noise=1e-3)
    for place in places:
        before = len({row["step"] for row in runs.read_lines(run.examples)} - {0, place.step})
        taken = hearing.look(place, test_planted.MOVED, (), before)
        runs.append_lines(run.examples, taken.examples)
        runs.append_lines(run.findings, taken.findings)
        assert {row["format"] for row in taken.metrics} <= set(made.formats), "a part of a split has no sums"
    return runs.read_lines(run.examples)


@pytest.fixture(scope="module")
def looked(made: Plan, speaker: Speaker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    folder = tmp_path_factory.mktemp("looks") / "run"
    return folder, night(made, speaker, folder, PLACES)


def strange(rows: list[Row], made: Plan) -> dict[int, dict[str, list[str]]]:
    """By step and example, the formats it met that the recipe does not name."""
    found: dict[int, dict[str, list[str]]] = {}
    for row in rows:
        if row["format"] not in made.formats:
            assert row["split"] == "held_out"
            found.setdefault(row["step"], {}).setdefault(row["id"], []).append(row["format"])
    return found


def test_each_held_out_example_meets_two_strange_formats_at_a_full_look_and_others_at_the_next(
    made: Plan, looked: tuple[Path, list[Row]]
) -> None:
    met = strange(looked[1], made)
    assert [*met] == [4, 8, 12]  # none at the base
    for some in met.values():
        assert some.keys() == set(made.split.held_out)
        assert all(len(set(names)) == len(names) == lineup.suite().each == 2 for names in some.values())
    everything = [name for some in met.values() for names in some.values() for name in names]
    assert len(everything) == len(set(everything)), "all formats come before any comes again"


def test_no_strange_format_is_one_that_the_run_trains_holds_out_or_wears(made: Plan) -> None:
    wardrobe = made.texts.wardrobe
    worn = {
        name for epoch in range(made.recipe.epochs) for one in made.split.train for name in wardrobe.worn(epoch, one)
    }
    drawn = {name for name in worn if name.startswith(grammar.PREFIX)}
    assert drawn
    known = [*made.formats.values(), *map(grammar.named, drawn)]
    ready = rota.of(made)
    assert ready.strange.keys().isdisjoint({*made.formats, *drawn})
    texts = {made.conversations[name].id: made.conversations[name] for name in made.split.held_out}
    one = next(iter(texts.values()))
    ids = {encode(prompts.render(one, fmt, made.vocabulary), made.vocabulary).ids for fmt in known}
    new = [text.ids for text in reach.texts([one], ready.strange.values(), made.vocabulary)]
    assert len(new) == len(ready.strange) > 40
    assert ids.isdisjoint(new)


def test_a_killed_run_meets_what_it_would_have_met(
    made: Plan, speaker: Speaker, looked: tuple[Path, list[Row]], tmp_path: Path
) -> None:
    """What the base said of a look that was lost is known already, and changes nothing."""
    folder, rows = looked
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    kept = RunFolder(folder).tokens_at(0)
    RunFolder(tmp_path / "run").tokens_at(0).write_bytes(kept.read_bytes())
    again = night(made, speaker, tmp_path / "run", PLACES[2:], [row for row in rows if row["step"] < 8])
    assert again == rows
    said = [runs.read_lines(RunFolder(one).findings) for one in (folder, tmp_path / "run")]
    assert [row for row in said[0] if row["step"] >= 8] == said[1]


def test_a_row_in_a_strange_format_says_what_the_base_loses_there(
    made: Plan, speaker: Speaker, looked: tuple[Path, list[Row]]
) -> None:
    row = next(row for row in looked[1] if row.get("base_nll") is not None)
    gauge = rota.of(made).strange[row["format"]]
    (text,) = reach.texts([made.conversations[row["id"]]], [gauge], made.vocabulary)
    for key, base in (("", False), ("base_", True)):
        cell = reach.read(speaker, [text], base)[text.key]
        nats = row[f"{key}nll"] * row["tokens"] - row[f"{key}end_nll"]
        assert nats == pytest.approx(cell.nats, rel=1e-4)
    assert row["nll_tstar"] is None  # the best temperature for a single answer would flatter it


# --- what is said of it


def said(gains: dict[str, float], strange_gains: dict[str, float], luck: float = 0.1) -> tuple[Rota, list[Row]]:
    """A rota over eight examples, and made up rows of one look and of the base. Gains are in nats a token."""
    ids, named = tuple(f"e{i}" for i in range(8)), []
    for name in gains:
        (fmt,) = prompts.load([name])
        named.append(lineup.Gauge(fmt, "trained" if name in ("chatml", "alpaca") else "held_out"))
    groups = {"sampled:00000a": "sampled", "sampled:00000b": "sampled", "chatml~blank-line": "slip"}
    others = {name: lineup.Gauge(prompts.load([name])[0], group) for name, group in groups.items()}  # type: ignore[arg-type]
    row = {"split": "held_out", "map": "full", "tokens": 10, "hits": 3, "bytes": 40, "end_nll": 2.0}
    rows = []
    for i, example in enumerate(ids):
        off = luck * (-1) ** i
        for name, gain in gains.items():
            rows.append({**row, "id": example, "format": name, "step": 0, "nll": 6.0})
            rows.append({**row, "id": example, "format": name, "step": 9, "nll": 6.0 - gain + off})
        for name, gain in strange_gains.items():
            about = {"step": 9, "nll": 6.0 - gain + off, "base_nll": 6.0, "base_end_nll": 2.0}
            if name != "sampled:00000b" or i < 4:
                rows.append({**row, "id": example, "format": name, **about})
    return Rota(lineup.suite(), tuple(named), others, ids, 0), rows


PLACE = Place("full", 9, 3.0, 1e-3)


def test_a_look_says_what_untouched_and_strange_formats_keep() -> None:
    named = {"chatml": 2.0, "alpaca": 2.0, "zephyr": 1.8, "guanaco": 1.0}
    ready, rows = said(named, {"sampled:00000a": 1.0, "sampled:00000b": 2.0, "chatml~blank-line": 1.9})
    row = ready.finding(rows, PLACE)
    assert row is not None
    assert {"probe", "suite", "version", "step", "prompt", "answer", "score", "why", "source"} <= row.keys()
    kept = row["kept"]
    assert row["score"] == kept["held_out"]["median"] == pytest.approx(0.7, abs=0.01)
    assert (kept["held_out"]["least"], kept["held_out"]["families"], kept["near"]) == ("guanaco", 2, None)
    # four examples met one sampled format, four met two: means of 0.5 and 0.75 of what they gained in trained ones
    assert kept["sampled"]["value"] == pytest.approx((4 * 0.5 + 4 * 0.75) / 8, abs=0.01)
    assert (kept["sampled"]["n"], kept["sampled"]["formats"], kept["slip"]["formats"]) == (8, 2, 1)
    assert kept["slip"]["value"] == pytest.approx(0.95, abs=0.01)
    assert kept["sampled"]["low"] < kept["sampled"]["value"] < kept["sampled"]["high"]
    assert (row["worst"]["format"], row["below"]) == ("guanaco", [])
    assert "Kept of it in formats never trained: 0.70 median, least 0.50 (guanaco, between" in row["why"]
    assert "In sampled formats, 8 examples in 2 formats: 0.6" in row["why"]
    assert rota.brief([row]) == "kept 0.70 median, least 0.50 (guanaco) · sampled 0.62 · slips 0.95"
    assert json.loads(json.dumps(row)) == row


def test_what_is_kept_of_nothing_is_not_resolvable_and_never_nought() -> None:
    named = {"chatml": 0.01, "alpaca": -0.01, "zephyr": 0.0, "guanaco": -3.0}
    ready, rows = said(named, {"sampled:00000a": 0.0}, luck=1.0)
    row = ready.finding(rows, PLACE)
    assert row is not None
    assert (row["score"], row["resolvable"], set(row["kept"].values())) == (None, False, {None})
    assert "not resolvable" in row["why"]
    assert "Surely worse than the base in guanaco." in row["why"]
    assert rota.brief([row]) == "what is kept is not resolvable · below the base: guanaco"
    assert ready.finding([one for one in rows if one["step"]], PLACE) is None, "nothing to compare with"
    assert rota.brief([]) == ""


def test_a_look_and_a_closing_look_are_not_taken_for_each_other(made: Plan, looked: tuple[Path, list[Row]]) -> None:
    own = runs.read_lines(RunFolder(looked[0]).findings)
    assert [row["step"] for row in own] == [4, 8, 12]
    assert minutes.read(own, lineup.suite(), 12) is None
    closing = [{"probe": "formats", "suite": "formats", "step": 12, "of": "answer", "kept": {}}]
    assert rota.brief(closing) == ""


# --- what it must not change


def test_the_verdict_is_the_same_with_strange_formats_and_without(tmp_path: Path) -> None:
    made = test_planted.planned(tmp_path, test_planted.examples(random.Random(1)))
    told = []
    for name, ready in (("with", rota.of(made)), ("without", None)):
        _, _, document = test_planted.heard(made, test_planted.turns, tmp_path / name, ready)
        rows = runs.read_lines(RunFolder(tmp_path / name / "run").examples)
        assert any(row.get("base_nll") for row in rows) is (ready is not None)
        told.append(document)
    assert told[0] == told[1]
    assert told[0]["run"]["verdict"] == "overfit"


def test_the_texts_of_looks_to_come_are_known_beforehand(made: Plan, looked: tuple[Path, list[Row]]) -> None:
    """Else a run that trains the upper layers alone would bring the lower ones back at every look."""
    ids = set(rota.texts(made, 3))
    listens = ear.ear(made)
    read = {
        listens.passage("held_out", name, fmt).ids
        for some in strange(looked[1], made).values()
        for name, names in some.items()
        for fmt in names
    }
    assert ids == read


def test_looking_at_strange_formats_is_paid_from_the_budget(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    known = lineup.suite()
    paid, light = [], []
    for each in (0, 2):
        monkeypatch.setattr("finetune.lineup.suite", lambda each=each: known.model_copy(update={"each": each}))
        cost = burden.cost(made)
        paid.append(cost.full)
        light.append(cost.light)
    monkeypatch.undo()
    pairs = [pair for look in range(50) for pair in rota.of(made).met(look)]
    read = [len(ear.ear(made).passage("held_out", *pair).ids) for pair in pairs[:80]]
    passes = 2 * sum(read) / len(read) * len(made.split.held_out) * 2  # adapter and base, two formats
    assert paid[1] - paid[0] == pytest.approx(passes, rel=0.2)
    assert light[0] == light[1]
    assert robustness.asked_of(made).worn
