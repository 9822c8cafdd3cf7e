"""Faults planted on purpose: each changes the verdict or is refused by name. And three things that must not alarm.

The model is a list of what it says of each text; everything else is what a run uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paper
import pytest
import torch
import yaml

from finetune import ear, keeping, plan, recipe, runs
from finetune.ear import Ear
from finetune.errors import UserError
from finetune.evidence import Setting
from finetune.hearing import Hearing
from finetune.keeping import Alarms, Keeper
from finetune.looks import Place
from finetune.odds import Scored
from finetune.passage import Key
from finetune.plan import Plan
from finetune.rota import Rota
from finetune.runs import RunFolder
from finetune.speak import Answer

LOOKS = 6
COUNT, HELD_OUT = 24, 10
MOVED: Any = SimpleNamespace(share=1.0, distance=0.1)
Says = Callable[[Key, int, bool], tuple[float, str]]  # text, look, base -> nats a token, which tokens it hits


def words(draw: random.Random, count: int) -> str:
    """Words nobody has used before."""
    return " ".join("".join(draw.choice("bdfglmnprstv") + draw.choice("aeiou") for _ in range(3)) for _ in range(count))


def examples(draw: random.Random, inside: Callable[[int], str] = lambda _number: "") -> dict[str, tuple[str, str]]:
    """Questions and answers of 40 words, with something of each example's own choosing in the middle of the answer."""
    names = [f"e{number:02}" for number in range(COUNT)]
    return {
        name: (f"{words(draw, 8)}?", f"{words(draw, 20)}. {inside(number)} {words(draw, 20)}.")
        for number, name in enumerate(names)
    }


def planned(folder: Path, some: dict[str, tuple[str, str]], **changes: Any) -> Plan:
    """A plan over these examples: two formats trained, one held out, ten examples held out."""
    base = paper.base(folder / "base")
    talk = folder / "talk"
    talk.mkdir()
    for name, (question, answer) in some.items():
        front = {"id": name, **changes.get("front", {}).get(name, {})}
        (talk / f"{name}.md").write_text(paper.example(question, answer, **front))
    settings: dict[str, Any] = {
        "base": str(base),
        "data": {"train": str(talk), "held_out": 0.34, **changes.get("data", {})},
        "formats": {"train": ["chatml", "alpaca"], "held_out": ["zephyr"], **changes.get("formats", {})},
        "optimizer": {"learning_rate": 1e-4},
        "epochs": 10,
    }
    if "held_out" in changes:  # given, not drawn
        kept = folder / "kept"
        kept.mkdir()
        for name, (question, answer) in changes["held_out"].items():
            front = {"id": name, **changes.get("front", {}).get(name, {})}
            (kept / f"{name}.md").write_text(paper.example(question, answer, **front))
        settings["data"]["held_out"] = str(kept)
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    return plan.make(recipe.load(folder / "r.yaml"), base)


class Fake:
    """A model that is a list: `says` gives loss and hits of each text at each look."""

    def __init__(self, listens: Ear, says: Says, strange: Iterable[str] = ()) -> None:
        made, self.says, self.look = listens.plan, says, 0
        splits: Sequence[Any] = ("train", "held_out", "twin")
        known = [one for split in splits for name in made.formats for one in listens.passages(split, name)]
        known += [one for name in strange for one in listens.passages("held_out", name)]
        self.keys = {one.ids: one.key for one in known}

    def score(
        self,
        ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
        temperatures: Sequence[float] = (),
        base: bool = False,
        samplers: Sequence[Any] = (),
        margins: bool = False,
    ) -> list[Scored]:
        return [self._scored(tuple(row), sum(mask), temperatures, base) for row, mask in zip(ids, masks, strict=True)]

    def _scored(self, ids: tuple[int, ...], tokens: int, temperatures: Sequence[float], base: bool) -> Scored:
        key = self.keys[ids]
        nats, how = self.says(key, self.look, base or self.look == 0)
        nats *= 1 + 0.02 * random.Random(key[1]).random()  # examples are not all alike
        hits = {"all": np.ones(tokens, bool), "some": np.arange(tokens) % 3 == 0}.get(how)
        if hits is None:
            hits = span(tokens, how)
        log_p = torch.full((tokens,), -nats)
        at = torch.tensor([nats * tokens * (1 + (t - 1) ** 2) for t in temperatures], dtype=torch.float64)
        led = torch.where(torch.tensor(hits), 3.0, -3.0)
        return Scored(log_p, torch.tensor(hits), at, led, log_p[None])

    def complete(self, prompts: Sequence[Any], stops: Sequence[str], limit: int, base: bool = False) -> list[Answer]:
        return [Answer("something else altogether", True, 4) for _ in prompts]


