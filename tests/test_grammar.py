"""Formats nobody listed: many, sound, found again by name, and worn in training as if they had been listed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import yaml
from test_masks import EACH, TALK, VOCABULARIES, example, sent, trained_text
from test_night import again, assert_same_end, run

from finetune import grammar, night, plan, recipe, runs
from finetune.conversation import Conversation, Turn
from finetune.errors import UserError
from finetune.format import Format
from finetune.grammar import SLIPS, sample, whitespace_twins
from finetune.masks import Vocabulary, encode
from finetune.model import POCKET
from finetune.prompts import NATIVE, PROBE, load, prompt_text, prove, remarks, render, render_prompt, shipped
from finetune.runs import RunFolder
from finetune.shelf import nonsense
from finetune.wardrobe import Wardrobe, dressed

SYSTEM = Turn("system", "You are a helpful assistant.")
MANY = [sample("test", number) for number in range(12_000)]
FEW = MANY[:200]
SHELF = load(shipped())
NAMES = ("chatml", "alpaca", "md-bold-role")
VOCABULARY = VOCABULARIES["byte-level", False]


def texts(fmt: Format, system: bool = False) -> tuple[str, str]:
    """The probe after one exchange and after two."""
    told = (SYSTEM,) if system else ()
    one, two = (replace(PROBE, turns=told + turns) for turns in (PROBE.turns[:2], PROBE.turns))
    return render(one, fmt, VOCABULARY).text, render(two, fmt, VOCABULARY).text


# --- the grammar


def test_ten_thousand_distinct() -> None:
    assert len({one.name for one in MANY}) > 10_000
    assert len({texts(one)[1] for one in MANY}) > 10_000
    assert len({prompt_text(PROBE.turns[:1], one) for one in MANY}) > 10_000


def test_no_sampled_format_equals_a_shipped_one() -> None:
    for system in (False, True):
        known = {text for one in SHELF for text in texts(one, system)}
        assert not any(known.intersection(texts(one, system)) for one in MANY[:4000])
    asked = {prompt_text(PROBE.turns[:1], one).rstrip() for one in SHELF}
    assert not asked.intersection(prompt_text(PROBE.turns[:1], one).rstrip() for one in MANY)


def test_a_draw_that_hits_a_shipped_format_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar.named.cache_clear()
    monkeypatch.setattr(grammar, "_shipped", lambda: frozenset({grammar.sends(FEW[0])}))
    other = grammar.named(FEW[0].name)
    grammar.named.cache_clear()
    assert (other.name, grammar.sends(other)) != (FEW[0].name, grammar.sends(FEW[0]))
    assert other.name == FEW[0].name


def test_a_sampled_format_is_loaded_back_by_its_name() -> None:
    grammar.named.cache_clear()
    assert list(load([one.name for one in FEW])) == FEW
    with pytest.raises(UserError, match=r"sampled:xyz is not a sampled format\.  Write six hex digits"):
        load(["sampled:xyz"])


def test_what_a_name_means_is_pinned() -> None:
    """It changes only if every run that wears sampled formats and could be gone on with changes with it."""
    assert [one.name for one in MANY[:3]] == ["sampled:2ff666", "sampled:9ba7f3", "sampled:8c6fb9"]
    sent = [prompt_text((Turn("user", "Q"), Turn("assistant", "A"), Turn("user", "R")), one) for one in MANY[:3]]
    assert sent == [
        "__Request:__  Q\n\n__Reply:__  A\n\n***\n\n__Request:__  R\n\n__Reply:__",
        "== Visitor ==: Q\n\n---\n\n== Guide ==: A\n\n---\n\n== Visitor ==: R\n\n---\n\n== Guide ==:",
        "[**interviewer**] >> Q\n[**interviewee**] >> A\n\n[**interviewer**] >> R\n[**interviewee**] >>",
    ]


def test_every_sampled_format_is_a_sound_one() -> None:
    for one in MANY:
        kept = replace(one, name="kept")
        assert list(nonsense(kept)) == []
        assert remarks(one) == []
        assert not one.generation_prompt.endswith(" ")
        (stop,) = one.stop_strings
        after = one.assistant_suffix + one.user_prefix
        assert stop in after, one
        assert len(stop) > 2, one
        assert one.system_mode != "none"
    around, told = grammar.widest()
    for one in MANY:
        assert len((one.user_prefix + one.user_suffix + one.assistant_prefix + one.assistant_suffix).encode()) <= around
        assert len((one.system_prefix + one.system_suffix).encode()) <= told


@EACH
def test_every_sampled_format_proves_its_stop_token(key: tuple[str, bool]) -> None:
    for one in FEW:
        assert prove(one, VOCABULARIES[key]) == [], one
        tokens = encode(render(PROBE, one, VOCABULARIES[key]), VOCABULARIES[key])
        assert tokens.ids[-1] == VOCABULARIES[key].eos_id
        assert tokens.trained[-1]


@EACH
def test_prompt_ids_of_sampled_formats_equal_the_ids_a_client_sends(key: tuple[str, bool]) -> None:
    vocabulary = VOCABULARIES[key]
    for number, one in enumerate(FEW):
        turns = ((SYSTEM,) if number % 2 else ()) + (TALK[:2] if number % 3 else TALK)
        tokens = encode(render(example(*turns), one, vocabulary), vocabulary)
        assert list(tokens.ids[: tokens.prompt]) == sent(key, prompt_text(turns[:-1], one, vocabulary)), one
        assert encode(render_prompt(turns[:-1], one, vocabulary), vocabulary).ids == tokens.ids[: tokens.prompt]


# --- slips


def test_whitespace_twins_differ_from_everything() -> None:
    for system in (False, True):
        known = {text for one in SHELF for text in texts(one, system)}
        for one in (*SHELF, *FEW[:20]):
            found = whitespace_twins(one, SYSTEM.text if system else "")
            assert len({texts(twin, system) for twin in found}) == len(found)
            for twin in found:
                assert not (known | set(texts(one, system))).intersection(texts(twin, system)), twin.name


def test_every_slip_is_made_and_loaded_back_by_name() -> None:
    made = {twin.name: twin for one in SHELF for twin in whitespace_twins(one, "SYS")}
    assert {name.partition("~")[2] for name in made} == set(SLIPS)
    assert list(load(list(made))) == list(made.values())
    assert prompt_text(PROBE.turns[:1], made["alpaca~lower-roles"]).endswith(
        "### instruction:\nIs it raining?\n\n### response:\n"
    )
    assert made["alpaca~lower-roles"].stop_strings == ("### instruction:", "\n###")
    assert prompt_text(PROBE.turns[:1], made["chatml~blank-line"]).endswith("?<|im_end|>\n\n<|im_start|>assistant\n")
    assert prompt_text(PROBE.turns[:1], made["user-assistant-plain~doubled-space"]).startswith("User:  Is")
    assert prompt_text((SYSTEM, PROBE.turns[0]), made["chatml~no-system"]).startswith("<|im_start|>user")
    for twin in made.values():
        assert list(nonsense(replace(twin, name="kept"))) == [], twin.name
        assert prove(twin, VOCABULARY) == [], twin.name


def test_a_slip_that_changes_nothing_is_no_format() -> None:
    with pytest.raises(UserError, match="chatml has nothing that lower-roles could change"):
        load(["chatml~lower-roles"])
    with pytest.raises(UserError, match="chatml~typo is not a prompt format"):
        load(["chatml~typo"])
    assert whitespace_twins(NATIVE, "SYS") == []


def test_a_slip_of_ones_own_format_is_found_by_its_path(tmp_path: Path) -> None:
    keys = {"name": "mine", "family": "home", "user_prefix": "Q> ", "user_suffix": "\n", "assistant_prefix": "A> "}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**keys, "assistant_suffix": "\n", "generation_prompt": "A> "}))
    twin, mine = load(["mine.yaml~lower-roles", "mine.yaml"], tmp_path)
    assert (twin.name, prompt_text(PROBE.turns[:1], twin)) == ("mine~lower-roles", "q> Is it raining?\na> ")
    assert [remark.partition(",")[0] for remark in remarks(mine)] == ["format mine: the prompt ends in a space"]


# --- two formats that end in a space because their source does


def test_prompts_that_end_in_a_space_are_remarked_on_and_not_refused() -> None:
    assert [one.name for one in SHELF if remarks(one)] == ["llama-2-chat", "openorca-openchat", "yaml-turns"]
    assert remarks(NATIVE) == []


@EACH
def test_yaml_turns_is_yaml_and_its_answers_are_trained(key: tuple[str, bool]) -> None:
    (one,) = load(["yaml-turns"])
    texts = (
        "Be kind.\n\nAlways.",
        "Rain?\n  Look",
        "A little.\n\n**One**\n- two:\n\n\n  three",
        "And now?",
        "No.\n- one\n\n- two",
    )
    roles = ("system", "user", "assistant", "user", "assistant")
    turns = [Turn(role, text) for role, text in zip(roles, texts, strict=True)]  # type: ignore[arg-type]
    rendered = render(example(*turns), one, VOCABULARIES[key])
    told = [row for turn in yaml.safe_load(rendered.text.removesuffix("</s>")) for row in turn.items()]
    assert [(role, text.rstrip("\n")) for role, text in told] == list(zip(roles, texts, strict=True))
    first, last = "A little.\n\n    **One**\n    - two:\n\n\n      three\n-", "No.\n    - one\n\n    - two</s>"
    trained = trained_text(rendered, encode(rendered, VOCABULARIES[key]))
    # in a history the last space of the indent and the first word may be one token, as a client's are: not trained
    assert trained in (first + last, first.removeprefix("A") + last)


# --- worn in training


def wardrobe(share: float = 0.3, max_tokens: int = 2000, **changes: Any) -> Wardrobe:
    """Twelve small examples in three formats."""
    examples = {f"e{i}": Conversation(f"e{i}", TALK[: 2 + 2 * (i % 2)], PROBE.origin) for i in range(12)}
    known = dict(zip((*NAMES, "guanaco"), load((*NAMES, "guanaco")), strict=True))
    items = {(k, name): dressed(one, name, known[name], VOCABULARY) for k, one in examples.items() for name in NAMES}
    wanted = recipe.Formats(train=NAMES, held_out=("guanaco",), sampled=share)
    return replace(Wardrobe(wanted, known, examples, items, VOCABULARY, 0, None, max_tokens), **changes)


def test_sampled_draws_are_a_pure_function_and_keep_their_share() -> None:
    one, other = wardrobe(), wardrobe()
    other.worn(7, "e3")
    rows = {(epoch, name): one.worn(epoch, name) for epoch in range(300) for name in one.examples}
    assert all(other.worn(*key) == worn for key, worn in list(rows.items())[:600])
    drawn = [name for (name,) in rows.values() if name.startswith(grammar.PREFIX)]
    assert len(drawn) / len(rows) == pytest.approx(0.3, abs=0.025)
    assert len(set(drawn)) > 0.99 * len(drawn)
    assert wardrobe(seed=1).worn(0, "e0") != one.worn(0, "e0") or wardrobe(seed=1).worn(1, "e0") != one.worn(1, "e0")
    for epoch, name in list(rows)[:200]:
        (worn,) = rows[epoch, name]
        assert (
            one.item(name, worn)
            == other.item(name, worn)
            == dressed(one.examples[name], worn, *load([worn]), VOCABULARY)
        )


def test_without_a_share_nothing_is_sampled_and_the_old_draw_stands() -> None:
    worn = wardrobe(0.0)
    assert {name for epoch in range(30) for one in worn.examples for name in worn.worn(epoch, one)} == set(NAMES)
    assert worn.longest() == 0
    assert all(len(worn.worn(epoch, "e1")) == 1 for epoch in range(30))
    assert all(wardrobe(1.0).worn(epoch, "e1")[0].startswith("sampled:") for epoch in range(30))


def test_no_draw_looks_like_the_recipes_own_formats_or_cuts_an_answer() -> None:
    first = wardrobe(1.0).sampled(0, "e0")
    for known in ({"mine": first}, {"mine": replace(first, user_suffix="\n\n\n\n")}):
        wanted = recipe.Formats(train=NAMES, held_out=("mine",), sampled=1.0)
        other = wardrobe(1.0, formats=wanted, known=known).sampled(0, "e0")
        assert other.user_prefix != first.user_prefix
    own = "".join(f"{{{{ {json.dumps(text)} }}}}" for text in (first.user_prefix, "Q", first.user_suffix))
    own = own.replace('"Q"', "messages[0].content") + f"{{{{ {json.dumps(first.generation_prompt)} }}}}"
    vocabulary = Vocabulary.of(VOCABULARY.tokenizer, "<s>", "</s>", own)
    for taken, told in ((True, vocabulary), (False, VOCABULARY)):  # the base's own template; a base without one
        other = wardrobe(1.0, known={"native": NATIVE}, vocabulary=told, formats=wanted).sampled(0, "e0")
        assert (other != first) is taken
    answer = Turn("assistant", f"So it goes:{first.stop_strings[0]} and on")
    talk = Conversation("e0", (TALK[0], answer), PROBE.origin)
    assert wardrobe(1.0, examples={"e0": talk}).sampled(0, "e0") != first


def test_goldfish_thins_sampled_texts_too() -> None:
    (name,) = wardrobe(1.0).worn(0, "e0")
    whole, thin = (wardrobe(1.0, goldfish=k).item("e0", name) for k in (None, 2))
    assert thin.ids == whole.ids
    assert thin.supervised < whole.supervised


def test_no_sampled_text_is_longer_than_the_bound_says() -> None:
    for key in VOCABULARIES:
        closet = wardrobe(1.0, vocabulary=VOCABULARIES[key])
        told = {
            k: dressed(one, "chatml", closet.known["chatml"], VOCABULARIES[key]) for k, one in closet.examples.items()
        }
        closet = replace(closet, items={(k, "chatml"): made for k, made in told.items()})
        for example_ in ("e0", "e1"):
            lengths = [len(closet.item(example_, *closet.worn(epoch, example_)).ids) for epoch in range(40)]
            assert max(lengths) <= closet._bound(example_) <= len(told[example_].ids) + 200


def test_a_sampled_text_over_the_limit_is_refused_by_name_not_cut() -> None:
    closet = wardrobe(0.3)
    lengths = {name: len(made.ids) for (name, format_), made in closet.items.items() if format_ == "chatml"}
    limit = max(lengths.values())
    tight = wardrobe(0.3, max_tokens=limit)
    sampled = {name: one for epoch in range(80) for one in closet.examples for name in closet.worn(epoch, one)}
    longest = max(len(closet.item(one, name).ids) for name, one in sampled.items() if name.startswith("sampled:"))
    found = list(tight.problems(80))
    assert bool(found) == (longest > limit)
    assert list(wardrobe(0.3, max_tokens=longest).problems(80)) == []
    short = list(wardrobe(0.3, max_tokens=longest - 1).problems(80))
    assert len(short) >= 1
    assert f"more than data.max_tokens {longest - 1}" in short[0].what
    assert "tokens in sampled:" in short[0].what


def test_a_base_that_cannot_end_them_is_refused() -> None:
    mute = Vocabulary.of(VOCABULARY.tokenizer, "<s>", None)
    (problem,) = wardrobe(0.3, vocabulary=mute).problems(3)
    assert "nothing ends an answer" in problem.what
    assert problem.key == ("formats", "sampled")
    assert list(wardrobe(0.0, vocabulary=mute).problems(3)) == []


# --- in a run


def test_sampled_formats_and_all_formats_are_no_pair(tmp_path: Path) -> None:
    path = small.recipe(tmp_path, formats={"sampled": 0.2, "draw": "all"})
    with pytest.raises(UserError, match=r"formats\.sampled is 0\.2, which draw: all leaves no place for"):
        recipe.load(path)


def test_a_plan_wears_what_the_recipe_says(tmp_path: Path) -> None:
    made = plan.make(recipe.load(small.recipe(tmp_path, formats={"sampled": 0.5})), POCKET)
    worn = [row.format for epoch in range(20) for row in made.epochs.order(epoch)]
    assert 0.3 < sum(name.startswith("sampled:") for name in worn) / len(worn) < 0.7
    assert {name for name in worn if not name.startswith("sampled:")} == {"chatml", "alpaca"}
    assert made.longest() >= max(len(row.ids) for epoch in range(20) for row in made.epochs.order(epoch))
    limit = max(len(row.ids) for (_, _), row in made.texts.trained.items())
    assert limit <= made.longest() <= made.recipe.data.max_tokens


def test_a_run_with_sampled_formats_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"formats": {"sampled": 0.5}, "epochs": 2, "quantization": "none"}
    alone = run(small.recipe(tmp_path / "b", **changes), tmp_path / "alone")
    real = night.Vigil.step

    def step_and_ask(self: Any, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == 2:
            night.signal.raise_signal(night.signal.SIGINT)

    monkeypatch.setattr(night.Vigil, "step", step_and_ask)
    path = small.recipe(tmp_path, **changes)
    assert run(path, tmp_path / "run").interrupted
    assert RunFolder(tmp_path / "run").newest_valid(full=True).step == 2
    made = plan.make(recipe.load(path), POCKET)
    worn = [[row.format.startswith("sampled:") for row in made.epochs.order(epoch)] for epoch in range(2)]
    assert any(worn[0][4:])
    assert any(worn[1])
    monkeypatch.setattr(night.Vigil, "step", real)
    again(tmp_path / "run")
    assert_same_end(alone.folder, tmp_path / "run")
    assert runs.read_json(RunFolder(tmp_path / "run").run_json)["state"] == "finished"
