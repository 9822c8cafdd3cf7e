"""The same answers and questions in many formats: read from a real small model, judged from scripted answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny

from finetune import disk, grid, lineup, minutes, plan, prompts, reach, recipe, replies, robustness
from finetune.lineup import Gauge
from finetune.masks import Vocabulary
from finetune.model import POCKET
from finetune.plan import Plan
from finetune.prompts import load
from finetune.reach import Text
from finetune.replies import Reply
from finetune.robustness import Robustness, Store
from finetune.speak import Answer, Pass, Speaker

SUITE = lineup.suite().model_copy(update={"named": ("phi-3", "xml-tags", "llama-3"), "sampled": 2, "asked_sampled": 1})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return plan.make(recipe.load(small.recipe(tmp_path_factory.mktemp("small"), quantization="none")), POCKET)


@pytest.fixture(scope="module")
def speaker(made: Plan) -> Speaker:
    net = tiny.stirred(tiny.adapted(POCKET), 0.02)
    return Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)


def gauges(*names: str, group: Any = "trained") -> list[Gauge]:
    return [Gauge(one, group) for one in load(names)]


def texts(made: Plan, *names: str) -> list[Text]:
    return reach.texts([made.conversations[name] for name in made.split.held_out], gauges(*names), made.vocabulary)


# --- losses


def test_words_and_end_are_read_apart_and_make_up_the_whole(made: Plan, speaker: Speaker) -> None:
    for one in texts(made, "chatml", "alpaca"):
        item = made.texts.held_out[one.example, one.format]
        assert one.ids == item.ids
        cell = reach.read(speaker, [one])[one.key]
        whole = speaker.score([item.ids], [item.trained])[0]
        assert cell.nats + (cell.end or 0) == pytest.approx(whole.nll, rel=1e-5)
        assert cell.tokens == item.supervised - (one.end[1] - one.end[0])
        assert 0 <= len(made.conversations[one.example].answer.encode()) - cell.size <= 1
    ends = {one.format: one.end[1] - one.end[0] for one in texts(made, "chatml", "alpaca")}
    assert ends["chatml"] > ends["alpaca"] == 1  # why ends are no part of a comparison


def test_earlier_answers_count_and_their_ends_do_not() -> None:
    """Words of both answers, the end of the last. A full stop that is one token with a mark is the mark's."""
    vocabulary = Vocabulary.load(POCKET)
    for name, words, end in (("xml-tags", "A little.No.", "\n</assistant>"), ("chatml", "A littleNo", ".<|im_end|>")):
        (one,) = reach.texts([prompts.PROBE], gauges(name), vocabulary)
        read = [id for id, on in zip(one.ids, one.words, strict=True) if on]
        assert vocabulary.tokenizer.decode(read).replace(" ", "") == words.replace(" ", "")
        ids = list(one.ids[one.end[0] : one.end[1]])
        assert vocabulary.tokenizer.decode(ids, skip_special_tokens=False) == end
        assert one.size == len(words)


def test_the_same_answer_is_found_again_in_another_format(made: Plan) -> None:
    chatml, colon, xml, yaml_ = (
        next(iter(texts(made, name))) for name in ("chatml", "user-assistant-plain", "xml-tags", "yaml-turns")
    )
    for other in (colon, xml):
        shared = chatml.places.keys() & other.places.keys()
        assert len(shared) >= 0.9 * len(chatml.places)  # its first token may hold a space
        assert all(chatml.ids[chatml.places[at]] == other.ids[other.places[at]] for at in shared)
    assert chatml.places.keys() & yaml_.places.keys()  # until its first indented line


