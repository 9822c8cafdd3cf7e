"""What is measured: each format once, strangers apart from relations, nothing sampled that was trained, all in turn."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import paper
import pytest
import small

from finetune import grammar, lineup, plan, recipe, starters
from finetune.errors import UserError
from finetune.lineup import Recipe
from finetune.masks import Vocabulary
from finetune.prompts import NATIVE, PROBE, load, prompt_text

SUITE = lineup.suite()
RECIPE = Recipe(
    load(("chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role")),
    load(("zephyr", "guanaco", "mistral-v1", "openchat-3.5", "xml-tags")),
    system="Be kind.",
)
WHOLE = lineup.whole(RECIPE, SUITE)


def test_every_format_is_measured_once_and_every_prompt_side_of_strangers_too() -> None:
    assert max(Counter(one.name for one in WHOLE).values()) == 1
    prompts = [prompt_text(PROBE.turns[:1], one.format).rstrip() for one in WHOLE if one.group != "slip"]
    assert [text for text, count in Counter(prompts).items() if count > 1] == []
    assert len({grammar.sends(one.format) for one in WHOLE if one.group == "sampled"}) == SUITE.sampled


def test_the_shipped_recipe_is_measured_in_fifteen_prompt_sides_of_five_untouched_families() -> None:
    strangers = [one for one in WHOLE if one.group == "held_out"]
    assert len({one.family for one in strangers}) >= 5
    assert len({lineup.side(one.format) for one in strangers}) == len(strangers) >= 15
    groups = Counter(one.group for one in WHOLE)
    assert groups["sampled"] == SUITE.sampled >= 40
    assert groups["slip"] >= 10
    assert groups["near"] >= 5


def test_relations_of_trained_formats_are_no_strangers() -> None:
    groups = {one.name: (one.group, one.of) for one in WHOLE}
    assert groups["zephyr"] == ("held_out", "")
    assert groups["llama-3"] == ("near", "chatml")
    assert groups["openorca-openchat"] == ("near", "vicuna-v1.1")  # asks with `User:`, whatever its family
    assert groups["chatml~blank-line"] == ("slip", "chatml")
    assert groups["chatml~no-system"] == ("slip", "chatml")
    slips = [one.format for one in lineup.strange(Recipe(RECIPE.trained, ()), SUITE) if one.group == "slip"]
    assert "chatml~no-system" not in {one.name for one in slips}  # nobody would see it


def test_what_was_worn_in_training_is_not_measured_as_new() -> None:
    sampled = [one.name for one in WHOLE if one.group == "sampled"]
    worn = Recipe(RECIPE.trained, RECIPE.held_out, worn=frozenset(sampled[:10]))
    again = [one for one in lineup.whole(worn, SUITE) if one.group == "sampled"]
    sent = {grammar.sends(grammar.named(name)) for name in sampled[:10]}
    assert sent.isdisjoint(grammar.sends(one.format) for one in again)  # under no other name either
    assert len(again) == len(sampled)


@pytest.mark.parametrize("side", ["trained", "held_out"])
def test_a_slip_that_the_recipe_lists_is_not_strange(side: str) -> None:
    listed = load(("chatml~blank-line",))
    renamed = tuple(replace(one, name="mine") for one in load(("alpaca~doubled-space",)))
    sides = {"trained": (*load(("chatml", "alpaca")),), "held_out": ()}
    sides[side] = (*sides[side], *listed, *renamed)
    strange = [one.name for one in lineup.strange(Recipe(**sides), SUITE) if one.group == "slip"]
    assert {"chatml~no-newline", "alpaca~blank-line"} <= set(strange)
    assert not {"chatml~blank-line", "alpaca~doubled-space"} & set(strange)


def test_an_own_format_is_measured_once_and_told_apart() -> None:
    (mine,) = islice(grammar.samples("mine"), 1)
    found = lineup.whole(Recipe(RECIPE.trained, (), own=(mine, RECIPE.trained[0])), SUITE)
    assert [one.name for one in found if one.group == "own"] == [mine.name]
    assert lineup.whole(Recipe((NATIVE,), ()), SUITE)[0].group == "trained"


@pytest.mark.parametrize(("count", "formats"), [(15, 57), (10, 20), (3, 1), (4, 0), (12, 12)])
def test_rotation_meets_all_formats_in_turn(count: int, formats: int) -> None:
    ids, names = [f"e{i}" for i in range(count)], [f"f{i}" for i in range(formats)]
    seen: Counter[str] = Counter(dict.fromkeys(names, 0))
    pairs: Counter[tuple[str, str]] = Counter()
    for look in range(40):
        found = lineup.rotation(0, look, ids, names)
        assert found == lineup.rotation(0, look, ids, names)
        assert [*found] == ids
        assert {len(met) for met in found.values()} == {min(2, formats)}
        assert all(len(set(met)) == len(met) for met in found.values())
        seen.update(name for met in found.values() for name in met)
        pairs.update((name, met) for name, some in found.items() for met in some)
        assert max(seen.values(), default=0) - min(seen.values(), default=0) <= 1
    if formats > 2:
        assert max(pairs.values()) < 20 * min(2, formats)  # no example keeps to one format
        assert lineup.rotation(1, 0, ids, names) != lineup.rotation(0, 0, ids, names)


def test_a_suite_with_faults_names_every_line(tmp_path: Path) -> None:
    text = starters.find("formats", "suites").read_text().replace("- metharme", "- metharm")
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml:9  metharm is not a prompt format\.  Did you mean metharme\?"):
        lineup.suite(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text(text.replace("early: 0.25", "early: 2").replace("each: 2", "eech: 2"))
    with pytest.raises(UserError) as told:
        lineup.suite(tmp_path / "b.yaml")
    assert {one.what.partition(":")[0] for one in told.value.problems} == {"early", "each", "eech"}


# --- planted faults


PLANTED = {
    "a space after the generation prompt": ('generation_prompt: "A>"', 'generation_prompt: "A> "', "ends in a space"),
    "a doubled BOS": ('user_prefix: "Q> "', 'user_prefix: "<s><s>Q> "', "two BOS begin the text"),
    "a relation": ('user_prefix: "Q> "', 'user_prefix: "<|im_start|> USER\\n"', "near relation of the trained chatml"),
}


@pytest.mark.parametrize("side", ["train", "held_out"])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_of_an_own_format_is_told_by_name(tmp_path: Path, fault: str, side: str) -> None:
    """Refused or remarked on, wherever the format is listed; nothing is said of the sound one."""
    old, new, told = PLANTED[fault]
    sound = (
        'name: mine\nfamily: mine\nuser_prefix: "Q> "\nuser_suffix: "\\n"\nassistant_prefix: "A> "\n'
        'generation_prompt: "A>"\nassistant_suffix: "\\n"\nend: ""\nstop_strings: ["\\nQ>"]\n'
    )
    vocabulary = paper_vocabulary(tmp_path)
    for text, wanted in ((sound, False), (sound.replace(old, new), fault != "a relation" or side == "held_out")):
        names = {"train": ["chatml", "alpaca"], "held_out": ["zephyr"]}
        file = tmp_path / f"{len(text)}.yaml"  # a file is read once
        file.write_text(text)
        names[side].append(str(file))
        found = plan.gather(recipe.load(small.recipe(tmp_path, 4, formats=names)), vocabulary, plan.Source())
        said = [one.what for one in (*found.problems, *found.warnings)]
        assert any(told in one for one in said) is wanted, said


def test_a_format_that_nothing_ends_is_refused_on_both_sides(tmp_path: Path) -> None:
    mute = Vocabulary.of(paper_vocabulary(tmp_path).tokenizer, "<s>", None)
    found = plan.gather(recipe.load(small.recipe(tmp_path, 4, formats={"held_out": ["tulu"]})), mute, plan.Source())
    assert {one.what.split(":")[0] for one in found.problems if "nothing ends an answer" in one.what} == {
        "format alpaca",
        "format tulu",
    }


def paper_vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary.load(paper.base(folder / "base"))
