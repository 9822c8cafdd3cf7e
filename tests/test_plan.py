"""All that is wrong is told before a model is loaded; all that is planned has a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small

from finetune import corpus, estimate, model, plan, recipe
from finetune.errors import UserError
from finetune.plan import Plan


def made(path: Path, **more: Any) -> Plan:
    return plan.make(recipe.load(path), model.POCKET, **more)


def told(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        made(path)
    return [str(problem) for problem in caught.value.problems]


# --- what is refused


def test_long_example_is_refused_not_cut(tmp_path: Path) -> None:
    path = small.recipe(tmp_path, data={"train": str(small.dataset(tmp_path / "examples")), "max_tokens": 16})
    problems = told(path)
    assert len(problems) == 8
    line = next(line for line in problems if "rain has" in line)
    assert line.startswith(str(tmp_path / "examples" / "rain.md"))
    assert "more than data.max_tokens 16.  Shorten it, or raise data.max_tokens." in line


def made_longest(tmp_path: Path) -> int:
    """Tokens of the longest text, trained or held out, in any format it is met in."""
    texts = made(small.recipe(tmp_path)).texts
    return max(len(item.ids) for item in (*texts.trained.values(), *texts.held_out.values()))


def test_an_example_of_just_the_limit_is_taken_and_one_token_less_refuses_it(tmp_path: Path) -> None:
    limit, examples = made_longest(tmp_path), str(tmp_path / "examples")
    made(small.recipe(tmp_path, data={"train": examples, "max_tokens": limit}))
    problems = told(small.recipe(tmp_path, data={"train": examples, "max_tokens": limit - 1}))
    assert f"has {limit} tokens" in problems[0]


def test_a_stop_string_in_an_answer_is_refused(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    example = tmp_path / "examples" / "snow.md"
    example.write_text(example.read_text().replace("I can play", "<|im_end|> I can play"))
    (problem,) = told(path)
    assert problem.startswith(f"{example}:")
    assert "<|im_end|>" in problem
    assert "chatml" in problem


def test_a_stop_string_of_a_format_that_is_not_trained_is_no_fault(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    example = tmp_path / "examples" / "snow.md"
    example.write_text(example.read_text().replace("I can play", "</tool_call> I can play"))
    made(path)


def test_held_out_formats_that_render_alike_are_refused(tmp_path: Path) -> None:
    shelf = Path(plan.prompts.SHELF)
    twin = tmp_path / "mine.yaml"
    twin.write_text((shelf / "chatml.yaml").read_text().replace("name: chatml", "name: mine", 1))
    (problem,) = told(small.recipe(tmp_path, formats={"held_out": [str(twin)]}))
    assert "renders exactly like the trained chatml" in problem
    assert "Hold out another" in problem


def test_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    (problem,) = told(small.recipe(tmp_path, formats={"train": ["chatlm"]}))
    assert "chatlm is not a prompt format" in problem
    assert "Did you mean chatml?" in problem


def test_all_faults_of_a_dataset_are_told_at_once(tmp_path: Path) -> None:
    path = small.recipe(tmp_path, formats={"train": ["chatml", "alpacca"]})
    folder = tmp_path / "examples"
    (folder / "empty.md").write_text("")
    (folder / "mute.md").write_text("## user\nAnd?\n")
    (folder / "rain.md").write_text((folder / "rain.md").read_text() + "## assistant\nTwice.\n")
    problems = told(path)
    for wanted in ("empty.md", "mute.md", "rain.md", "alpacca is not a prompt format"):
        assert any(wanted in problem for problem in problems), wanted
    assert len(problems) == len(set(problems))


def test_two_examples_of_one_id_are_refused(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    other = tmp_path / "examples" / "other.md"
    other.write_text("---\nid: rain\n---\n## user\nAnd hail?\n## assistant\n### conclusion\nNever.\n")
    assert any("rain" in problem and "id" in problem for problem in told(path))


def test_too_few_examples_to_hold_any_out_are_refused_or_all_trained(tmp_path: Path) -> None:
    data = {"train": str(small.dataset(tmp_path / "examples", 2)), "held_out": 0}
    found = made(small.recipe(tmp_path, 2, data=data))
    assert len(found.split.train) == 2
    assert found.split.held_out == ()


# --- what is held out


def test_a_held_out_path_is_never_trained(tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    for name in ("moon", "star"):
        text = (
            f"---\nid: {name}\n---\n## user\nIs the {name} far?\n## assistant\n### conclusion\nFurther than it looks.\n"
        )
        (aside / f"{name}.md").write_text(text)
    data = {"train": str(small.dataset(tmp_path / "examples")), "held_out": str(aside)}
    found = made(small.recipe(tmp_path, data=data))
    assert set(found.split.held_out) == {"moon", "star"}
    trained = {item.example for epoch in range(4) for item in found.epochs.order(epoch)}
    assert trained == set(small.WEATHER[:8])
    assert {item.example for group in found.groups(True) if group.split == "held_out" for item in group.items} == {
        "moon",
        "star",
    }


def test_a_twin_is_measured_and_never_trained(tmp_path: Path) -> None:
    found = made(small.recipe(tmp_path))
    decoded = [
        found.vocabulary.tokenizer.decode(list(item.ids)) for epoch in range(4) for item in found.epochs.order(epoch)
    ]
    assert not any("Do you enjoy" in text for text in decoded)
    twins = next(group for group in found.groups(True) if group.split == "twin")
    assert all("Do you enjoy" in found.vocabulary.tokenizer.decode(list(item.ids)) for item in twins.items)


def test_a_recorded_split_is_kept(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    first = made(path)
    ids = sorted((*first.split.train, *first.split.held_out))
    given = corpus.Split(tuple(ids[2:]), tuple(ids[:2]), {}, 0)
    assert made(path, split=given).split == given
    assert made(path, everything=True).split.held_out == ()


def test_a_recorded_example_that_is_gone_is_refused(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    split = replace(made(path).split, held_out=("moon",))
    with pytest.raises(UserError, match="moon is no longer there"):
        made(path, split=split)


# --- what is planned


def test_planned_numbers_are_those_of_the_recipe(tmp_path: Path) -> None:
    found = made(small.recipe(tmp_path, optimizer={"learning_rate": 1e-3, "schedule": "cosine"}))
    assert (found.length.per_epoch, found.length.total) == (3, 12)  # six texts, two a step, four epochs
    assert found.travel == pytest.approx(estimate.travel(1e-3, "cosine", found.length))
    assert [len(packs) for packs in found.micro_batches(0)] == [1, 1, 1]
    assert found.looks == estimate.Looks((), (2, 4), "every 2 epochs, as the recipe says")
    auto = made(small.recipe(tmp_path, epochs=200, watch={"every": "auto", "budget": 0.1})).looks
    assert "% of the work of training" in auto.reason
    assert auto.full[-1] == 200


def test_a_plan_of_the_same_recipe_is_the_same(tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    one, other = made(path), made(path)
    assert one.split == other.split
    assert [one.epochs.order(e) for e in range(4)] == [other.epochs.order(e) for e in range(4)]


def test_more_epochs_change_no_earlier_one(tmp_path: Path) -> None:
    short, long = made(small.recipe(tmp_path)), made(small.recipe(tmp_path, epochs=40))
    assert [short.epochs.order(e) for e in range(4)] == [long.epochs.order(e) for e in range(4)]


def test_a_full_look_reads_every_format_and_a_light_one_the_first(tmp_path: Path) -> None:
    found = made(small.recipe(tmp_path))
    assert [(g.split, g.format) for g in found.groups(False)] == [("held_out", "chatml")]
    full = {(g.split, g.format) for g in found.groups(True)}
    held = {("held_out", name) for name in ("chatml", "alpaca", "zephyr")}
    assert full == held | {("train", "chatml"), ("twin", "chatml")}
    assert not any("sampled" in name or "~" in name for _, name in full)
    group = found.groups(False)[0]
    assert group.size == sum(len(found.conversations[item.example].answer.encode()) for item in group.items)


# --- replay


def with_replay(folder: Path, path: Path, **data: Any) -> Path:
    train = str(small.dataset(folder / "examples"))
    return small.recipe(
        folder, data={"train": train, "held_out": 0.25, "replay": {"path": str(path), "share": 0.3}, **data}
    )


def test_replay_texts_are_whole_files_and_rows(tmp_path: Path) -> None:
    general = tmp_path / "general"
    general.mkdir()
    (general / "a.txt").write_text("The old clock struck nine.\n\nNobody came.\n")
    (general / "b.jsonl").write_text(json.dumps({"text": "A row."}) + "\n\n" + json.dumps({"text": " "}) + "\n")
    (general / "notes.md").write_text("not read")
    found = made(with_replay(tmp_path, general))
    assert [item.example for item in found.texts.replay] == ["a.txt:1", "b.jsonl:1"]
    first = found.texts.replay[0]
    words = found.vocabulary
    assert (first.ids[0], first.ids[-1]) == (words.bos_id, words.eos_id)
    assert words.tokenizer.decode(list(first.ids[1:-1])) == "The old clock struck nine.\n\nNobody came.\n"
    assert first.trained == (False, *(True,) * (len(first.ids) - 1))


def test_replay_texts_that_cannot_be_used_are_all_told(tmp_path: Path) -> None:
    general = tmp_path / "general"
    general.mkdir()
    (general / "a.txt").write_bytes(b"\xff\xfe\x00broken\xff")
    (general / "b.jsonl").write_text(json.dumps({"text": "word " * 400}) + '\n{"words": 1}\n')
    problems = told(with_replay(tmp_path, general, max_tokens=128))
    assert any(problem.startswith(f"{general / 'a.txt'}  cannot be read") for problem in problems)
    assert any(f"{general / 'b.jsonl'}:1  a replayed text has" in problem for problem in problems)
    assert any(f"{general / 'b.jsonl'}:2  this is no row with `text`" in problem for problem in problems)


@pytest.mark.parametrize("row", ['{"text": null}', '{"text": 3}', '["text"]', '"text"', "7"])
def test_a_replayed_row_without_text_is_told(tmp_path: Path, row: str) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text(json.dumps({"text": "A row."}) + "\n" + row + "\n")
    assert told(with_replay(tmp_path, general)) == [
        f'{general}:2  this is no row with `text`.  Write {{"text": "..."}}.'
    ]


def test_a_row_is_a_line_whatever_its_text_holds(tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    general.write_text('{"text": "One.\u2028Two.\x85Three."}\r\n{"text": "Four."}\n', encoding="utf-8")
    found = made(with_replay(tmp_path, general))
    assert [item.example for item in found.texts.replay] == ["general.jsonl:1", "general.jsonl:2"]


def test_a_replay_folder_without_texts_is_told(tmp_path: Path) -> None:
    general = tmp_path / "general"
    general.mkdir()
    (problem,) = told(with_replay(tmp_path, general))
    assert "holds no .txt or .jsonl" in problem


# --- what it costs


def test_the_plan_does_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from finetune import plan, recipe, orders\n"
        "plan.make(recipe.load(sys.argv[1]), Path(sys.argv[2]))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, str(small.recipe(tmp_path)), str(model.POCKET)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout == "[]\n"