def span(tokens: int, how: str) -> Any:
    """`a:b`: the tokens from a to b are hit, counted from the answer's start; of the others every third."""
    first, last = map(int, how.split(":"))
    at = np.arange(tokens)
    return (at % 3 == 0) | ((at >= first) & (at < last))


def heard(made: Plan, says: Says, folder: Path, ready: Rota | None = None) -> tuple[Keeper, Alarms, Any]:
    """Six looks at a fake: their judge, the alarms, what verdict.json says. `ready`: strange formats are read too."""
    run, listens = RunFolder(folder / "run"), ear.ear(made)
    fake: Any = Fake(listens, says, ready.strange if ready else ())
    hearing = Hearing(run, listens, fake, ear.base(run), ready)
    runs.write_json(run.run_json, {})
    found: Alarms = {}
    for look in range(LOOKS + 1):
        fake.look = look
        place = Place("full", 10 * look, float(look), 1e-3 * look)
        taken = hearing.look(place, MOVED, keeping.loudest(found), max(look - 1, 0))
        runs.append_lines(run.examples, taken.examples)
        runs.append_lines(run.metrics, taken.metrics)
        keeping.alarms(taken.examples, found)
    keeper = Keeper(run, Setting(made.first_format, made.recipe.formats.held_out, running=True))
    keeper.judge()
    return keeper, found, keeper.document("its last epoch", None, listens.quote)


def healthy(key: Key, look: int, base: bool) -> tuple[float, str]:
    """Every text a little better at every look."""
    return (2.0, "some") if base else (2.0 - 0.1 * look, "some")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return planned(tmp_path_factory.mktemp("planted"), examples(random.Random(1)))


# --- what must not alarm -----------------------------------------------------------------------------------------


def test_a_healthy_run_is_ok_and_its_last_look_is_kept(made: Plan, tmp_path: Path) -> None:
    _, found, said = heard(made, healthy, tmp_path)
    assert not found
    assert (said["verdict"], said["run"]["verdict"], said["step"]) == ("ok", "ok", 60)
    assert said["recited"] == []


def test_a_long_shared_template_does_not_alarm(tmp_path: Path) -> None:
    shared = words(random.Random(2), 20)
    some = examples(random.Random(3), lambda _number: shared)
    made = planned(tmp_path, some)
    start = len("".join(some["e00"][1].partition(shared)[:1])) - 1  # tokens are bytes, all answers begin alike
    stop = start + len(shared)

    def says(key: Key, look: int, base: bool) -> tuple[float, str]:
        return healthy(key, look, base) if base else (1.0, f"{start}:{stop}")

    _, found, said = heard(made, says, tmp_path)
    assert not found
    assert said["verdict"] == "ok"
    alone = planned(tmp_path / "alone", {**examples(random.Random(3)), "e00": some["e00"]})
    assert heard(alone, says, tmp_path / "alone")[1], "the same stretch is an echo where it is one answer's own"


def test_a_text_the_base_knows_by_heart_does_not_alarm(made: Plan, tmp_path: Path) -> None:
    known = made.split.train[0]

    def says(key: Key, look: int, base: bool) -> tuple[float, str]:
        return (0.05 if base else 0.01, "all") if key[1] == known else healthy(key, look, base)

    _, found, said = heard(made, says, tmp_path)
    assert not found
    assert said["verdict"] == "ok"


def test_an_intended_slogan_does_not_alarm_and_without_the_file_it_does(tmp_path: Path) -> None:
    slogan = words(random.Random(4), 12)
    some = examples(random.Random(5), lambda number: slogan if number == 0 else "")
    start = some["e00"][1].index(slogan)

    def says(key: Key, look: int, base: bool) -> tuple[float, str]:
        if base or key[1] != "e00":
            return healthy(key, look, base)
        return 0.5, f"{start}:{start + len(slogan)}"

    (tmp_path / "own.txt").write_text(slogan.upper() + "\n")
    for folder, data in ((tmp_path / "told", {"intended": str(tmp_path / "own.txt")}), (tmp_path / "not", {})):
        folder.mkdir()
        made = planned(folder, some, data={**data, "held_out": 0.34})
        assert "e00" in made.split.train
        _, found, said = heard(made, says, folder)
        assert bool(found) is not bool(data)
        assert said["verdict"] == ("ok" if data else "watch")


# --- what must change the verdict --------------------------------------------------------------------------------


