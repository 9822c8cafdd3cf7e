"""A calibration is measured once for each machine and recipe, kept, used by the next check, and never in the way."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper
import pytest

from finetune import bases, ledger, memory, outlook, plan, rates, recipe
from finetune.memory import Load
from finetune.rates import Calibration, Work

NOTHING = (0.0, 0.0)
KEPT = Calibration(
    (64, 256),
    (0.1, 0.4),
    (0.05, 0.2),
    (0.03, 0.1),
    NOTHING,
    (0.2, 0.8),
    (0.1, 0.4),
    0.01,
    0.02,
    4000.0,
    9.0,
    0.01,
    0.02,
)
EVEN = replace(KEPT, layer=(0.64, 2.56), again=(0.32, 1.28), head=NOTHING, step_layer=0.0, step_rest=0.0)


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    """In a folder and with a cache of its own; half a second of measuring."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(rates, "BUDGET", 0.5)
    paper.folder(tmp_path)
    return paper.Door(capsys, monkeypatch)


def asked() -> dict[str, Any]:
    made = plan.make(recipe.load("r.yaml"), Path("base"))
    found = rates.request(made, bases.look_up(made.recipe.base))
    assert found is not None
    return found


def keep(found: Calibration = KEPT) -> Path:
    rates._keep(asked(), found)
    return rates._file()


def time_of(said: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said)["plan"]["Disk and time"]["time"]
    return found


def test_a_calibration_finishes_and_the_next_check_uses_it_but_for_another_rank(sft: paper.Door) -> None:
    code, out, err = sft("check", "r.yaml", "--calibrate", "--json")
    assert (code, err) == (0, "")
    first = time_of(out)
    assert "by a calibration of" in first["reason"]
    assert first["value"] > 0
    code, out, _ = sft("check", "r.yaml", "--json")
    assert (code, time_of(out)) == (0, first)
    code, out, _ = sft("check", "r.yaml", "--json", "--set", "lora.rank=8")
    assert code == 0
    assert "a guess" in time_of(out)["reason"]
    assert "--calibrate" in time_of(out)["reason"]
    found = rates.kept(asked())
    assert found is not None
    shape = bases.shape_in(Path("base"))
    assert shape is not None
    load = Load(shape, "nf4", memory.adapter_weights(shape, 4, memory.MATRICES, 4), 4, "adamw", 1, False)
    assert found.a_layer == pytest.approx(memory.activations(load) / 4, rel=0.03)  # what the bill says without it


DAMAGE = [b"", b"{", b"[]", b"\xff", b'{"NAME": 1}', b'{"NAME": {}}', b"[" * 5000]


@pytest.mark.parametrize("raw", DAMAGE)
def test_a_damaged_file_is_ignored_and_replaced(sft: paper.Door, raw: bytes) -> None:
    path = keep()
    assert rates.kept(asked()) == KEPT
    path.write_bytes(raw.replace(b"NAME", rates._name(asked()).encode()))
    code, out, _ = sft("check", "r.yaml")
    assert code == 0
    assert "a guess" in out
    keep()
    assert rates.kept(asked()) == KEPT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer", [0.1]),
        ("layer", ["a", "b"]),
        ("tokens", ["1", "2"]),
        ("tokens", [256, 64]),
        ("head", [-1, 1]),
        ("took", None),
        ("again", "ab"),
    ],
)
def test_a_record_that_is_not_one_is_ignored(sft: paper.Door, key: str, value: Any) -> None:
    path = keep()
    records = json.loads(path.read_text())
    records[rates._name(asked())][key] = value
    path.write_text(json.dumps(records))
    assert rates.kept(asked()) is None


def test_check_imports_no_torch_with_a_calibration(sft: paper.Door) -> None:
    keep()
    code = "import sys; from finetune import outlook; from pathlib import Path; o = outlook.look(Path('r.yaml'))\n"
    code += "print([f.reason for f in o.facts if f.name == 'time'], {'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "by a calibration of 9 s" in done.stdout
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("kill -9 $$", "it was killed (signal 9)"),
        ("echo 'no space is left on the disk' >&2; exit 2", "no space is left on the disk"),
        ("echo '{}'", "it gave no figures"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for the interpreter")
def test_a_child_that_fails_is_one_line_and_check_goes_on_with_the_guess(
    sft: paper.Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, told: str
) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(rates.sys, "executable", str(path))
    code, out, err = sft("check", "r.yaml", "--calibrate")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "The calibration gave nothing" in line]
    assert told in line
    assert "a guess" in out


