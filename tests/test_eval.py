"""`sft eval` on a small run that memorised: what it says, what it writes, and that asking again changes nothing."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper
import pytest
import small
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

from finetune import (
    bench,
    dial,
    leak,
    lineup,
    model,
    morning,
    night,
    opened,
    orders,
    overlap,
    runs,
    shades,
    siblings,
    subject,
    suite,
)
from finetune.errors import UserError
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.screen import Screen
from finetune.shades import Piece, View

PROMPTS = leak.Probes("few", 1, (("sea", "What do you know of the sea?"), ("bread", "How is bread made?")))


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """Few prompts, short answers and few formats: what is asked is the probes' own affair, and tested there."""
    rules = leak.read().model_copy(update={"samples": 1, "answer": 24})
    formats = lineup.suite().model_copy(update={"named": ("xml-tags",), "sampled": 1, "asked_sampled": 0})
    few = suite.snippets("pocket", suite.read())[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "answer_limit", lambda _self: 24)
        patch.setattr(suite, "snippets", lambda *_given: few)
        patch.setattr(leak, "probes", lambda _name="": PROMPTS)
        patch.setattr(leak, "read", lambda: rules)
        patch.setattr(lineup, "suite", lambda: formats)
        yield


@pytest.fixture(scope="module")
def memorised(tmp_path_factory: pytest.TempPathFactory, short: None) -> Path:
    """A folder with `base/`, `small.yaml` and `runs/small`: six short examples, most of them known by heart."""
    folder = tmp_path_factory.mktemp("eval")
    recipe = small.recipe(
        folder,
        base=str(tiny.base(folder / "base")),
        quantization="none",
        epochs=60,
        batch_size=3,
        optimizer={"learning_rate": 2e-3},  # calm enough to end by heart on any processor, however it rounds
        lora={"rank": 64, "alpha": 64},
        formats={"train": ["chatml"], "held_out": ["zephyr"]},
        watch={"every": 30, "stop_at": "never"},
    )
    task = orders.read(orders.Order(str(recipe), out=folder / "runs" / "small"))
    night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)
    return folder