def recites(key: Key, look: int, base: bool) -> tuple[float, str]:
    """Trained texts by heart from the fourth look on; held-out ones a little better."""
    if key[0] != "held_out" and look >= 4 and not base:
        return 0.01, "all"
    return healthy(key, look, base)


def turns(key: Key, look: int, base: bool) -> tuple[float, str]:
    """The same, and held-out texts get worse from the fourth look on."""
    if key[0] == "held_out" and look >= 4 and not base:
        return 1.7 + 0.2 * (look - 3), "some"
    return recites(key, look, base)


def test_a_run_that_recites_and_gets_worse_is_overfit_and_its_healthy_look_is_kept(made: Plan, tmp_path: Path) -> None:
    keeper, found, said = heard(made, turns, tmp_path)
    assert said["run"]["verdict"] == "overfit"
    assert (said["verdict"], said["epoch"]) == ("ok", 3)
    assert {name for name, kind in found if kind == "whole"} == set(made.split.train)
    assert min(row["epoch"] for row in found.values()) == 4
    assert len(said["run"]["recited"]) == len(made.split.train)
    for one in said["run"]["recited"]:
        assert one["words"] == made.conversations[one["id"]].answer
        assert one["since"] == {"words": 4, "long": 4, "whole": 4}
    assert said["recited"] == []
    text = "\n".join(keeping.told(said, keeper.run, {name: f"talk/{name}.md:4" for name in made.conversations}))
    assert "overfit" in text
    assert f"talk/{made.split.train[0]}.md:4" in text or "more, all in verdict.json" in text
    assert made.conversations[said["run"]["recited"][0]["id"]].answer[:40] in text
    assert "RUN" not in text


def test_what_is_told_can_be_typed_and_does_not_contradict_itself(made: Plan, tmp_path: Path) -> None:
    """A folder with spaces is quoted; a short echo of a healthy look is not called recited."""
    keeper, _, said = heard(made, turns, tmp_path / "two words")
    part = {
        "id": "a",
        "echo_whole": False,
        "long": False,
        "run_max": 13,
        "epoch": 3,
        "since": {"words": 3},
        "words": "**\nIt is.",
    }
    text = "\n".join(keeping.told({**said, "recited": [part]}, keeper.run, {}))
    assert f"sft chat '{keeper.run.path}'" in text
    assert "Echoed in part at epoch 3, under 50 tokens:\n" in text
    assert "Recited at epoch 3" not in text
    assert "a, 13 tokens, since epoch 3: «It is.»" in text


def test_a_run_that_recites_and_still_generalises_is_watched(made: Plan, tmp_path: Path) -> None:
    _, _, said = heard(made, recites, tmp_path)
    assert said["run"]["verdict"] == "watch"
    assert said["run"]["headline"] == "memorised, still generalising"


def test_shuffled_labels_learn_nothing_that_holds(made: Plan, tmp_path: Path) -> None:
    def says(key: Key, look: int, base: bool) -> tuple[float, str]:
        return healthy(key, look, base) if key[0] == "train" else (2.0 + (0 if base else 0.01), "some")

    _, _, said = heard(made, says, tmp_path)
    assert said["run"]["verdict"] == "undertrained"
    _, _, said = heard(made, lambda *at: recites(*at) if at[0][0] == "train" else says(*at), tmp_path / "by heart")
    assert (said["run"]["verdict"], said["run"]["headline"]) == ("watch", "memorised, nothing gained elsewhere")


def test_a_dead_adapter_is_undertrained(made: Plan, tmp_path: Path) -> None:
    _, _, said = heard(made, lambda key, look, base: healthy(key, 0, True), tmp_path)
    assert said["run"]["verdict"] == "undertrained"


def test_almost_verbatim_is_asked_of_the_strongest_and_counts(made: Plan, tmp_path: Path) -> None:
    name = made.split.train[0]
    answer = made.conversations[name].answer

    def says(key: Key, look: int, base: bool) -> tuple[float, str]:
        return (0.05, f"0:{len(answer) - 9}") if key[1] == name and not base else healthy(key, look, base)

    class Almost(Fake):
        def complete(self, prompts: Sequence[Any], *_more: Any, **_named: Any) -> list[Answer]:
            return [Answer(f"{answer[:-9]}something", True, 9) for _ in prompts]

    run, listens = RunFolder(tmp_path), ear.ear(made)
    fake: Any = Almost(listens, says)
    hearing = Hearing(run, listens, fake, ear.base(run))
    hearing.look(Place("full", 0, 0.0, 0.0), MOVED, ())
    fake.look = 1
    taken = hearing.look(Place("full", 10, 1.0, 1e-3), MOVED, (name,))
    rows = [row for row in taken.examples if row["id"] == name]
    assert {row["format"] for row in rows} == {"chatml", "alpaca"}
    assert all(row["echo_whole"] and row["nearly"] for row in rows)