def test_a_base_that_cannot_be_built_is_one_line(sft: paper.Door) -> None:
    paper.base(Path("base"), model_type="nobody-knows-it")
    code, out, err = sft("check", "r.yaml", "--calibrate")
    assert (code, err) == (0, "")
    assert len([line for line in out.splitlines() if "The calibration gave nothing" in line]) == 1
    assert "Traceback" not in out


def test_a_cache_that_cannot_be_written_keeps_nothing_and_says_nothing(sft: paper.Door, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    keep()
    assert rates.kept(asked()) is None
    assert sft("check", "r.yaml")[0] == 0


def test_a_night_is_its_micro_batches_and_steps(sft: paper.Door) -> None:
    made = plan.make(recipe.load("r.yaml"), Path("base"))
    tokens = [len(item.ids) for item in made.epochs.order(0)]
    assert made.micro_batches(0) == [[one] for one in tokens]
    work = Work(trained=4, read=0, again=0, filled=0)
    wanted = sum(sum(len(item.ids) for item in made.epochs.order(epoch)) for epoch in (0, 4, 9)) * 10 / 3 * 4 / 100
    steps = 40 * rates._TRAINER
    assert rates.training_seconds(made, work, EVEN) == pytest.approx(wanted + steps, rel=1e-6)
    twice = rates.training_seconds(made, Work(4, 0, 4, 0), EVEN)
    assert twice == pytest.approx(1.5 * wanted + steps, rel=1e-6)
    assert rates.filling_seconds(made, Work(1, 0, 0, 3), EVEN) > 0


# --- too small a card


def too_small(*sets: str) -> tuple[str, float]:
    """The remedy that `--gpu 12GB` names for a 7B in bf16, and the GiB it is about."""
    wanted = ["base=mistralai/Mistral-7B-v0.1", "quantization=none", "data.max_tokens=4096", *sets]
    found = outlook.look(Path("r.yaml"), wanted, "12GB")
    (remedy,) = [one.remedy for one in found.problems] or [""]
    return remedy, next(float(fact.reason.split(": ")[1].split()[0]) for fact in found.facts if fact.name == "against")


def test_each_remedy_says_what_it_saves_and_saves_it(sft: paper.Door) -> None:
    long = " ".join(f"word{n} and another" for n in range(700))
    Path("talk/long.md").write_text(paper.example("A long one?", f"### conclusion\n{long}", id="long"))
    whole = ("machine.activation_checkpointing=false", "batch_size=4", "machine.micro_batch=4")
    remedy, need = too_small(*whole)
    told = re.findall(r"((?:[a-z_]+\.)?[a-z_]+): (\S+) saves ([0-9.]+) GiB", remedy)
    assert [key for key, _, _ in told][:2] == ["machine.activation_checkpointing", "machine.micro_batch"]
    assert re.search(r": enough, [0-9.]+ GiB are needed then\.$", remedy)
    settings = dict(one.split("=") for one in whole)
    for key, value, saved in told:
        settings[key] = value
        sets = [f"{key}={value}" for key, value in settings.items() if key != "quantization"]
        _, less = too_small(*sets, *(["quantization=nf4"] if "quantization" in settings else []))
        assert need - less == pytest.approx(float(saved), abs=0.02), key
        need = less


def test_what_no_setting_can_mend_is_said_so(sft: paper.Door) -> None:
    found = outlook.look(Path("r.yaml"), ["base=mistralai/Mistral-7B-v0.1"], "1GB")
    (problem,) = found.problems
    assert "not enough" in problem.remedy
    assert "larger card or a smaller base" in problem.remedy


def test_savings_only_ever_save() -> None:
    shape = memory.WELL_KNOWN["mistral-7b-v0.1"]
    load = Load(shape, "int8", 41_943_040, 32, "adamw", 8192, False)
    made = plan.make(recipe.load(Path(__file__).parent.parent / "recipes" / "quickstart.yaml"), bases.POCKET)
    need = memory.total(load)
    for words, less in ledger.savings(made, load):
        assert memory.total(less) < need, words
        need = memory.total(less)