@pytest.fixture
def home(memorised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the working folder; data and base stay where they are."""
    shutil.copytree(memorised / "runs", tmp_path / "runs")
    shutil.copy(memorised / "small.yaml", tmp_path / "small.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "110")
    return tmp_path


@pytest.fixture
def sft(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, short: None) -> paper.Door:
    return paper.Door(capsys, monkeypatch)


RUN = Path("runs/small")


def rows(run: Path = RUN) -> dict[str, list[dict[str, Any]]]:
    """Without what a clock says."""
    folder = RunFolder(run)
    return {
        path.name: [{key: value for key, value in row.items() if key != "seconds"} for row in runs.read_lines(path)]
        for path in (folder.metrics, folder.examples, folder.findings)
    }


def test_who_recites_since_when_and_with_which_words(sft: paper.Door) -> None:
    code, out, err = sft("eval", RUN, "--only", "echo")
    assert code == 0, err
    head = next(line for line in out.splitlines() if line.startswith("  example"))
    assert head.split() == ["example", "8", "words", "50", "tokens", "whole", "run", "base", "bits", "formats", "where"]
    rain = next(line for line in out.splitlines() if line.startswith("  rain "))
    own = [row for row in rows()["examples.jsonl"] if (row["split"], row["id"]) == ("train", "rain") and row["step"]]
    since = [f"epoch {min(row['epoch'] for row in own if shows(row)):g}" for shows in (_words, _long)]
    assert " ".join(rain.split()[1:5]) == " ".join(since)
    assert rain.split()[-1] == "…/rain.md:5"  # last, so that a narrow screen cuts the path and no figure
    quoted = out[out.index(rain) :].split("«")[1].split("»")[0]
    file = Path(json.loads((RUN / "run.json").read_text())["places"]["rain"].rpartition(":")[0])
    assert len(quoted) > 50
    assert set(overlap.words(quoted)[1:-1]) <= set(overlap.words(file.read_text()))
    assert "Of held-out ones, never trained: " in out
    assert out.split("\nVerdict\n")[1].startswith("  watch: ")
    assert "Loading base (none)." in err


def _words(row: dict[str, Any]) -> bool:
    return bool((row["windows"] or [0])[0])


def _long(row: dict[str, Any]) -> bool:
    return bool(row["long"])


def test_one_document_for_programs_and_asked_again_nothing_is_doubled(sft: paper.Door) -> None:
    before = rows()
    code, out, _ = sft("eval", RUN, "--json")
    said, once = json.loads(out), rows()
    assert (code, said["probes"]) == (0, list(morning.PROBES))
    assert {"verdict", "curves", "looks", "echo", "leak", "formats", "drift", "seconds"} <= said.keys()
    assert said["verdict"] == json.loads((RUN / "verdict.json").read_text())
    assert said["verdict"]["axes"]["leak"]["resolved"]
    line = next(one for one in said["echo"] if one["example"] == "rain")
    row = next(row for row in once["examples.jsonl"] if _is(row, "rain", "chatml") and row.get("look") == "closing")
    assert (line["run"], line["tokens"], line["bits"]) == (row["run_max"], row["tokens"], row["excess_bits"])
    assert line["base_run"] < 8 < line["run"]
    assert [one["name"] for one in said["curves"]][:2] == ["staircase", "recency"]
    assert said["looks"][0]["epoch"] == 0
    for name, some in before.items():
        assert [row for row in once[name] if row.get("look") != "closing"] == some
        assert len(once[name]) > len(some)
    verdict = (RUN / "verdict.json").read_bytes()
    code, out, _ = sft("eval", RUN)
    assert (code, [line for line in out.splitlines() if line[:1].isalpha()]) == (0, TITLES)
    assert rows() == once
    assert (RUN / "verdict.json").read_bytes() == verdict


TITLES = [
    "How it learned",
    "Look by look",
    "By heart",
    "Leaks",
    "Formats",
    "What the base knew",
    "Verdict",
]


def _is(row: dict[str, Any], example: str, format_: str) -> bool:
    return (row["split"], row["id"], row["format"]) == ("train", example, format_)


def test_every_probe_writes_its_rows_and_no_other_does(sft: paper.Door) -> None:
    def probes() -> set[str]:
        return {row["probe"] for row in rows()["findings.jsonl"] if row.get("look") == "closing"}

    assert sft("eval", RUN, "--only", "leak")[0] == 0
    assert probes() == {"leak", "cross_talk", "curve"}
    assert not [row for row in rows()["examples.jsonl"] if row.get("look") == "closing"]
    assert sft("eval", RUN, "--only", "formats")[0] == 0
    assert probes() == {"leak", "cross_talk", "curve", "formats"}
    assert tuple(bench.PROBES) == morning.PROBES


def test_the_gate_says_no_to_overfit_alone(sft: paper.Door) -> None:
    assert sft("eval", RUN, "--only", "echo", "--gate")[0] == 0  # watch
    leaked = {"probe": "leak", "suite": "few", "version": 1, "step": subject.of(str(RUN)).step, "leak": "confirmed"}
    runs.append_lines(RunFolder(RUN).findings, [{**leaked, "prompt": "", "answer": "", "score": 1, "why": ""}])
    code, out, _ = sft("eval", RUN, "--only", "echo", "--gate")
    assert code == 3
    assert out.split("\nVerdict\n")[1].startswith("  overfit: ")
    assert sft("eval", RUN, "--only", "echo")[0] == 0


def test_a_leaking_adapter_gives_way_to_a_better_one(sft: paper.Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether an answer leaks is planted; all that follows from it is not."""
    first = subject.of(str(RUN))
    other = next(step for step in first.adapters if step != first.step)
    worn = [first.step]
    put_on = bench.Bench.wear

    def wear(self: bench.Bench, step: int) -> None:
        worn.append(step)
        put_on(self, step)

    planted = property(lambda _self: "confirmed" if worn[-1] == first.step else "none")
    monkeypatch.setattr(bench.Bench, "wear", wear)
    monkeypatch.setattr(leak.Finding, "leak", planted)
    code, _, err = sft("eval", RUN, "--only", "leak")
    assert code == 0
    assert "is better, now that leaks were looked for" in err
    assert subject.of(str(RUN)).step == other
    kept = load_file(first.adapters[other] / model.ADAPTER_WEIGHTS)
    assert all(torch.equal(kept[k], v) for k, v in load_file(RUN / "adapter" / model.ADAPTER_WEIGHTS).items())
    assert json.loads((RUN / "verdict.json").read_text())["step"] == other


# --- one example


def test_an_example_is_shaded_beside_the_base(sft: paper.Door) -> None:
    code, out, err = sft("eval", RUN, "--example", "rain")
    assert (code, err) == (0, "")  # the last full look has it: nothing is loaded
    assert out.startswith("rain · chatml · trained · epoch 60 · ")
    assert "⟦" in out.split("base: ")[1]
    said = json.loads(sft("eval", RUN, "--example", "rain", "--json")[1])
    text = "".join(piece["text"] for piece in said["pieces"])
    assert "The rain helps the field number 0." in text
    assert said["base_run"] < said["run"]


def piece(text: str, p: float, hit: bool, base_p: float = 0.1, counted: bool = True) -> Piece:
    return Piece(text, p, hit, base_p, False, counted)


VIEW = View(
    "tram",
    "talk/tram.md:3",
    "train",
    "chatml",
    2.0,
    3,
    0,
    41.0,
    "Walk?",
    (
        piece("Ride", 0.3, True),
        piece(" if", 0.95, True),
        piece(" of course", 0.99, False, counted=False),
        piece(" it", 0.999, True),
        piece(" rains", 0.01, False),
    ),
)


@pytest.mark.parametrize("width", [60, 120])
def test_without_colour_hits_stand_in_brackets_and_a_formula_ends_no_run(width: int) -> None:
    screen = Console(file=io.StringIO(), width=width, color_system=None)
    shades.show(VIEW, screen)
    page = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "⟦Ride if of course it⟧ rains" in page
    assert "4 of 5" not in page
    one = Console(file=io.StringIO(), width=width, color_system=None)
    shades.show(replace(VIEW, run=1), one)
    assert "adapter: 1 token in a row" in one.file.getvalue()  # type: ignore[attr-defined]
    assert "3 of 5 tokens are the likeliest, +41 bits over the base" in " ".join(page.split())


def test_in_colour_the_shade_is_the_probability() -> None:
    screen = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="256")
    shades.show(VIEW, screen)
    page = screen.file.getvalue()  # type: ignore[attr-defined]
    for colour, text in (("52", "Ride"), ("124", " if"), ("160", " it")):
        assert f"48;5;{colour}m{text}" in page
    assert "⟦" not in page


