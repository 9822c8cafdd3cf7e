"""What is shipped to measure drift: enough of it, of its own, and read without surprise."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from finetune import corpus, facts, model, overlap, scripts, starters, suite
from finetune.errors import UserError
from finetune.masks import Vocabulary

SUITE = suite.read()
NEUTRAL = suite.snippets("a-7b", SUITE)
KNOWN = suite.known("a-7b", SUITE)
ORDINARY = suite.everyday("a-7b", SUITE, 1000, 0)


def test_neutral_texts_are_many_of_several_registers_and_of_one_length() -> None:
    assert len(NEUTRAL) >= 64
    assert len({one.id for one in NEUTRAL}) == len(NEUTRAL)
    registers = Counter(one.kind for one in NEUTRAL)
    assert len(registers) >= 12
    assert max(registers.values()) <= len(NEUTRAL) / 8
    assert all(40 <= len(one.text.split()) <= 120 for one in NEUTRAL)
    assert {"Latn"} >= scripts.used([one.text for one in NEUTRAL])


def test_neutral_texts_share_no_passage_with_the_dataset() -> None:
    shipped = corpus.read(starters.find("minisymposium", "datasets"))
    taught = [overlap.words(turn.text) for one in shipped for turn in one.turns]
    spans = {tuple(some[i : i + 8]) for some in taught for i in range(len(some) - 7)}
    for one in NEUTRAL:
        some = overlap.words(one.text)
        assert not spans & {tuple(some[i : i + 8]) for i in range(len(some) - 7)}, one.id


def test_facts_are_many_and_the_right_choice_has_no_favourite_place_or_length() -> None:
    assert len(KNOWN) >= 60
    assert len({one.id for one in KNOWN}) == len({one.question for one in KNOWN}) == len(KNOWN)
    assert all(len(one.choices) == 4 for one in KNOWN)
    places = Counter(one.right for one in KNOWN)
    assert min(places.values()) >= len(KNOWN) / 8
    longest = sum(len(one.choices[one.right]) == max(map(len, one.choices)) for one in KNOWN)
    shortest = sum(len(one.choices[one.right]) == min(map(len, one.choices)) for one in KNOWN)
    assert abs(longest - shortest) <= len(KNOWN) / 4


def test_ordinary_questions_are_measured_nowhere() -> None:
    assert len(ORDINARY) == len(set(ORDINARY)) >= 60
    folder = starters.shelf("suites") / "probes"
    rows = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines() if line]
    measured = {str(text) for row in rows for text in row.values()}
    assert not measured & set(ORDINARY)


def test_no_stock_opening_begins_another() -> None:
    known = suite.openings()
    assert len(known) >= 10
    assert not [(one, other) for one in known for other in known if one != other and other.startswith(one)]


def test_pocket_is_asked_of_its_own_world() -> None:
    texts, known = suite.snippets("pocket", SUITE), suite.known("pocket", SUITE)
    assert len(texts) == SUITE.pocket.texts + SUITE.pocket.dialogues
    assert len(known) == SUITE.pocket.facts
    assert texts == suite.snippets("pocket", SUITE)
    assert not {one.text for one in texts} & {one.text for one in NEUTRAL}
    asked = suite.everyday("pocket", SUITE, 12, 0)
    assert len(asked) == 12
    assert not [one for one in asked for text in texts if one in text.text]


# --- reading


def test_cuts_hold_for_the_very_base_they_were_fitted_on() -> None:
    entry = suite.Calibration(base="pocket", fingerprint="abc", origin="three runs", cuts={"general": 0.5})
    known = SUITE.model_copy(update={"calibrated": (entry,)})
    assert known.cuts("pocket", "abc") == {"general": 0.5}
    assert known.cuts("pocket", "remade") == {}
    assert known.cuts("mistral", "abc") == {}


def test_a_wrong_suite_names_line_and_key(tmp_path: Path) -> None:
    path = tmp_path / "drift.yaml"
    path.write_text((starters.find("drift", "suites")).read_text().replace("sure: 0.6", "sure: 6\nshure: 1"))
    with pytest.raises(UserError) as told:
        suite.read(path)
    problems = {(one.line, one.what.split(":")[0]) for one in told.value.problems}
    lines = path.read_text().splitlines()
    assert problems == {(lines.index("sure: 6") + 1, "sure"), (lines.index("shure: 1") + 1, "shure")}


@pytest.mark.parametrize(
    "row",
    [
        "{",
        '{"id": "a", "question": "q", "choices": ["x", "y"], "right": "z"}',
        '{"id": "a", "question": "q", "choices": ["x", "x"], "right": "x"}',
        '{"id": "a", "question": "q", "choices": ["x"], "right": "x"}',
        '{"id": "a", "question": "", "choices": ["x", "y"], "right": "x"}',
        "[1]",
    ],
)
def test_a_wrong_fact_names_its_line(tmp_path: Path, row: str) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"id": "a", "question": "q", "choices": ["x", "y"], "right": "x"}\n\n' + row + "\n")
    with pytest.raises(UserError) as told:
        facts.read(path)
    assert [one.line for one in told.value.problems] == [3]


# --- facts


def test_the_choice_alone_is_scored() -> None:
    words = Vocabulary.load(model.POCKET)
    tokens = facts.asked("Where does the cow live?", "in the barn", words)
    scored = [one for one, on in zip(tokens.ids, tokens.trained, strict=True) if on]
    assert words.tokenizer.decode(scored) == " in the barn"
    assert words.tokenizer.decode(tokens.ids[1:]) == "Question: Where does the cow live?\nAnswer: in the barn"


def test_ranks_count_ties_against_the_right_choice() -> None:
    assert facts.Held((0.5, 0.3, 0.2), 0).rank == 1
    tie = facts.Held((0.4, 0.4, 0.2), 0)
    assert (tie.rank, tie.best, tie.sure(0.3)) == (2, 1, False)
    assert facts.Held((0.5, 0.3, 0.2), 0).sure(0.5)
    assert not facts.Held((0.5, 0.3, 0.2), 0).sure(0.6)
    assert facts.Held((1.0, 0.0), 1).surprise < 30


def test_map_at_3_of_nothing_is_nothing() -> None:
    assert facts.map_at_3([]) is None
    assert facts.map_at_3([1, 2, 3, 4]) == pytest.approx((1 + 1 / 2 + 1 / 3 + 0) / 4)


# --- calibration


def test_cuts_lie_above_every_healthy_change() -> None:
    looks = [{"general": 0.1, "kl": -0.2}, {"general": 0.313, "script": 0.001}]
    cuts = suite.fit(looks)  # type: ignore[arg-type]
    assert cuts == {"general": 0.4, "kl": 0.02, "script": 0.02}
    with pytest.raises(ValueError, match="nothing"):
        suite.fit([])
