"""What looks are said to ask of a model is what they ask of it: the budget and the minutes foretold rest on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import small
import test_planted
import tiny
from torch import Tensor

from finetune import bases, burden, drift, ear, plan, recipe, rota, varlen
from finetune.hearing import Hearing
from finetune.looks import Place
from finetune.model import POCKET
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.speak import Speaker

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = small.recipe(tmp_path_factory.mktemp("burden"), 12, data={"held_out": 0.33}, quantization="none")
    return plan.make(recipe.load(path), POCKET)


@pytest.fixture
def read(made: Plan, tmp_path: Path) -> dict[str, int]:
    """Tokens that went through the model at a look at the base, at a light one and at a full one, drift apart."""
    speaker = Speaker(tiny.stirred(tiny.adapted(POCKET), 0.02), made.vocabulary.tokenizer, made.vocabulary.eos_id)
    count = 0

    def hidden(plain: Any, texts: Sequence[Sequence[int]]) -> Tensor:
        nonlocal count
        count += sum(len(ids) for ids in texts)
        return varlen.hidden(plain, texts)

    speaker.hidden = hidden
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    hearing = Hearing(run, ear.ear(made), speaker, ear.base(run), rota.of(made), noise=1e-3)
    found = {}
    for kind, step in (("base", 0), ("light", 2), ("full", 4)):
        count = 0
        hearing.look(Place("full" if kind == "base" else kind, step, float(step), 1e-3 * step), test_planted.MOVED, ())
        found[kind] = count
    return found


def test_each_kind_of_look_reads_what_is_said(made: Plan, read: dict[str, int]) -> None:
    ready = drift.probe(made, "pocket", "")
    begun = sum(len(one.ids) for _, _, some in ready.openings for one in some)
    apart = {"base": ready.tokens() - 2 * sum(len(one.tokens.ids) for one in ready.texts), "light": 0}
    assert apart["base"] > begun > 0
    apart["full"] = ready.tokens()
    for kind in ("base", "light", "full"):
        said = burden.look(made, kind)
        assert said.read - apart[kind] == pytest.approx(read[kind], rel=0.08), kind
        assert said.scored < said.read


@pytest.mark.parametrize("held_out", [0.0, 0.33])
def test_what_echoes_is_read_where_it_has_not_been_read(tmp_path: Path, held_out: float) -> None:
    night = plan.make(recipe.load(small.recipe(tmp_path, 12, data={"held_out": held_out})), POCKET)
    listens = ear.ear(night)
    hearing = Hearing(RunFolder(tmp_path / "run"), listens, None, ear.base(RunFolder(tmp_path / "run")))  # type: ignore[arg-type]
    loud = sorted(night.split.train, key=lambda name: -len(listens.passage("train", name, night.first_format).ids))
    kinds: tuple[burden.Kind, ...] = ("light", "full")
    for kind in kinds:
        place = Place(kind, 2, 2.0, 0.1)
        groups = [[*hearing._groups(place, some)] for some in ((), loud)]
        quiet, heard = (sum(len(one.ids) for group in some for one in group) for some in groups)
        said = burden.look(night, kind, alarmed=True).read - burden.look(night, kind).read
        assert said == pytest.approx(heard - quiet, rel=0.15), kind


def test_drift_reads_what_is_said_of_a_small_base_and_of_a_large_one() -> None:
    for name in ("quickstart", "minisymposium"):
        wanted = recipe.read(RECIPES / f"{name}.yaml").recipe
        night = plan.make(wanted, bases.look_up(wanted.base, wanted.revision).vocabulary)
        once, neutral = burden._drift(night)
        said = once + 2 * (neutral + sum(len(item.ids) for item in burden._along(night)))
        assert said == pytest.approx(drift.probe(night, wanted.base, "").tokens(), rel=0.01)


def test_only_looks_that_ask_for_answers_write_them(made: Plan) -> None:
    assert burden.look(made, "light").written == 0
    full = burden.look(made, "full")
    taught = [item.supervised for item in made.texts.trained.values()]
    assert (full.written, full.answers) == (round(sum(taught) / len(taught)), burden.HELD_OUT_QUESTIONS)


def test_with_nothing_held_out_no_answer_is_asked_for(tmp_path: Path) -> None:
    night = plan.make(recipe.load(small.recipe(tmp_path, data={"held_out": 0.0})), POCKET)
    assert [burden.look(night, kind).written for kind in ("base", "light", "full")] == [0, 0, 0]