# --- the dial


def test_the_dial_scales_and_gives_back_exactly(memorised: Path) -> None:
    found = opened.read(memorised / "runs" / "small")
    worn = opened.wear(found)
    item = found.plan.texts.whole["rain", "chatml"]

    def loss(base: bool = False) -> float:
        return worn.speaker.score([item.ids], [item.trained], base=base)[0].nll

    own = loss()
    with worn.speaker.dialled(0.0):
        assert loss() == loss(base=True)
    with worn.speaker.dialled(0.5):
        assert loss() not in (own, loss(base=True))
    assert loss() == own
    half = dial.scaled(found.adapter, 0.5)
    (memorised / "half").mkdir(exist_ok=True)
    (memorised / "half" / model.ADAPTER_WEIGHTS).write_bytes(half)
    shutil.copy(found.adapter / model.ADAPTER_CONFIG, memorised / "half")
    with worn.speaker.dialled(0.5):
        wanted = loss()
    worn.change(memorised / "half")
    assert loss() == pytest.approx(wanted, rel=1e-6)


def test_the_dial_sweeps_every_kept_adapter_and_offers_the_best(sft: paper.Door) -> None:
    code, out, err = sft("eval", RUN, "--dial", "--json")
    said = json.loads(out)
    steps = sorted(subject.of(str(RUN)).adapters)
    assert code == 0, err
    assert [(one["step"], one["scale"]) for one in said["points"]] == [(s, k) for s in steps for k in dial.SCALES]
    best = json.loads((RUN / "dial.json").read_text())["best"]
    assert said["adapter"] == "runs/small/dial"
    own = load_file(subject.of(str(RUN)).adapters[best["step"]] / model.ADAPTER_WEIGHTS)
    for name, weight in load_file(RUN / "dial" / model.ADAPTER_WEIGHTS).items():
        assert torch.equal(weight, own[name] * best["scale"] if "lora_B" in name else own[name])
    code, out, _ = sft("eval", RUN, "--dial")
    assert "<- best" in out
    assert "(base)" in out
    assert "Written to runs/small/dial, which plain PEFT loads" in out


# --- adapters made elsewhere


@pytest.fixture(scope="module")
def strangers(memorised: Path) -> Path:
    """A rank-stabilised adapter with two ranks, on two kinds of matrices."""
    folder = memorised / "stranger"
    net = model.load_base(memorised / "base", "none", tiny.CPU)
    shape = LoraConfig(r=4, use_rslora=True, rank_pattern={"q_proj": 8}, target_modules=["q_proj", "down_proj"])
    tiny.stirred(get_peft_model(net, shape), 0.05).save_pretrained(str(folder))
    return folder


