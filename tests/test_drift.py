"""Drift is measured against the base's own figures and tells foreign letters before they are spoken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from transformers import AutoModelForCausalLM

from finetune import drift, evidence, forgotten, model, plan, prompts, recipe, rules, runs, scripts, signs, suite
from finetune.drift import Probe, Said
from finetune.evidence import Setting
from finetune.looks import Place
from finetune.masks import Tokens, encode
from finetune.plan import Plan
from finetune.speak import Speaker

FEW = suite.read().model_copy(
    update={"pocket": suite.World(seed=7, texts=4, dialogues=3, facts=6), "openings_after": 2, "held_out": 2}
)
BASE, ONE = Place("full", 0, 0, 0), Place("full", 3, 1, 3e-3)
Rows = list[dict[str, Any]]


@dataclass
class Night:
    """A plan on pocket, its probe, an adapter that says something, and one look at it."""

    plan: Plan
    probe: Probe
    speaker: Speaker
    rows: Rows


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    folder = tmp_path_factory.mktemp("drift")
    made = plan.make(recipe.load(small.recipe(folder)), model.POCKET)
    probe = drift.probe(made, "pocket", "here", folder / drift.CACHE, FEW)
    net = tiny.stirred(tiny.adapted(model.POCKET))
    speaker = Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)
    assert probe.look(speaker, BASE) == []
    return Night(made, probe, speaker, probe.look(speaker, ONE))


def of(rows: Rows, axis: str) -> Rows:
    return [row for row in rows if row.get("axis") == axis]


def test_rows_say_what_was_asked_and_what_the_base_makes_of_it(night: Night) -> None:
    needed = {"probe", "suite", "version", "step", "prompt", "answer", "score", "why", "source", "axis", "id", "base"}
    assert all(needed <= row.keys() for row in night.rows)
    counts = {axis: len(of(night.rows, axis)) for axis in suite.AXES}
    assert counts | {"facts": 0} == {
        "general": 7, "kl": 7, "script": 2, "script_neutral": 7, "stock": 2, "facts": 0,
    }  # fmt: skip
    assert len([row for row in night.rows if "fact" in row]) == 6


def test_general_text_is_scored_in_bits_per_byte(night: Night) -> None:
    for text, row in zip(night.probe.texts, of(night.rows, "general"), strict=False):
        for base, key in ((False, "score"), (True, "base")):
            scored = night.speaker.score([text.tokens.ids], [text.tokens.trained], base=base)[0]
            assert row[key] == pytest.approx(scored.nll / math.log(2) / text.size, rel=1e-3)
    for row in of(night.rows, "kl"):
        assert row["score"] > row["base"] > 0


def test_an_untouched_adapter_has_lost_nothing(night: Night) -> None:
    fresh = tiny.adapted(model.POCKET)
    speaker = Speaker(fresh, night.plan.vocabulary.tokenizer, night.plan.vocabulary.eos_id)
    for row in night.probe.look(speaker, ONE):
        assert row["score"] == pytest.approx(row["base"], abs=1e-5), row["axis"]
    found = forgotten.summary(night.probe.look(speaker, ONE))
    assert found is not None
    assert found.facts is not None
    assert (found.facts.right, found.facts.kept) == (found.facts.base_right, found.facts.sure)


def test_the_base_is_asked_once_and_again_for_another_suite(night: Night) -> None:
    cache = night.probe.cache
    assert cache is not None
    known = runs.read_json(cache)
    spoilt = {**known, "openings": dict.fromkeys(known["openings"], -1.5)}
    runs.write_json(cache, spoilt)
    try:
        assert {row["base"] for row in of(night.probe.look(night.speaker, ONE), "stock")} == {-1.5}
        other = replace(night.probe, facts=night.probe.facts[:2])
        assert -1.5 not in {row["base"] for row in of(other.look(night.speaker, ONE), "stock")}
    finally:
        runs.write_json(cache, known)


def test_only_what_the_base_surely_knew_can_be_forgotten(night: Night) -> None:
    known = runs.read_json(night.probe.cache)
    flat = {name: [0.25] * len(shares) for name, shares in known["facts"].items()}
    runs.write_json(night.probe.cache, {**known, "facts": flat})
    try:
        rows = night.probe.look(night.speaker, ONE)
    finally:
        runs.write_json(night.probe.cache, known)
    assert not of(rows, "facts")
    found = forgotten.summary(rows)
    assert found is not None
    assert found.facts is not None
    assert (found.facts.asked, found.facts.sure, found.facts.kept, found.facts.base_right) == (6, 0, 0, 0)


def test_the_odds_of_stock_openings_rise_when_one_is_taught(night: Night) -> None:
    net = tiny.adapted(model.POCKET)
    teach(net, [one for _, _, some in night.probe.openings for one in some[3:4]], steps=6, rate=5e-3)
    speaker = Speaker(net, night.plan.vocabulary.tokenizer, night.plan.vocabulary.eos_id)
    before, after = of(night.rows, "stock"), of(night.probe.look(speaker, ONE), "stock")
    assert all(row["score"] > row["base"] + 3 for row in after)
    assert [row["base"] for row in after] == [row["base"] for row in before]


# --- answers that were written


def test_a_script_of_data_prompt_or_base_is_not_foreign(night: Night) -> None:
    said = [
        Said("own", "Hi", "Hello, friend.", "Hello."),
        Said("asked", "What is 猫?", "猫 is a cat.", "A cat."),
        Said("base", "Hi", "Да.", "Да, да."),
        Said("drifted", "Hi", "Hello 你好.", "Hello."),
    ]
    rows = night.probe.spoken(said, ONE)
    assert [row["wrong_script"] for row in rows] == [False, False, False, True]
    assert "Han 2" in rows[-1]["why"]


def test_how_it_writes_is_told_beside_base_and_author(night: Night) -> None:
    said = [
        Said("a", "Hi", "Certainly! " + "one two three four " * 4, "Two words here."),
        Said("b", "Hi", "Six words of quite another kind.", "Three words more."),
    ]
    found = forgotten.summary(night.probe.spoken(said, ONE))
    assert found is not None
    assert found.spoken is not None
    told = found.spoken
    assert (told.answers, told.own.looped, told.base.looped) == (2, 1, 0)
    assert told.length == pytest.approx((17 / 3 + 2) / 2)
    assert told.own.stock == pytest.approx(1000 / 23)
    assert (told.base.stock, told.author_stock) == (0, 0)
    assert told.own.distinct_2 is not None
    assert not found.moved
    assert found.facts is None


def test_answers_of_a_look_stand_beside_those_of_the_base() -> None:
    def row(step: int, answer: str) -> dict[str, Any]:
        return {"step": step, "id": "rain", "prompt": "Do you?", "answer": answer}

    assert drift.sampled([row(4, "new")], [row(0, "old")]) == [Said("rain", "Do you?", "new", "old")]


def test_a_text_that_a_closing_measurement_read_again_counts_once(night: Night) -> None:
    rows = [*night.rows, *night.probe.spoken([Said("a", "Hi", "Six words.", "Two words here.")], ONE)]
    again = [{**row, "look": "closing"} for row in rows]
    assert forgotten.summary([*rows, *again]) == forgotten.summary(rows)


def test_an_answer_whose_base_was_never_asked_is_not_judged() -> None:
    now = [{"step": 4, "id": "", "prompt": "Added later?", "answer": "Да."}]
    assert drift.sampled(now, [{"step": 0, "id": "", "prompt": "Hi", "answer": "Hi"}]) == []


def test_nothing_measured_is_no_summary(night: Night) -> None:
    assert forgotten.summary([]) is None
    assert forgotten.summary([{"probe": "leak", "step": 3}]) is None
    assert forgotten.summary(night.rows, step=4) is None
    assert forgotten.brief([]) == ""


# --- what it means


def look(step: int) -> dict[str, Any]:
    return {"kind": "look", "look": "full", "step": step, "epoch": float(step), "travel": step * 1e-3}


def harms(rows: Rows) -> tuple[str, ...]:
    """Signs of one look at an adapter for good, by drift rows alone."""
    (found,) = evidence.facts([look(3)], [], rows, Setting("chatml"))
    return signs.signs(found, rules.read()).harms


def test_only_a_calibrated_base_gates(night: Night) -> None:
    worse = [{**row, "score": 1.5 * row["base"]} if row["axis"] == "general" else row for row in night.rows]
    assert harms([{**row, "cut": None} for row in worse]) == ()
    assert harms([{**row, "cut": 0.2} for row in of(worse, "general")]) == ("drift_general",)
    assert harms([{**row, "cut": 0.9} for row in of(worse, "general")]) == ()


def test_alarms_are_those_the_verdict_would_see(night: Night) -> None:
    worse = [{**row, "score": 1.5 * row["base"], "cut": 0.2} for row in of(night.rows, "general")]
    found = forgotten.summary(worse)
    assert found is not None
    assert found.alarms == ("general",)
    assert "ALARM" in "\n".join(forgotten.lines(found))
    assert "beyond what is healthy: neutral text" in forgotten.brief(worse)
    assert json.loads(json.dumps(found.as_dict()))["alarms"] == ["general"]
    within = forgotten.summary([{**row, "cut": 0.9} for row in worse])
    assert within is not None
    assert within.alarms == ()


def test_an_uncalibrated_base_is_told_so(night: Night) -> None:
    found = forgotten.summary(night.rows)
    assert found is not None
    assert found.alarms == ()
    assert "No cuts are fitted for this base" in "\n".join(forgotten.lines(found))
    told = forgotten.brief(night.rows)
    assert told.startswith("neutral text ")
    assert told.endswith("no cuts for this base")


# --- foreign letters, before they are spoken

TAIL = "Да."


def batch(texts: list[Tokens]) -> dict[str, torch.Tensor]:
    width = max(len(one.ids) for one in texts)
    fill = [width - len(one.ids) for one in texts]
    labels = [[i if on else -100 for i, on in zip(one.ids, one.trained, strict=True)] for one in texts]
    return {
        "input_ids": torch.tensor([[*one.ids, *[0] * more] for one, more in zip(texts, fill, strict=True)]),
        "labels": torch.tensor([[*one, *[-100] * more] for one, more in zip(labels, fill, strict=True)]),
    }


def teach(
    net: Any, texts: list[Tokens], steps: int, rate: float, after: Callable[[int], bool] = lambda _: False
) -> None:
    """Steps on all texts at once, until `after` says that it is enough."""
    pace = torch.optim.AdamW([one for one in net.parameters() if one.requires_grad], lr=rate)
    for step in range(1, steps + 1):
        net(**batch(texts)).loss.backward()
        torch.nn.utils.clip_grad_norm_([one for one in net.parameters() if one.grad is not None], 1.0)
        pace.step()
        pace.zero_grad()
        if after(step):
            return


def lines_of(made: Plan, names: tuple[str, ...], tail: str = "") -> list[Tokens]:
    found = []
    for name in names:
        one = made.conversations[name]
        answer = replace(one.turns[-1], text=one.turns[-1].text + tail)
        rendered = prompts.render(
            replace(one, turns=(*one.turns[:-1], answer)), made.formats["chatml"], made.vocabulary
        )
        found.append(encode(rendered, made.vocabulary))
    return found


def plain(made: Plan, text: str) -> Tokens:
    ids = [made.vocabulary.bos_id or 0, *made.vocabulary.tokenizer.encode(text, add_special_tokens=False).ids]
    return Tokens(tuple(ids), (False, *(True,) * (len(ids) - 1)), (), 0, ())


@pytest.fixture(scope="module")
def bilingual(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """A small base that answers in English and has read a little Russian elsewhere."""
    folder = tmp_path_factory.mktemp("bilingual")
    talk = folder / "talk"
    talk.mkdir()
    for name in small.WEATHER:
        text = f"---\nid: {name}\n---\n## user\nDo you like {name}?\n## assistant\nYes, I like {name} a lot.\n"
        (talk / f"{name}.md").write_text(text)
    base = tiny.base(folder / "two")
    wanted = small.recipe(folder, 12, base=str(base), quantization="none", data={"train": str(talk), "held_out": 0.34})
    made = plan.make(recipe.load(wanted), base)
    net = AutoModelForCausalLM.from_pretrained(base)
    english = lines_of(made, tuple(made.conversations))
    teach(net, [*english, *(plain(made, text) for text in ("Да. Нет. Да.", "Нет. Да. Да."))], steps=40, rate=4e-3)
    net.save_pretrained(base)
    return base, made


def test_foreign_letters_raise_the_alarm_before_the_first_is_spoken(bilingual: tuple[Path, Plan]) -> None:
    base, made = bilingual
    ready = drift.probe(made, "two", "here", None, FEW.model_copy(update={"held_out": 4, "prompts": 2}))
    ready = replace(ready, texts=tuple(text for text in ready.texts if not text.neutral), facts=(), openings=())

    def summed(net: Any, step: int) -> forgotten.Moved:
        speaker = Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)
        found = forgotten.summary(ready.look(speaker, Place("full", step, step, 0.0)))
        assert found is not None
        (moved,) = found.moved
        return moved

    healthy: list[float] = []

    def watched(net: Any) -> Callable[[int], bool]:
        def after(step: int) -> bool:
            healthy.extend([summed(net, step).share or 0.0] if step % 4 == 0 else [])
            return False

        return after

    net = tiny.adapted(base)
    teach(net, lines_of(made, made.split.train), 20, 3e-3, watched(net))
    cuts = suite.fit([{"script": share} for share in healthy])
    ready = replace(ready, cuts=cuts)

    net, alarmed, spoken = tiny.adapted(base), [], []

    def drifting(step: int) -> bool:
        if not alarmed and summed(net, step).alarm:
            alarmed.append(step)
        if alarmed:
            speaker = Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)
            rows = ready.spoken(drift.answers(speaker, made, ready), ONE)
            spoken.extend([step] if any(row["wrong_script"] for row in rows) else [])
        return bool(spoken)

    teach(net, lines_of(made, made.split.train, TAIL), 60, 3e-3, drifting)
    assert alarmed, "no alarm"
    assert spoken, "no foreign letter was ever spoken"
    assert alarmed[0] < spoken[0]


def test_the_marked_tokens_begin_what_data_and_prompt_lack(bilingual: tuple[Path, Plan]) -> None:
    _, made = bilingual
    ready = drift.probe(made, "two", "here", None, FEW)
    first, latin = (made.vocabulary.tokenizer.encode(text).ids[0] for text in ("Д", "a"))
    assert ready._marked(frozenset())[first]
    assert not ready._marked(scripts.used(["Да"]))[first]
    assert not ready._marked(frozenset())[latin]