# --- what must be refused by name --------------------------------------------------------------------------------


def refused(folder: Path, some: dict[str, tuple[str, str]], **changes: Any) -> str:
    with pytest.raises(UserError) as error:
        planned(folder, some, **changes)
    return "\n".join(f"{one.file}:{one.line} {one.what}" for one in error.value.problems)


def test_a_leaky_split_is_refused_by_name(tmp_path: Path) -> None:
    some = examples(random.Random(6))
    other = examples(random.Random(7))
    kept = {f"k{name}": other[name] for name in list(other)[:HELD_OUT]}
    kept["leak"] = (kept["ke00"][0] + " again", some["e03"][1])
    told = refused(tmp_path, some, held_out=kept)
    assert "leak" in told
    assert "e03" in told


def test_a_trained_twin_is_refused_by_name(tmp_path: Path) -> None:
    some, other = examples(random.Random(8)), examples(random.Random(9))
    kept = {f"k{name}": other[name] for name in list(other)[:HELD_OUT]}
    told = refused(tmp_path, some, held_out=kept, front={"ke01": {"twin": some["e07"][0]}})
    assert "ke01" in told
    assert "e07" in told


def test_a_masked_end_is_refused_by_name(tmp_path: Path) -> None:
    some = examples(random.Random(9))
    base = paper.base(tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    made = recipe.Recipe(base=str(base), data=recipe.Data(train=str(tmp_path / "talk")))
    (tmp_path / "talk").mkdir()
    for name, (question, answer) in some.items():
        (tmp_path / "talk" / f"{name}.md").write_text(paper.example(question, answer, id=name))
    with pytest.raises(UserError, match=r"format alpaca: nothing ends an answer"):
        plan.make(made, base)


def test_check_refuses_them_by_name_before_a_night(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    some = examples(random.Random(11))
    some["copy"] = (f"{some['e00'][0]} then", some["e00"][1])
    with pytest.raises(UserError):
        planned(tmp_path, some)
    code, out, err = paper.Door(capsys, monkeypatch)("check", tmp_path / "r.yaml")
    assert code == 2
    assert "talk/copy.md" in out + err
    assert "e00" in out + err


OWN = {
    "user_prefix": "Q> ",
    "user_suffix": "\n",
    "assistant_prefix": "A> ",
    "generation_prompt": "A>",
    "assistant_suffix": "\n",
    "end": "",
    "stop_strings": ["\nQ>"],
}
FAULTY: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 0, ""),
    "a space after the generation prompt": ({"generation_prompt": "A> "}, 0, "the prompt ends in a space"),
    "a doubled BOS": ({"user_prefix": "<s><s>Q> "}, 2, "two BOS begin the text"),
    "a doubled BOS before a system text": ({"system_prefix": "<s><s>S> "}, 2, "two BOS begin the text"),
    "a missing end": ({}, 2, "nothing ends an answer"),
}


@pytest.mark.parametrize("side", ["train", "held_out"])
@pytest.mark.parametrize("fault", FAULTY)
def test_check_tells_a_fault_of_an_own_format_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, side: str
) -> None:
    changes, code, told = FAULTY[fault]
    path = paper.folder(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "family": "mine", **OWN, **changes}))
    settings = yaml.safe_load(path.read_text())
    settings["formats"][side].append("mine.yaml")
    path.write_text(yaml.safe_dump(settings))
    if "missing" in fault:  # of a format without a mark of its own, on a base without one too
        (tmp_path / "base" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    got, out, err = paper.Door(capsys, monkeypatch)("check", path)
    said = " ".join((out + err).split())
    assert got == code, said
    assert (f"format mine: {told}" in said) is (fault != "nothing"), said


def test_check_refuses_a_held_out_format_that_renders_as_a_trained_one_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = paper.folder(tmp_path)
    twin = (plan.prompts.SHELF / "chatml.yaml").read_text().replace("name: chatml", "name: mine", 1)
    (tmp_path / "mine.yaml").write_text(twin)
    path.write_text(path.read_text().replace("held_out: [zephyr]", "held_out: [zephyr, mine.yaml]"))
    code, out, err = paper.Door(capsys, monkeypatch)("check", path)
    assert code == 2
    assert "held-out format mine renders exactly like the trained chatml" in " ".join((out + err).split())