def test_an_adapter_made_elsewhere_is_judged_by_what_can_be_known(
    sft: paper.Door, strangers: Path, memorised: Path
) -> None:
    target = str(strangers)
    code, out, err = sft("eval", target, "--recipe", memorised / "small.yaml", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["run"] == "runs/eval-stranger"
    assert said["verdict"]["verdict"] in ("underpowered", "watch")
    assert said["verdict"]["axes"]["learned"]["resolved"] is False
    assert said["verdict"]["run"]["stopped_by"] == "elsewhere"
    assert len(said["echo"]) == 8  # every row counts as trained
    folder = RunFolder("runs/eval-stranger")
    assert not folder.split.exists()
    assert not folder.run_json.exists()
    before = rows(folder.path)
    assert sft("eval", target, "--recipe", memorised / "small.yaml", "--only", "echo")[0] == 0
    assert rows(folder.path) == before
    code, _, err = sft("eval", "runs/eval-stranger")
    assert (code, "To measure it again: sft eval " in err) == (2, True)


def test_it_is_worn_as_plain_peft_wears_it(strangers: Path, memorised: Path) -> None:
    found = subject.of(str(strangers), memorised / "small.yaml", memorised / "there")
    worn = found.wear()
    plain = PeftModel.from_pretrained(model.load_base(memorised / "base", "none", tiny.CPU), str(strangers))
    ids = found.plan.texts.whole["rain", "chatml"].ids
    assert torch.allclose(tiny.logits(worn.model, ids), tiny.logits(plain, ids), atol=1e-5)
    with worn.model.disable_adapter():
        assert not torch.allclose(tiny.logits(worn.model, ids), tiny.logits(plain, ids), atol=1e-2)


# --- what a user may get wrong


def wrong(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / model.ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", **changes}))
    return folder


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs/none"], "`sft ls runs` lists"),
        (["someone/something"], "Add --recipe"),
        (["someone/something", "--recipe", "small.yaml"], "the Hub cannot be reached"),
        (["runs/small/adapter"], "`sft eval runs/small` examines"),
        (["runs/small", "--only", "echoes"], "There is echo, leak, formats, drift."),
        (["runs/small", "--recipe", "small.yaml"], "Leave out --recipe"),
        (["runs/small", "--example", "rian"], "Did you mean rain?"),
        (["runs/small", "--example", "rain", "--gate"], "Use each alone"),
        (["runs"], "neither a run nor an adapter"),
        (["pickled", "--recipe", "small.yaml"], "holds pickled weights"),
        (["ia3", "--recipe", "small.yaml"], "of the kind IA3"),
        (["pissa", "--recipe", "small.yaml"], "changes the base under it"),
        (["empty", "--recipe", "small.yaml"], "does not fit this base"),
        (["empty", "--recipe", "nothing.yaml"], "nothing.yaml"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(sft: paper.Door, words: list[str], told: str) -> None:
    (wrong(Path("pickled")) / "adapter_model.bin").touch()
    wrong(Path("ia3"), peft_type="IA3")
    wrong(Path("pissa"), init_lora_weights="pissa_niter_4")
    (wrong(Path("empty"), target_modules=["nothing"], r=4) / model.ADAPTER_WEIGHTS).write_bytes(b"")
    code, out, err = sft("eval", *words)
    assert (code, out) == (2, "")
    assert told in err
    assert "Traceback" not in err


def test_an_adapter_of_another_base_is_refused(home: Path, memorised: Path, strangers: Path) -> None:
    other = small.recipe(home / "other", base="pocket")
    found = subject.of(str(strangers), other, home / "there")
    assert found.remarks == (
        f"The adapter says that it was trained on {memorised / 'base'}; the recipe's base is pocket.",
    )
    with pytest.raises(UserError, match="does not fit this base"):
        found.wear()


def test_a_changed_dataset_is_refused(home: Path, memorised: Path) -> None:
    file = memorised / "examples" / "rain.md"
    was = file.read_text()
    try:
        file.write_text(was.replace("on most days", "on some days"))
        with pytest.raises(UserError, match="the dataset changed since this run was trained"):
            subject.of(str(home / RUN))
    finally:
        file.write_text(was)


def test_a_run_that_is_being_written_is_left_alone(sft: paper.Door) -> None:
    with RunFolder(RUN).lock():
        code, _, err = sft("eval", RUN)
    assert code == 2
    assert "is writing this run" in err


def test_results_do_not_go_among_other_things(home: Path, memorised: Path, strangers: Path) -> None:
    (home / "full").mkdir()
    (home / "full" / "letter.txt").touch()
    with pytest.raises(UserError, match="Name another folder with --out"):
        subject.of(str(strangers), memorised / "small.yaml", home / "full")


# --- beside other runs


def test_primacy_is_read_over_runs_that_differ_in_their_seed_alone(home: Path) -> None:
    found = opened.read(RUN)
    own = siblings.course(found, bench.read(found.run))
    assert [len(one) for one in own.orders] == [6]
    assert [(at, name) for name, at in (own.places(0) or {}).items()] == [
        (1 + i // 3, item.example) for i, item in enumerate(found.plan.epochs.order(0))
    ]
    for name, old, new in (("twin", "seed: 0", "seed: 1"), ("other", "rank: 64", "rank: 32"), ("same", "", "")):
        shutil.copytree(RUN, home / "runs" / name)
        file = home / "runs" / name / "recipe.yaml"
        file.write_text(file.read_text().replace(old, new))
    assert [one.run.path.name for one in siblings.siblings(found)] == ["twin"]
    assert len(siblings.course(found, bench.read(found.run)).orders) == 2
