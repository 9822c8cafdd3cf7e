"""The small verbs and the door itself: every verb has help with an example, a JSON form, and no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import paper
import pytest

from finetune import cli, plan, prompts, recipe, starters, tables
from finetune.errors import UserError

VERBS = [one.name or one.callback.__name__ for one in cli.app.registered_commands if one.callback]


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return paper.Door(capsys, monkeypatch)


# --- the door


def test_every_verb_has_help_that_ends_with_an_example(sft: paper.Door) -> None:
    _, listed, _ = sft("--help")
    for verb in VERBS:
        assert f"\n  {verb} " in listed
        code, out, _ = sft(verb, "--help")
        assert code == 0
        assert out.rstrip().splitlines()[-1].strip().startswith(f"Example: sft {verb} ")
    assert "..." not in listed.partition("Commands:")[2]  # no verb's line is cut


def test_help_is_light() -> None:
    """Processor time, so that a busy computer changes nothing; wall time on an idle one is about the same."""
    code = "import sys, resource; sys.argv = ['sft', '--help']\nfrom finetune import cli\ntry: cli.main()\n"
    code += "except SystemExit: pass\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_utime)\n"
    code += "print(sorted({'torch', 'pydantic', 'yaml', 'rich', 'tokenizers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = out.splitlines()[-2:]
    assert float(seconds) < 0.6
    assert heavy == "[]"


def test_our_own_fault_is_one_line_and_exit_1(sft: paper.Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("finetune.inventory.KINDS", {"runs": lambda: 1 / 0})
    code, out, err = sft("ls")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "ZeroDivisionError" in err
    assert "Traceback" in next(tmp_path.glob("sft-fault-*.txt")).read_text()


def test_train_names_the_line_of_a_setting_only_the_plan_can_judge(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    (tmp_path / "r.yaml").write_text((tmp_path / "r.yaml").read_text().replace("[zephyr]", "[zephir]"))
    wanted = recipe.load("r.yaml")
    with pytest.raises(UserError, match=r"r\.yaml:4  zephir is not a prompt format"), cli._blaming("r.yaml", []):
        plan.make(wanted, tmp_path / "base")


# --- ls


def test_ls_lists_all_four(sft: paper.Door) -> None:
    code, out, err = sft("ls")
    assert (code, err) == (0, "")
    heads = [line.split(" (")[0] for line in out.splitlines() if not line.startswith(" ")]
    assert heads == ["recipes", "formats", "datasets", "runs"]
    for name in (*prompts.shipped(), *(one.stem for one in starters.starters("recipes")), "pocket"):
        assert name in out
    assert "none in ./runs" in out


def test_ls_of_one_kind_is_a_line_each(sft: paper.Door) -> None:
    _, out, _ = sft("ls", "recipes")
    assert len(out.splitlines()) == len(starters.starters("recipes"))
    _, out, _ = sft("ls", "formats")
    assert len(out.splitlines()) == len(prompts.shipped()) + 1
    line = next(line for line in out.splitlines() if line.startswith("chatml "))
    assert "special-token" in line
    assert "also OpenHermes-2.5, Dolphin" in line
    code, out, err = sft("ls", "models")
    assert (code, out) == (2, "")
    assert "There is recipes, formats, datasets, runs." in err


RUNS = """\
runs/broken  cannot be read (damaged)
runs/done    finished                  epoch 40 of 40   adapter of epoch 20
runs/new     running                   epoch 1.5 of 40  no adapter yet
"""


def test_ls_runs_survives_a_damaged_one(sft: paper.Door, tmp_path: Path) -> None:
    facts = {"done": {"state": "finished", "epochs": 40, "chosen": {"epoch": 20.0, "step": 3}}}
    facts["new"] = {"state": "running", "epochs": 40}
    for name, said in facts.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text(json.dumps(said))
    (tmp_path / "runs" / "done" / "metrics.jsonl").write_text('{"kind": "step", "epoch": 40.0}\n')
    (tmp_path / "runs" / "new" / "metrics.jsonl").write_text('{"kind": "step", "epoch": 1.5}\n{"kind": "st')
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "run.json").write_text("{")
    _, out, _ = sft("ls", "runs")
    assert sorted(out.splitlines()) == RUNS.splitlines()
    said = json.loads(sft("ls", "runs", "--json")[1])["runs"]
    assert {row["folder"]: row["chosen"] for row in said} == {"runs/done": 20.0, "runs/new": None, "runs/broken": None}


def test_ls_datasets_counts_examples(sft: paper.Door) -> None:
    said = json.loads(sft("ls", "datasets", "--json")[1])["datasets"]
    for row in said:
        assert row["examples"] >= 60
        assert row["about"], row["name"]


# --- new


def test_new_says_what_it_wrote_and_what_is_next(sft: paper.Door, tmp_path: Path) -> None:
    code, out, err = sft("new", "my own.yaml", "--from", "quickstart", "--with-data")
    assert (code, err) == (0, "")
    assert out == (
        "Wrote pocket\nWrote my own.yaml\n"
        "Next: edit it (`sft explain` says what each line means), then sft check 'my own.yaml'\n"
    )
    assert recipe.load("my own.yaml").data.train == str(tmp_path / "pocket")
    code, _, err = sft("new", "my own.yaml", "--from", "quickstart")
    assert code == 2
    assert "is there already" in err


def test_new_without_a_starter_names_them(sft: paper.Door, tmp_path: Path) -> None:
    for words in (["new", "x.yaml"], ["new", "x.yaml", "--from", "qzzk"]):
        code, out, err = sft(*words)
        assert (code, out) == (2, "")
        assert "quickstart" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [one.stem for one in starters.starters("recipes")])
def test_a_copy_of_every_starter_passes_check(sft: paper.Door, name: str) -> None:
    assert sft("new", "x.yaml", "--from", name)[0] == 0
    code, out, err = sft("check", "x.yaml")
    assert (code, err) == (0, "")
    assert out.endswith("Nothing to mend. Next: sft train x.yaml\n")


# --- explain

RANK = """\
lora.rank: 16
  a whole number; >= 1, <= 512
  Size of the adapter. More can hold more, and more by heart.
