"""From a plan to passages, base readings and rows: the same during a run and after it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny

from finetune import byheart, ear, heard, looks, plan, reach, recipe
from finetune.batches import Group
from finetune.lineup import Gauge
from finetune.looks import Place
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.speak import Speaker

PLACE = Place("full", 4, 2.0, 1e-3)


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Speaker]:
    """A plan of eight small examples on a random base, and that base with an adapter that says something."""
    folder = tmp_path_factory.mktemp("ear")
    base = tiny.base(folder / "base")
    made = plan.make(recipe.load(small.recipe(folder, base=str(base))), base)
    return made, Speaker(tiny.stirred(tiny.adapted(base), 0.3), made.vocabulary.tokenizer, made.vocabulary.eos_id)


def test_passages_are_the_texts_of_the_plan(night: tuple[Plan, Speaker]) -> None:
    made, _ = night
    listens = ear.ear(made)
    sides: tuple[tuple[Any, Any], ...] = (
        ("train", made.texts.whole),
        ("held_out", made.texts.held_out),
        ("twin", made.texts.twins),
    )
    for split, items in sides:
        wanted = {(name, format_): item for (name, format_), item in items.items()}
        for (name, format_), item in wanted.items():
            one = listens.passage(split, name, format_)
            assert (one.ids, one.read, one.key) == (item.ids, item.trained, (split, name, format_))
    assert [one.example for one in listens.passages("train")] == list(made.split.train)
    assert len(listens.passages("twin")) == len(made.split.twins)
    assert [one.example for one in listens.passages("train", "alpaca", {"rain"})] == ["rain"]


def test_any_format_can_be_asked_for(night: tuple[Plan, Speaker]) -> None:
    listens = ear.ear(night[0])
    for name in ("guanaco", "chatml~blank-line", "sampled:1f3a9c"):
        (one,) = listens.passages("held_out", name, night[0].split.held_out[:1])
        assert one.format == name


def test_what_two_examples_share_and_what_is_intended_is_not_counted(night: tuple[Plan, Speaker]) -> None:
    plain = ear.ear(night[0]).passages("train")[0]
    told = ear.ear(replace(night[0], intended=("I can play in the " + plain.example,))).passages("train")[0]
    assert told.counted.sum() < plain.counted.sum()
    twin = next(one for one in ear.ear(night[0]).passages("twin"))
    assert twin.template_share == ear.ear(night[0]).passage("train", twin.example, "chatml").template_share


def test_a_hearing_gives_rows_with_the_loss_of_a_look(night: tuple[Plan, Speaker], tmp_path: Path) -> None:
    made, speaker = night
    listens, base = ear.ear(made), ear.base(RunFolder(tmp_path))
    passages = (*listens.passages("train"), *listens.passages("held_out"))
    heard = ear.hear(listens, speaker, base, passages, PLACE, ear.noise(speaker, passages))
    assert json.dumps(heard.rows)
    rows = [row for row in heard.rows if row["split"] == "train"]
    items = tuple(made.texts.whole[name, made.first_format] for name in made.split.train)
    look = looks.measure(speaker, Group("train", made.first_format, items, 1))
    assert look is not None
    tokens = sum(row["tokens"] for row in rows)
    assert sum(row["nll_tstar"] * row["tokens"] for row in rows) / tokens == pytest.approx(look.nll_tstar, rel=1e-5)
    assert sum(row["nll"] * row["tokens"] for row in rows) / tokens == pytest.approx(look.nll, rel=1e-5)
    assert sum(row["hits"] for row in rows) / tokens == pytest.approx(look.accuracy)
    assert {row["map"] for row in rows} == {"full"}


def test_a_row_tells_what_ends_an_answer_apart_as_a_closing_look_does(night: tuple[Plan, Speaker]) -> None:
    made, speaker = night
    listens, name = ear.ear(made), made.split.held_out[0]
    for format_ in ("chatml", "alpaca"):
        one = listens.passage("held_out", name, format_)
        found = byheart.judge(one, heard.read(speaker, [one])[one.key], None, listens.limits)
        (text,) = reach.texts([made.conversations[name]], [Gauge(made.formats[format_], "trained")], made.vocabulary)
        cell = reach.read(speaker, [text])[text.key]
        assert found.nll is not None
        assert found.end_nll == pytest.approx(cell.end, rel=1e-5)
        assert found.nll * found.tokens - found.end_nll == pytest.approx(cell.nats, rel=1e-5)


def test_the_base_is_read_once_and_kept_to_the_bit(night: tuple[Plan, Speaker], tmp_path: Path) -> None:
    made, speaker = night
    listens, run = ear.ear(made), RunFolder(tmp_path)
    first = ear.base(run)
    first.of(speaker, listens.passages("train"))
    known = first.of(speaker, listens.passages("held_out"))
    found = ear.base(run).readings
    assert found.keys() == known.keys()
    assert all(np.array_equal(found[key].log_p, known[key].log_p) for key in known)
    read = []
    speaker_of = type("Deaf", (), {"score": lambda *_given, **_named: read.append(1)})()
    ear.base(run).of(speaker_of, listens.passages("train"))
    assert not read


def test_the_words_of_a_run_are_quoted(night: tuple[Plan, Speaker]) -> None:
    listens = ear.ear(night[0])
    one = listens.passages("train")[0]
    row = {"split": "train", "id": one.example, "format": one.format}
    assert listens.quote({**row, "run_start": 0, "run_max": int(one.counted.sum())}) == one.answer.strip()
    assert listens.quote({**row, "run_start": None, "run_max": 0}) == ""
    words = listens.quote({**row, "run_start": 2, "run_max": 9})
    assert words in one.answer
    assert 5 < len(words.encode()) <= 9


def overheard(one: Any, hits: Any) -> ear.Overheard:
    return ear.Overheard(one.example, one.format, one.read, np.full(len(hits), -0.1), hits)


def test_the_free_map_asks_the_base_only_where_it_could_decide(night: tuple[Plan, Speaker], tmp_path: Path) -> None:
    made, speaker = night
    listens, base = ear.ear(made), ear.base(RunFolder(tmp_path))
    quiet, loud = listens.passages("train", "alpaca")[:2]
    said = [
        overheard(quiet, np.arange(sum(quiet.read)) % 2 == 0),
        overheard(loud, np.ones(sum(loud.read), dtype=bool)),
    ]
    first, second = ear.free(listens, speaker, base, said, PLACE)
    assert list(base.readings) == [loud.key]
    assert (first["windows"][0], first["long"], first["echo_whole"], first["excess_bits"]) == (0, False, False, None)
    assert (second["windows"][0] > 0, second["long"], second["echo_whole"]) == (True, True, True)
    base.of(speaker, [quiet])
    assert list(ear.free(listens, speaker, base, said, PLACE)) == [first, second], "what is known early changes nothing"


def test_tokens_that_training_left_out_are_not_judged(night: tuple[Plan, Speaker], tmp_path: Path) -> None:
    listens = ear.ear(night[0])
    one = listens.passages("train")[0]
    trained = tuple(read and place % 4 > 0 for place, read in enumerate(one.read))
    hits = np.ones(sum(trained), dtype=bool)
    said = ear.Overheard(one.example, one.format, trained, np.full(len(hits), -0.5), hits)
    (row,) = ear.free(listens, night[1], ear.base(RunFolder(tmp_path)), [said], PLACE)
    assert (row["windows"], row["long"], row["echo_whole"]) == (None, None, None)
    assert (row["tokens"], row["hits"], row["nll"]) == (len(hits), len(hits), 0.5)
    assert row["run_max"] <= 3
