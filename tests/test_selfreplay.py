"""The base's own answers are its own, are mixed in to the share asked for, and are written once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import small
from rich.console import Console

from finetune import model, night, opened, orders, outlook, plan, recipe, runs, selfreplay
from finetune.errors import UserError
from finetune.plan import Plan
from finetune.screen import Screen
from finetune.speak import Answer, Speaker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("selfreplay")
    wanted = small.recipe(folder, regularise={"self_replay": 0.5}, epochs=2)
    return plan.make(recipe.load(wanted), model.POCKET)


@pytest.fixture(scope="module")
def rows(made: Plan) -> list[dict[str, Any]]:
    base = model.load_base(model.POCKET, "none", model.pick_device())
    speaker = Speaker(base, made.vocabulary.tokenizer, made.vocabulary.eos_id)
    found = selfreplay.replies(speaker, made, 12)
    assert found == selfreplay.replies(speaker, made, 12)
    return found


def test_the_base_answers_in_every_trained_format(made: Plan, rows: list[dict[str, Any]]) -> None:
    assert {row["format"] for row in rows} == {"chatml", "alpaca"}
    assert len({row["id"] for row in rows}) == len(rows) > 6
    assert all(row["answer"] for row in rows)


def test_only_the_answers_are_in_the_loss(made: Plan, rows: list[dict[str, Any]]) -> None:
    for item, row in zip(selfreplay.items(rows, made), rows, strict=True):
        said = made.vocabulary.tokenizer.decode([i for i, on in zip(item.ids, item.trained, strict=True) if on])
        assert row["answer"] in said
        assert row["prompt"] not in said
        assert item.format == ""


def test_the_share_is_that_of_supervised_tokens(made: Plan, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / selfreplay.NAME
    runs.append_lines(path, rows)
    mixed = selfreplay.mixed(made, path)
    epoch = mixed.epochs.order(0)
    own = sum(item.supervised for item in epoch if item.format)
    assert own == sum(item.supervised for item in made.epochs.order(0))
    share = 1 - own / sum(item.supervised for item in epoch)
    assert share == pytest.approx(0.5, abs=0.05)
    assert mixed.length.per_epoch > made.length.per_epoch
    assert mixed.length.total == 2 * mixed.length.per_epoch
    assert mixed.fingerprint() != made.fingerprint()


class Rambling:
    """A speaker that never comes to an end."""

    def complete(self, prompts: list[Any], *_how: Any) -> list[Answer]:
        return [Answer("and so on", False, 99) for _ in prompts]


def test_a_base_that_never_ends_is_refused(made: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never ends"):
        selfreplay.write(tmp_path / "x.jsonl", Rambling(), made)  # type: ignore[arg-type]
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.usefixtures("short_drift")
def test_a_run_writes_them_once_and_goes_on_with_the_same(tmp_path: Path) -> None:
    def run(epochs: int) -> dict[str, Any]:
        wanted = small.recipe(tmp_path, 4, regularise={"self_replay": 0.3}, epochs=epochs, quantization="none")
        task = orders.read(orders.Order(str(wanted), out=tmp_path / "run"))
        night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)
        return dict(runs.read_json(tmp_path / "run" / "run.json"))

    first, path = run(1), tmp_path / "run" / selfreplay.NAME
    written, when = path.read_bytes(), path.stat().st_mtime_ns
    assert len(written.splitlines()) > 30
    more = run(2)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (written, when)
    assert more["steps"] == 2 * first["steps"]
    assert opened.read(tmp_path / "run").epoch(more["steps"]) == 2
    findings = runs.read_lines(tmp_path / "run" / "findings.jsonl")
    assert {row["axis"] for row in findings if row["probe"] == "drift"} >= {"general", "kl", "script", "stock"}


def test_two_kinds_of_replay_are_refused_and_the_uncounted_is_said(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The hen eats corn.")
    both = {"path": str(tmp_path / "text.txt"), "share": 0.1}
    path = small.recipe(tmp_path, data={"replay": both}, regularise={"self_replay": 0.2})
    seen = outlook.look(path)
    assert ["both mix text in" in one.what for one in seen.problems] == [True]
    alone = outlook.look(small.recipe(tmp_path / "alone", regularise={"self_replay": 0.2}))
    assert not alone.problems
    assert any("1.2 times as many" in one.what for one in alone.warnings)