"""


def test_explain_one_setting(sft: paper.Door) -> None:
    assert sft("explain", "lora.rank") == (0, RANK, "")


def test_explain_a_section_and_everything(sft: paper.Door) -> None:
    _, out, _ = sft("explain", "optimizer")
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        one.key for one in recipe.settings() if one.key.startswith("optimizer.")
    ]
    _, out, _ = sft("explain")
    for one in recipe.settings():
        assert f"\n{one.key}: " in f"\n{out}"
    assert "base: (yours to write)" in out


def test_explain_an_unknown_setting_names_the_nearest(sft: paper.Door) -> None:
    assert sft("explain", "lora.rnak") == (2, "", "lora.rnak is not a setting.  Did you mean lora.rank?\n")
    assert "optimizer.learning_rate" in sft("explain", "learning_rate")[2]


def test_the_schema_is_what_editors_read(sft: paper.Door) -> None:
    said = json.loads(sft("explain", "--schema")[1])
    assert said["additionalProperties"] is False
    assert {"base", "data", "lora"} <= set(said["properties"])
    assert "description" in said["properties"]["epochs"]


# --- tables


def test_cut_lines_fit_and_wide_letters_count_twice() -> None:
    assert tables.columns([("a", "long " * 9), ("bcd", "x")], 20) == ["a    long long long…", "bcd  x"]
    assert tables.wide("日本e\u0301") == 5
    assert tables.columns([("日", "x"), ("ab", "y")]) == ["日  x", "ab  y"]


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert tables.harmless("a\x1b[2J\u202eb\ud800\n") == "a\\x1b[2J\\u202eb\\ud800\n"


def test_check_takes_little_more_than_its_libraries(tmp_path: Path) -> None:
    """Four times as much, when this was written; the least of three each, for a busy computer is slower."""
    libraries = "import pydantic, typer, numpy, jinja2, tokenizers, yaml, rich.console\n"
    check = "import sys\nsys.argv = ['sft', 'check', sys.argv[1]]\nfrom finetune import cli\ntry: cli.main()\n"
    check += "except SystemExit: pass\n"

    def least(code: str) -> float:
        words = [sys.executable, "-c", f"{code}import time\nprint(time.process_time())", str(quickstart)]
        told = [
            subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout for _ in range(3)
        ]
        return min(float(one.splitlines()[-1]) for one in told)

    quickstart = starters.find("quickstart")
    assert least(check) < 5 * least(libraries)
