"""Marks of formats in texts; strangers and near relations; and no held-out family is ever trained on."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
from test_grammar import VOCABULARY, wardrobe

from finetune import grammar, recipe, scaffold
from finetune.filling import PROBE
from finetune.format import Format
from finetune.prompts import load, render, shipped
from finetune.scaffold import Detector
from finetune.wardrobe import Wardrobe

SHELF = {one.name: one for one in load(shipped())}
DETECTOR = Detector.of(SHELF.values())
TRAINED = ("chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role")
HELD_OUT = ("zephyr", "guanaco", "mistral-v1", "openchat-3.5", "xml-tags")


# --- marks


@pytest.mark.parametrize(
    ("text", "asked_in", "found"),
    [
        ("Yes.\n\n### Instruction:\nGo on", "chatml", ("### Instruction:",)),
        ("Yes.\n\n### Instruction:\nGo on", "alpaca", ()),
        ("Yes.<|im_end|> And <|im_end|> no", "zephyr", ("<|im_end|>",)),
        ("It ends here [/INST] or [INST] there", "chatml", ("[/INST]", "[INST]")),
        ("  User: me\n**User:** you", "chatml", ("User:", "**User:**")),
        ("Ask the User: he knows. The **User:** too.", "chatml", ()),
        (f"So: {SHELF['alpaca'].default_system} Well.", "chatml", (SHELF["alpaca"].default_system,)),
        ("The end.</s>", "alpaca", ()),
        ("**The cautious one**\nUser experience matters.\n\n**Conclusion**\nUser\n", "chatml", ("User",)),
        ("", "chatml", ()),
    ],
)
def test_another_formats_scaffold_in_an_answer_is_a_leak(text: str, asked_in: str, found: tuple[str, ...]) -> None:
    assert DETECTOR.leaks(text, SHELF[asked_in]) == found


def test_every_shipped_format_is_recognised_by_its_own_rendering() -> None:
    for one in SHELF.values():
        if one.name != "raw":
            assert DETECTOR.leaks(render(PROBE, one, VOCABULARY).text), one.name
            assert DETECTOR.leaks(render(PROBE, one, VOCABULARY).text, one) == (), one.name


def test_sampled_formats_and_own_ones_are_known_when_told() -> None:
    some = list(islice(grammar.samples("marks"), 200))
    both = Detector.of([*SHELF.values(), *some])
    missed = [one for one in some if not both.leaks(render(PROBE, one, VOCABULARY).text)]
    assert not [one for one in missed if scaffold.marks(one)]
    assert len(missed) < 10  # roles of one letter


def test_what_the_author_writes_himself_is_no_leak() -> None:
    own = Detector.of(SHELF.values(), ["**Question**\nA: first\nB: second"])
    assert own.leaks("A: one\nQ: two", SHELF["chatml"]) == ("Q:",)


def test_the_next_turn_is_known_by_its_head() -> None:
    assert scaffold.turn_stops(SHELF["user-assistant-plain"]) == ("\nUser:", "\nAssistant:")
    assert scaffold.turn_stops(SHELF["mistral-v1"]) == ("[INST]",)
    assert scaffold.turn_stops(SHELF["phi-3"]) == ("<|user|>", "<|assistant|>")
    assert scaffold.turn_stops(SHELF["raw"]) == ()


# --- relations


def test_shapes_tell_families_apart_and_roles_do_not() -> None:
    shapes = {name: scaffold.shape(SHELF[name].user_prefix) for name in (*TRAINED, *HELD_OUT, "raw")}
    assert shapes["guanaco"] == scaffold.shape("### Guest: ") != shapes["alpaca"] == scaffold.shape("### Person:\n\n")
    assert shapes["vicuna-v1.1"] == shapes["user-assistant-plain"] == shapes["openchat-3.5"] == "{}:"
    assert shapes["raw"] == ""
    assert scaffold.shape("**Old Man** : ") == "**{}**:"


def test_a_format_that_only_looks_different_is_near() -> None:
    trained = [SHELF[name] for name in TRAINED]
    found = {name: scaffold.near(SHELF[name], trained) for name in (*HELD_OUT, "llama-3", "openorca-openchat", "raw")}
    assert found == {**dict.fromkeys((*HELD_OUT, "raw")), "llama-3": "chatml", "openorca-openchat": "vicuna-v1.1"}
    own = replace(SHELF["md-bold-role"], name="mine", family="mine", user_prefix=" ** user: **  ")
    assert scaffold.near(own, trained) == "md-bold-role"


# --- held-out families are never trained on


def normal(fmt: Format) -> str:
    """What a client sends, without white space and case."""
    return "".join(grammar.sends(fmt).split()).casefold()


def closet(trained: tuple[str, ...] = TRAINED, held_out: tuple[str, ...] = HELD_OUT) -> Wardrobe:
    wanted = recipe.Formats(train=trained, held_out=held_out, sampled=1.0)
    return wardrobe(1.0, formats=wanted, known={name: SHELF[name] for name in (*trained, *held_out)})


def near_renderings(fmt: Format) -> set[str]:
    """The format, its slips and its roles in other letters, seen without white space and case."""
    slips = [slip for name in grammar.SLIPS if (slip := grammar.slipped(fmt, name))]
    return {normal(one) for one in (fmt, *slips)}


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [
        (TRAINED, HELD_OUT),
        (("chatml", "zephyr"), ("guanaco", "md-bold-role", "md-h1-question", "user-assistant-plain")),
        (("mistral-v1",), ("alpaca", "vicuna-v0", "yaml-turns", "question-answer")),
    ],
)
def test_no_draw_is_of_a_held_out_family(trained: tuple[str, ...], held_out: tuple[str, ...]) -> None:
    """Neither the same rendering but for white space and case, nor roles that stand as only held-out ones stand."""
    worn = closet(trained, held_out)
    drawn = [grammar.named(name) for epoch in range(60) for one in worn.examples for name in worn.worn(epoch, one)]
    assert len({one.name for one in drawn}) > 600
    out = [SHELF[name] for name in held_out]
    assert not {normal(one) for one in drawn} & {text for one in out for text in near_renderings(one)}
    assert not {scaffold.head(one) for one in drawn} & {scaffold.head(one) for one in out}
    shapes = [{scaffold.shape(SHELF[name].user_prefix) for name in side} for side in (trained, held_out)]
    assert not {scaffold.shape(one.user_prefix) for one in drawn} & (shapes[1] - shapes[0])


def test_the_grammar_would_draw_them_if_it_were_let() -> None:
    """So the test above can fail: among free draws there are hash-colon heads, and the very heads of guanaco."""
    free = list(islice(grammar.samples("free"), 20_000))
    assert sum(scaffold.shape(one.user_prefix) == "###{}:" for one in free) > 50
    assert any(scaffold.head(one) == scaffold.head(SHELF["guanaco"]) for one in free)
