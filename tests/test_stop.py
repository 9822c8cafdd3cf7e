"""A run that begins to recite is looked at, judged, stopped, and leaves its healthiest adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import small
from rich.console import Console

from finetune import corpus, night, orders, runs
from finetune.errors import UserError
from finetune.runs import RunFolder
from finetune.screen import Screen

EPOCHS = 40


def screen() -> tuple[Screen, io.StringIO]:
    told = io.StringIO()
    return Screen(Console(file=told, width=200)), told


def go(*words: Any, **more: Any) -> night.Outcome:
    return night.run(orders.read(orders.Order(*words, **more)), screen()[0], save_every=1e9, page=False)


@pytest.fixture(scope="module")
def reciting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, night.Outcome, str]:
    """Nine examples at a learning rate that knows them by heart in a few epochs."""
    folder = tmp_path_factory.mktemp("reciting")
    recipe = small.recipe(
        folder,
        12,
        epochs=EPOCHS,
        lora={"rank": 16, "alpha": 16},
        optimizer={"learning_rate": 3e-3},
        watch={"every": "auto", "budget": 1.0, "stop_at": "watch"},
    )
    shown, told = screen()
    task = orders.read(orders.Order(str(recipe), out=folder / "run"))
    outcome = night.run(task, shown, save_every=1e9, page=False)
    return recipe, folder / "run", outcome, told.getvalue()


Reciting = tuple[Path, Path, night.Outcome, str]


def verdict(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "verdict.json").read_text())
    return found


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def looks(folder: Path) -> list[dict[str, Any]]:
    return [row for row in runs.read_lines(RunFolder(folder).metrics) if row["kind"] == "look"]


def test_it_stops_at_a_look_and_that_is_a_result(reciting: Reciting) -> None:
    _, folder, outcome, _ = reciting
    said, last = verdict(folder), looks(folder)[-1]
    assert not outcome.interrupted
    assert said["run"]["verdict"] in ("watch", "overfit")
    assert said["run"]["stopped_by"] == facts(folder)["stopped_by"] == said["run"]["verdict"]
    assert said["run"]["epoch"] == last["epoch"] < EPOCHS
    assert runs.read_lines(RunFolder(folder).metrics)[-1]["kind"] == "look"
    assert facts(folder)["state"] == "finished"


def test_its_adapter_is_the_chosen_looks(reciting: Reciting) -> None:
    _, folder, _, _ = reciting
    said, chosen = verdict(folder), facts(folder)["chosen"]
    assert (said["step"], said["epoch"]) == (chosen["step"], chosen["epoch"])
    kept = RunFolder(folder).checkpoint_at(chosen["step"]) / "adapter_model.safetensors"
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == kept.read_bytes()
    assert chosen["step"] in {row["step"] for row in looks(folder)}


def test_it_names_who_recites_where_that_is_written_and_the_words(reciting: Reciting) -> None:
    _, folder, outcome, _ = reciting
    recited = verdict(folder)["run"]["recited"]
    assert recited
    answers = {one.id: one.answer for one in corpus.read(folder.parent / "examples", "bold")}
    assert all(one["words"] and one["words"] in answers[one["id"]] for one in recited)
    assert f"{recited[0]['id']}.md:" in outcome.text
    assert "The run stopped by itself at epoch" in outcome.text
    assert "Next: " in outcome.text


def test_every_look_says_its_verdict_on_the_screen(reciting: Reciting) -> None:
    *_, told = reciting
    lines = [line for line in told.splitlines() if line.startswith("look at epoch")]
    assert "·" not in lines[0], "the base is not judged"
    assert all(" · " in line and "held-out -" in line for line in lines[1:])
    assert "watch · " in lines[-1] or "overfit · " in lines[-1]
    assert "(watch.stop_at)." in told
    assert "first 8-word echo of " in (reciting[1] / "log.txt").read_text()


def test_an_alarm_calls_for_a_full_look_that_was_not_planned(reciting: Reciting) -> None:
    _, folder, _, _ = reciting
    plan = facts(folder)["looks"]
    added = {row["epoch"] for row in looks(folder) if row.get("cause") == "alarm"}
    assert plan["alarm"] >= len(added) > 0
    assert not added & {*plan["full"]}
    assert all(epoch == int(epoch) for epoch in added)
    examples = runs.read_lines(RunFolder(folder).examples)
    first = min(row["epoch"] for row in examples if row["split"] == "train" and row["step"] and row["windows"][0])
    assert min(added) >= first


def test_every_example_is_heard_in_every_epoch(reciting: Reciting) -> None:
    _, folder, _, _ = reciting
    heard = [row for row in runs.read_lines(RunFolder(folder).examples) if row["map"] == "free"]
    trained = json.loads((folder / "split.json").read_text())["train"]
    done = int(max(row["epoch"] for row in heard))
    for epoch in range(done):
        names = sorted(row["id"] for row in heard if epoch < row["epoch"] <= epoch + 1)
        assert names == sorted(trained)
    assert {row["format"] for row in heard} == {"chatml", "alpaca"}
    assert all(row["nll_tstar"] is None and row["split"] == "train" for row in heard)


def test_what_looking_took_is_recorded(reciting: Reciting) -> None:
    spent = facts(reciting[1])["spent"]
    assert spent["share_looking"] + spent["share_listening"] < 1
    assert spent["looking"] > 0 < spent["listening"]


def test_started_again_it_says_its_verdict_and_trains_nothing(reciting: Reciting) -> None:
    recipe, folder, outcome, _ = reciting
    before = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    assert go(str(recipe), out=folder).text == go(str(folder)).text == outcome.text
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


def test_more_is_refused_and_says_how_to_go_on(reciting: Reciting) -> None:
    _, folder, _, _ = reciting
    said = verdict(folder)
    runs.write_json(folder / "verdict.json", {**said, "run": {**said["run"], "verdict": "watch"}})
    with pytest.raises(UserError, match=r"stopped before its last epoch.*watch\.stop_at"):
        orders.read(orders.Order(str(folder), more=3))
    runs.write_json(folder / "verdict.json", {**said, "run": {**said["run"], "verdict": "overfit"}})
    with pytest.raises(UserError, match=r"its verdict is overfit.*lower optimizer\.learning_rate"):
        orders.read(orders.Order(str(folder), more=3))
    runs.write_json(folder / "verdict.json", said)


def test_whoever_stops_later_may_go_on(reciting: Reciting) -> None:
    _, folder, _, _ = reciting
    assert orders.read(orders.Order(str(folder))).is_finished()
    assert not orders.read(orders.Order(str(folder), sets=("watch.stop_at=never",))).is_finished()