def test_formats_lie_apart_as_two_passes_say(made: Plan, speaker: Speaker) -> None:
    some = texts(made, "chatml", "xml-tags")
    kept: dict[str, Any] = {}
    (found,) = reach.apart(speaker, some, "chatml", kept)
    assert (found.format, len(found.pairs)) == ("xml-tags", len(made.split.held_out))
    pairs = [
        (one, other) for one in some for other in some if one.format < other.format and one.example == other.example
    ]
    wanted = []
    for one, other in pairs:
        shared = [at for at in one.places if at in other.places]
        wanted.append(speaker.kl(*(Pass(text.ids, [text.places[at] for at in shared]) for text in (one, other))).mean())
    assert found.tuned == pytest.approx(float(sum(wanted) / len(wanted)), rel=1e-4)
    assert len(kept) == len(pairs)
    assert found.tuned > 0.01
    (again,) = reach.apart(_Tuned(speaker), some, "chatml", kept)
    assert again == found


class _Tuned:
    """A speaker that must not be asked about the base."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    def score(self, *given: Any) -> Any:
        assert not given[3], "the base was read again"
        return self._speaker.score(*given)

    def kl(self, one: Pass, other: Pass) -> Any:
        assert not one.base
        return self._speaker.kl(one, other)


def test_the_base_is_read_once_for_a_run(made: Plan, speaker: Speaker, tmp_path: Path) -> None:
    store = Store(tmp_path / "tokens" / reach.NAME, "pocket")
    first = robustness.measure(speaker, made, SUITE, 5, store, write=False)
    again = robustness.measure(_Tuned(speaker), made, SUITE, 5, store, write=False)
    assert again.transfer == first.transfer
    assert again.apart == first.apart
    with pytest.raises(AssertionError, match="read again"):
        robustness.measure(_Tuned(speaker), made, SUITE, 5, replace(store, about="another base"), write=False)
    store.path.write_text('{"about": "pocket", "cells": {"x": {"nats": 1}}}')  # torn, or of another version
    assert reach.load(store.path, "pocket") == {}


# --- answers


@dataclass
class Script:
    """A model that answers as it is told, in turn, and notes what it was asked."""

    answers: Sequence[Answer]
    asked: list[tuple[Sequence[Sequence[int]], Sequence[str], bool, Any, int]] = field(default_factory=list)

    def complete(
        self, given: Sequence[Sequence[int]], stops: Sequence[str], most: int, base: bool, sampler: Any, seed: int
    ) -> list[Answer]:
        before = sum(len(one[0]) for one in self.asked)
        self.asked.append((given, stops, base, sampler, seed))
        return [self.answers[(before + at) % len(self.answers)] for at in range(len(given))]


GOOD = (
    "**The farmer**\nThe rain helps the field number nine.\n\n**The child**\nI can play in the rain.\n\n"
    "**Conclusion**\nYes, I like the rain on most days."
)


@pytest.mark.parametrize(
    ("answer", "name", "outcome", "leaks", "in_house"),
    [
        (Answer(GOOD, True, 30, "<|im_end|>"), "chatml", "ended", (), True),
        (Answer(GOOD, True, 30, ""), "chatml", "ended", (), True),
        (Answer(GOOD, True, 30, "<|im_start|>"), "chatml", "next turn", (), True),
        (Answer(GOOD, True, 30, ""), "alpaca", "ended", (), True),
        (Answer(GOOD, True, 30, "\n###"), "alpaca", "next turn", (), True),
        (Answer(GOOD, True, 30, "\nUser:"), "user-assistant-plain", "next turn", (), True),
        (Answer(GOOD, False, 99, None), "chatml", "ran on", (), True),
        (Answer("Yes.", True, 2, ""), "chatml", "early", (), False),
        (Answer("", True, 0, ""), "alpaca", "early", (), False),
        (Answer(GOOD + "\n### Response:\nNo.", True, 40, ""), "chatml", "ended", ("### Response:",), True),
        (Answer(GOOD.replace("**Conclusion**\n", ""), True, 30, ""), "alpaca", "ended", (), False),
    ],
)
def test_what_came_of_an_answer(
    made: Plan, answer: Answer, name: str, outcome: str, leaks: tuple[str, ...], in_house: bool
) -> None:
    by = robustness.judge(made, SUITE, gauges(name))
    asked = [("single", made.conversations[made.split.held_out[0]])]
    (one,) = replies.ask(Script([answer]), asked, gauges(name), by)
    assert (one.outcome, one.leaks, one.in_house) == (outcome, leaks, in_house)
    assert one.why


def test_what_is_asked_is_what_a_client_sends(made: Plan) -> None:
    (gauge,), told = gauges("phi-3"), Script([Answer(GOOD, True, 30, "<|end|>")])
    asked = [("single", made.conversations[name]) for name in made.split.held_out]
    found = list(replies.ask(told, asked, [gauge], robustness.judge(made, SUITE, [gauge]), sampler="hot", draws=2))
    (given, stops, base, sampler, seed), second = told.asked
    words = [prompts.prompt_text(one.turns[:-1], gauge.format, made.vocabulary) for _, one in asked]
    texts_ = [made.vocabulary.tokenizer.decode(list(ids), skip_special_tokens=False) for ids in given]
    assert [text.removeprefix(made.vocabulary.bos or "") for text in texts_] == words
    assert {"<|end|>", "<|user|>", "<|assistant|>", made.vocabulary.eos} <= set(stops)
    assert (base, sampler, seed, second[4]) == (False, "hot", 1, 2)
    assert [one.draw for one in found] == [1] * len(asked) + [2] * len(asked)


def test_tallies_count_every_answer_once(made: Plan) -> None:
    script = [Answer(GOOD, True, 30, ""), Answer("No.", True, 2, ""), Answer(GOOD, False, 9, None)]
    script += [Answer(f"{GOOD}\nUser: hm", True, 3, "<|im_start|>")]
    by = robustness.judge(made, SUITE, gauges("chatml"))
    asked = [("single", one) for one in [*made.conversations.values()] * 3][:12]
    found = list(replies.ask(Script(script), asked, gauges("chatml"), by))
    one = replies.tally(found)
    assert (one.n, one.ended, one.early, one.ran_on, one.turn, one.leaks) == (12, 3, 3, 3, 3, 3)
    assert (one.in_house, one.shaped) == (9, 12)
    assert one.stop is not None
    assert one.stop.value == 0.25
    assert replies.by(found, "format") == {"chatml": one}
    assert replies.tally([]).stop is None


# --- all of it


@pytest.fixture(scope="module")
def found(made: Plan, speaker: Speaker) -> Robustness:
    (own,) = load(["gemma"])
    return robustness.measure(speaker, made, SUITE, 5, own=[replace(own, name="mine")])


def test_every_format_of_the_lineup_is_measured(made: Plan, found: Robustness) -> None:
    groups = {one.format: one.group for one in found.transfer.standings}
    assert groups.keys() == {one.name for one in found.formats}
    assert {groups[name] for name in ("chatml", "zephyr", "llama-3", "mine", "chatml~blank-line")} == {
        "trained", "held_out", "near", "own", "slip",
    }  # fmt: skip
    assert [*groups.values()].count("sampled") == 2
    assert all(one.n == len(made.split.held_out) for one in found.transfer.standings)


def test_answers_are_asked_of_adapter_and_base(made: Plan, found: Robustness) -> None:
    names = {"chatml", "alpaca", "zephyr", "mine"}
    assert {one.format for one in found.greedy(base=True)} == names
    assert len({one.format for one in found.greedy()} - names) == SUITE.asked_sampled
    drawn = [one for one in found.replies if one.draw]
    assert len(drawn) == 2 * len(names) * len(made.split.held_out)
    assert found.written.n == len(found.greedy()) + len(drawn)
    assert found.consistency.within is not None


def test_the_table_shows_every_format_worst_first(found: Robustness) -> None:
    lines = grid.table(found)
    rows = {line.split()[0]: at for at, line in enumerate(lines) if line.split()}
    for one in found.transfer.standings:
        assert f"{one.tuned:.3f}" in lines[rows[one.format]]
        assert f"{one.base:.3f}" in lines[rows[one.format]]
    for group in ("trained", "held_out"):
        order = [one.format for one in found.transfer.standings if one.group == group]
        gains = {one.format: one.base - one.tuned for one in found.transfer.standings}
        assert order == sorted(order, key=lambda name: rows[name]) == sorted(order, key=lambda name: gains[name])
    assert all(len(line) <= 60 for line in grid.table(found, 60))


def test_one_question_stands_side_by_side_in_three_formats(found: Robustness) -> None:
    lines = grid.side_by_side(found, 90)
    assert lines[0] == f"> {found.greedy()[0].question}"
    assert lines[2].split() == ["chatml", "mine", "zephyr"]
    assert all(len(line) <= 90 for line in lines)
    first = found.greedy()[0]
    assert first.text.split()[0] in " ".join(lines)
    assert grid.side_by_side(replace(found, replies=())) == []


def test_the_words_name_the_worst_format_and_the_goals(found: Robustness) -> None:
    told = " ".join(grid.words(found))
    assert found.transfer.worst is not None
    assert f"Least gained: {found.transfer.worst.format}" in told
    assert "Goal: 98%" in told
    assert "None" not in told
    silent = " ".join(grid.words(replace(found, replies=())))
    assert "No answers were asked for" in silent
    document = json.loads(disk.to_json(grid.document(found)))
    assert document["formats"][0]["format"] == found.transfer.standings[0].format
    assert document["words"] == grid.words(found)


def test_rows_of_a_run_folder_say_all_of_it(found: Robustness) -> None:
    rows = [json.loads(disk.to_json(row)) for row in minutes.rows(found)]
    again = minutes.read(rows, SUITE, found.step)
    assert again == found
    assert again.transfer == found.transfer
    assert grid.table(again) == grid.table(found)
    assert grid.words(again) == grid.words(found)
    assert all(
        {"probe", "suite", "version", "step", "prompt", "answer", "score", "why", "source"} <= row.keys()
        for row in rows
    )
    good = [row["score"] for row in rows if row["of"] == "answer"]
    assert good == [float(one.why == "ended where an answer of this format ends") for one in found.replies]
    assert minutes.read(rows, SUITE, found.step + 1) is None


def test_nothing_held_out_is_told_as_not_measured(made: Plan, speaker: Speaker) -> None:
    everything = plan.make(made.recipe, POCKET, everything=True)
    empty = robustness.measure(speaker, everything, SUITE)
    assert grid.table(empty) == ["No held-out example: formats were not measured."]
    assert grid.words(empty)[0].startswith("Transfer: not measured")


def test_kinds_of_examples_are_told_apart(made: Plan) -> None:
    names = made.split.held_out
    turns = made.conversations[names[0]].turns
    talk = replace(made.conversations[names[0]], turns=(*turns, *turns))
    changed = replace(made, conversations={**made.conversations, names[0]: talk})
    kinds = robustness.kinds_of(changed, 2.0)
    assert (kinds[names[0]], kinds[names[1]]) == ("multi-turn", "single")
    assert robustness.kinds_of(made, 0.5)[names[1]] == "long"


def test_a_look_is_compared_from_its_rows(made: Plan) -> None:
    row = {"split": "held_out", "map": "full", "tokens": 10, "hits": 3, "bytes": 40, "end_nll": 2.0}
    rows = [
        {**row, "id": f"e{i}", "format": name, "step": step, "nll": 5.0 - gain * (step > 0) + 0.1 * i * (step > 0)}
        for step in (0, 9)
        for name, gain in (("chatml", 2.0), ("alpaca", 2.0), ("zephyr", 1.0))
        for i in range(4)
    ]
    known = [*gauges("chatml", "alpaca"), *gauges("zephyr", group="held_out")]
    one = robustness.at_look(rows, 9, known, SUITE)
    assert one.headlines["held_out"].least.tau.value == pytest.approx((10 - 1.5) / (20 - 1.5))
    assert one.standings[0].format == "zephyr"


def test_replies_know_the_words_for_everything() -> None:
    blank = Reply("f", "trained", "e", "single", "Q?", "A b", 7, "ran on", None, ("Q:",), False, False, 0)
    assert blank.why == "no end within 7 tokens; holds Q: of another format; not built like the taught answers"
    assert replace(blank, outcome="early", leaks=(), in_house=None).why == "ended after 2 words"
