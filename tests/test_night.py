"""A night is never lost, and a killed one ends like one that was left alone."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from rich.console import Console
from safetensors.torch import load_file

from finetune import night, orders, runs, shelf
from finetune.errors import UserError
from finetune.runs import RunFolder
from finetune.screen import Screen

HARD: dict[str, Any] = {
    "lora": {"rank": 32, "alpha": 32, "dropout": 0.1},
    "optimizer": {"name": "adamw_8bit", "learning_rate": 1e-3},
    "regularise": {"stochastic_depth": 0.2},
    "machine": {"micro_batch": 1},
    "watch": {"every": 1, "prompts": ["Do you like the moon?"]},
}


@pytest.fixture(autouse=True)
def _short_drift(request: pytest.FixtureRequest) -> None:
    if "left_alone" not in request.fixturenames:  # whose killed twins are programs of their own
        request.getfixturevalue("short_drift")


def run(recipe: Path, folder: Path, **order: Any) -> night.Outcome:
    task = orders.read(orders.Order(str(recipe), out=folder, **order))
    return night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)


def again(folder: Path, **order: Any) -> night.Outcome:
    task = orders.read(orders.Order(str(folder), **order))
    return night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Without what a clock or the machine's memory says."""
    found = [row for row in runs.read_lines(RunFolder(folder).metrics) if row["kind"] == kind]
    timed = ("seconds", "gib", "took", "listening", "base_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, whatever is nested in it."""
    if torch.is_tensor(one):
        return bool(one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_end(one: Path, other: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()
    last = [RunFolder(folder).newest_valid(full=True) for folder in (one, other)]
    assert last[0].step == last[1].step
    weights, states = (
        [load_file(c.folder / "adapter_model.safetensors") for c in last],
        [torch.load(c.folder / "optimizer.pt", weights_only=False) for c in last],
    )
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert same(states[0], states[1])
    assert rows(one, "step") == rows(other, "step")
    assert rows(one, "look") == rows(other, "look")
    told = [runs.read_lines(RunFolder(folder).samples) for folder in (one, other)]
    assert [row["answer"] for row in told[0]] == [row["answer"] for row in told[1]]
    examples = [runs.read_lines(RunFolder(folder).examples) for folder in (one, other)]
    assert examples[0] == examples[1]
    assert {row["map"] for row in examples[0]} >= {"free", "full"}
    findings = [runs.read_lines(RunFolder(folder).findings) for folder in (one, other)]
    same_data = [[{**row, "source": Path(row["source"]).name} for row in some] for some in findings]
    assert same_data[0] == same_data[1]
    assert (one / "verdict.json").read_bytes() == (other / "verdict.json").read_bytes()


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("alone")
    recipe = small.recipe(folder, **HARD)
    run(recipe, folder / "run")
    return recipe, folder / "run"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_killed_again_and_again_ends_like_one_left_alone(
    left_alone: tuple[Path, Path], tmp_path: Path, seed: int
) -> None:
    recipe, alone = left_alone
    driver = [sys.executable, str(Path(__file__).with_name("killed.py")), str(recipe), str(tmp_path / "run"), str(seed)]
    told = subprocess.run(driver, capture_output=True, text=True, timeout=500, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    assert int(told.stdout) >= 5
    assert_same_end(alone, tmp_path / "run")


def test_a_run_folder_holds_what_the_contract_says(left_alone: tuple[Path, Path]) -> None:
    recipe, folder = left_alone
    assert (folder / "source_recipe.yaml").read_bytes() == recipe.read_bytes()
    split = json.loads((folder / "split.json").read_text())
    assert set(split) == {"train", "held_out", "twins", "seed"}
    assert len(split["held_out"]) == 2
    step = rows(folder, "step")[-1]
    assert {"kind", "step", "epoch", "lr", "travel", "loss", "grad_norm", "tokens"} <= set(step)
    assert step["travel"] == pytest.approx(step["step"] * 1e-3)
    look = rows(folder, "look")[-1]
    wanted = {"look", "split", "format", "nll", "nll_tstar", "accuracy", "bpb", "moved", "distance"}
    assert wanted <= set(look)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["state"] == "finished"
    assert facts["chosen"]["step"] in {row["step"] for row in rows(folder, "look")}
    assert {"versions", "device", "fingerprints", "derived", "looks", "seed"} <= set(facts)
    answers = runs.read_lines(RunFolder(folder).samples)
    assert {"Do you like the moon?"} < {row["prompt"] for row in answers}


def test_no_held_out_row_is_trained(left_alone: tuple[Path, Path]) -> None:
    from finetune import plan, recipe

    made = plan.make(recipe.load(left_alone[0]), Path(night.model.POCKET))
    trained = {item.example for epoch in range(6) for item in made.epochs.order(epoch)}
    assert trained == set(made.split.train)
    assert not trained & set(made.split.held_out)
    held = {made.conversations[name].answer for name in made.split.held_out}
    decoded = {made.vocabulary.tokenizer.decode(item.ids) for item in made.texts.trained.values()}
    assert not any(answer in text for answer in held for text in decoded)


def test_a_finished_run_started_again_says_its_result(left_alone: tuple[Path, Path]) -> None:
    recipe, folder = left_alone
    before = (folder / "metrics.jsonl").read_bytes()
    told = run(recipe, folder).text
    assert "Adapter:" in told
    assert "Next: " in told
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_no_path_of_this_machine_is_in_the_adapter(left_alone: tuple[Path, Path]) -> None:
    for path in (left_alone[1] / "adapter").iterdir():
        assert b"/" + str(left_alone[1]).split("/")[1].encode() + b"/" not in path.read_bytes()
    config = json.loads((left_alone[1] / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "pocket"


def test_more_epochs_end_like_a_longer_run(tmp_path: Path) -> None:
    short, long = small.recipe(tmp_path / "a", epochs=2), small.recipe(tmp_path / "b", epochs=4)
    run(short, tmp_path / "short")
    with pytest.raises(UserError, match="100000 are the most"):
        orders.read(orders.Order(str(tmp_path / "short"), more=10**12))
    again(tmp_path / "short", more=2)
    run(long, tmp_path / "long")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "short/adapter" / name).read_bytes() == (tmp_path / "long/adapter" / name).read_bytes()
    assert rows(tmp_path / "short", "step") == rows(tmp_path / "long", "step")


def test_refit_trains_on_everything_to_the_same_travel(tmp_path: Path) -> None:
    run(small.recipe(tmp_path), tmp_path / "run")
    refitted = again(tmp_path / "run", refit=True)
    parent = json.loads((tmp_path / "run/run.json").read_text())["chosen"]
    split = json.loads((tmp_path / "run-refit/split.json").read_text())
    assert len(split["train"]) == 8
    assert split["held_out"] == []
    assert rows(tmp_path / "run-refit", "step")[-1]["travel"] == pytest.approx(parent["travel"])
    assert (tmp_path / "run-refit/adapter/adapter_model.safetensors").is_file()
    was, now = (json.loads((tmp_path / name / "verdict.json").read_text()) for name in ("run", "run-refit"))
    assert now["parent"]["verdict"] == was["verdict"]
    assert now["axes"]["learned"]["n"] == 0
    assert now["axes"]["recites_8"]["value"] is None
    assert "refitted from" in refitted.text


def test_a_changed_recipe_is_refused_with_what_changed(tmp_path: Path) -> None:
    run(small.recipe(tmp_path, epochs=1), tmp_path / "run")
    other = small.recipe(tmp_path, epochs=1, lora={"rank": 8})
    with pytest.raises(UserError, match=r"lora\.rank was 4, is 8"):
        run(other, tmp_path / "run")


def test_a_changed_plan_of_looks_is_told_to_stay(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, epochs=2)
    run(recipe, tmp_path / "run")
    small.recipe(tmp_path, epochs=4, watch={"every": 1})
    told = io.StringIO()
    task = orders.read(orders.Order(str(recipe), out=tmp_path / "run"))
    night.run(task, Screen(Console(file=told, width=300)), save_every=1e9, page=False)
    assert "its looks stay as planned. New ones hold for the epochs that were added." in told.getvalue()
    assert json.loads((tmp_path / "run/run.json").read_text())["looks"]["full"] == [2, 3, 4]


def test_changed_data_are_refused(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, epochs=2)
    run(recipe, tmp_path / "run")
    example = tmp_path / "examples/rain.md"
    example.write_text(example.read_text().replace("I can play", "I may play"))
    with pytest.raises(UserError, match="dataset and the rendered texts changed"):
        again(tmp_path / "run", more=1)


def test_a_second_process_on_one_run_is_refused(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, epochs=1)
    with RunFolder(tmp_path / "run").lock(), pytest.raises(UserError, match="is writing this run"):
        run(recipe, tmp_path / "run")


def test_layers_the_base_has_not_are_refused_before_a_folder_begins(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, lora={"rank": 4, "layers": {"top": 99}})
    with pytest.raises(UserError, match="Give at most"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()
    assert not (tmp_path / "run/recipe.yaml").exists()


def test_more_and_refit_need_a_finished_run(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path)
    with pytest.raises(UserError, match="go on with a run"):
        orders.read(orders.Order(str(recipe), more=3))


def test_stopping_saves_and_says_how_to_go_on(
    left_alone: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, alone = left_alone
    real = night.Vigil.step

    def step_and_ask(self: Any, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == 4:
            night.signal.raise_signal(night.signal.SIGINT)

    monkeypatch.setattr(night.Vigil, "step", step_and_ask)
    stopped = run(recipe, tmp_path / "run")
    assert stopped.interrupted
    assert f"sft train {tmp_path / 'run'}" in stopped.text
    assert RunFolder(tmp_path / "run").newest_valid(full=True).step == 4
    monkeypatch.setattr(night.Vigil, "step", real)
    again(tmp_path / "run")
    assert_same_end(alone, tmp_path / "run")


def test_a_full_disk_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe(tmp_path)
    real = night.model.save_adapter
    saved: list[int] = []

    def fill_the_disk(*given: Any) -> None:
        saved.append(1)
        if len(saved) > 1:
            raise OSError(28, "No space left on device")
        real(*given)

    monkeypatch.setattr("finetune.train.save_adapter", fill_the_disk)
    with pytest.raises(UserError, match="disk is full"):
        run(recipe, tmp_path / "run")
    monkeypatch.setattr("finetune.train.save_adapter", real)
    assert RunFolder(tmp_path / "run").newest_valid(full=True) is not None
    assert not again(tmp_path / "run").interrupted


def test_a_nan_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small.recipe(tmp_path)
    real = night.Vigil.step

    def poison(self: Any, row: dict[str, Any]) -> None:
        real(self, row)
        if row["step"] == 7:
            with torch.no_grad():
                next(iter(night.model.adapter_weights(self.model).values())).fill_(float("nan"))

    monkeypatch.setattr(night.Vigil, "step", poison)
    with pytest.raises(UserError, match="loss is nan"):
        run(recipe, tmp_path / "run")
    kept = RunFolder(tmp_path / "run").newest_valid(full=True)
    assert all(torch.isfinite(w).all() for w in load_file(kept.folder / "adapter_model.safetensors").values())


def test_a_dead_adapter_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, epochs=30, optimizer={"learning_rate": 1e-12, "eps": 1.0})
    with pytest.raises(UserError, match=r"adapter is dead: After 50 steps only .* of lora_A has moved.*eps"):
        run(recipe, tmp_path / "run")


def test_out_of_memory_says_what_to_change_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = night.train.NightTrainer._nll

    def run_out(self: Any, *given: Any, **named: Any) -> Any:
        if self.state.global_step == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *given, **named)

    monkeypatch.setattr(night.train.NightTrainer, "_nll", run_out)
    with pytest.raises(UserError, match=r"Out of memory; the longest text is \w+ with \d+ tokens.*shorter examples"):
        run(small.recipe(tmp_path), tmp_path / "run")
    assert RunFolder(tmp_path / "run").newest_valid(full=True).step == 6


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        run(small.recipe(tmp_path), tmp_path / "run")


def test_fewer_epochs_than_a_run_goes_to_are_refused(left_alone: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="goes to epoch 4, the recipe to 2"):
        orders.read(orders.Order(str(left_alone[1]), sets=("epochs=2",)))


def test_a_look_at_the_base_that_was_cut_short_is_taken_again(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path, epochs=1)
    run(recipe, tmp_path / "whole")
    run(recipe, tmp_path / "cut")
    folder = RunFolder(tmp_path / "cut")
    kept = runs.read_lines(folder.metrics)[:2]
    folder.metrics.unlink()
    runs.append_lines(folder.metrics, kept)
    for one in folder.checkpoints():
        (one.folder / "manifest.json").unlink()
    folder.record(state="running")
    again(tmp_path / "cut")
    assert rows(tmp_path / "cut", "look") == rows(tmp_path / "whole", "look")


def test_a_changed_format_file_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    text = "name: mine\nfamily: mine\nuser_prefix: 'Q> '\nuser_suffix: \"\\n\"\nassistant_prefix: 'A> '\n"
    text += "assistant_suffix: \"\\n\"\ngeneration_prompt: 'A>'\n"
    own.write_text(text)
    recipe = small.recipe(tmp_path, epochs=1, formats={"train": [str(own)]})
    run(recipe, tmp_path / "run")
    own.write_text(text.replace("Q> ", "Q: "))
    shelf.read.cache_clear()  # as a new process would
    with pytest.raises(UserError, match="rendered texts changed"):
        again(tmp_path / "run", more=1)


def test_a_run_with_nothing_held_out_keeps_its_last_look(tmp_path: Path) -> None:
    run(small.recipe(tmp_path, data={"held_out": 0.0}, watch={"every": "auto", "budget": 1.0}), tmp_path / "run")
    chosen = json.loads((tmp_path / "run/run.json").read_text())["chosen"]
    assert chosen["epoch"] == 4
    assert "nothing was held out" in chosen["reason"]


def test_a_warm_up_that_starts_at_zero_is_looked_at(tmp_path: Path) -> None:
    schedule = {"schedule": "constant_with_warmup", "warmup_steps": 3}
    run(small.recipe(tmp_path, epochs=1, batch_size=16, optimizer=schedule), tmp_path / "run")
    assert rows(tmp_path / "run", "look")[-1]["travel"] == 0


def test_optimizer_state_damaged_everywhere_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    run(small.recipe(tmp_path), tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    before = folder.metrics.read_bytes()
    for one in folder.checkpoints():
        folder.demote(one.step)
    with pytest.raises(UserError, match="optimizer state of every checkpoint is damaged"):
        again(tmp_path / "run", more=1)
    assert folder.metrics.read_bytes() == before


def test_a_run_is_never_written_among_other_things(tmp_path: Path) -> None:
    recipe = small.recipe(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thing").write_text("mine")
    for out, what in (("full", "holds thing and is no run"), ("full/thing", "is a file")):
        with pytest.raises(UserError, match=what):
            orders.read(orders.Order(str(recipe), out=tmp_path / out))
