"""`sft train` at the door: whole transcripts, exit codes, what Ctrl-C leaves, and a README that knows every verb."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import paper
import pytest
import small
import yaml

from finetune import __version__, cli, night, recipe, runs
from finetune.runs import RunFolder

ROOT = Path(__file__).parent.parent
VERBS = [one.name or one.callback.__name__ for one in cli.app.registered_commands if one.callback]


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    """In a folder of its own, on a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return paper.Door(capsys, monkeypatch)


# --- the door


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["ls", "formats"], ["explain"]])
def test_what_needs_no_model_imports_no_torch(words: list[str], tmp_path: Path) -> None:
    code = "import sys\nfrom finetune import cli\nsys.argv = ['sft', *sys.argv[1:]]\ntry: cli.main()\n"
    code += "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "0 []"


def test_version_is_one_line(sft: paper.Door) -> None:
    assert sft("--version") == (0, f"{__version__}\n", "")


def test_every_verb_has_a_line_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [verb for verb in VERBS if not re.search(rf"^\| `sft {verb}\b.*\| \S", text, re.MULTILINE)]
    assert not missing, f"README.md has no table line for sft {', sft '.join(missing)}"


def test_the_readme_promises_no_verb_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    promised = set(re.findall(r"\bsft ([a-z]+)\b", "\n".join(re.findall(r"`([^`]*sft [^`]*)`", text))))
    assert promised <= set(VERBS), promised - set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_in_help_is_one_the_door_understands(verb: str, sft: paper.Door) -> None:
    example = sft(verb, "--help")[1].rstrip().splitlines()[-1].partition("Example: sft ")[2].split()
    assert example[0] == verb
    options = {word for word in example if word.startswith("-")}
    told = sft(verb, "--help")[1]
    assert all(re.search(rf"(?<!\w){re.escape(option)}\b", told) for option in options)


# --- what is refused before anything begins


def test_a_typo_exits_2_with_file_line_and_remedy_and_no_traceback(sft: paper.Door, tmp_path: Path) -> None:
    path = small.recipe(tmp_path)
    path.write_text(path.read_text().replace("rank: 4", "rnak: 4").replace("epochs: 4", "epochs: four"))
    lines = {line.split(":")[0].strip(): n for n, line in enumerate(path.read_text().splitlines(), start=1)}
    wanted = sorted(
        [
            (lines["epochs"], "epochs is four.  Write a whole number (>= 1, <= 100000)."),
            (lines["rnak"], "lora.rnak is not a setting.  Did you mean lora.rank?"),
        ]
    )
    told = "".join(f"small.yaml:{line}  {what}\n" for line, what in wanted)
    assert sft("train", "small.yaml") == (2, "", told)
    assert not (tmp_path / "runs").exists()


def test_a_missing_recipe_says_so(sft: paper.Door, tmp_path: Path) -> None:
    code, out, err = sft("train", "nothing.yaml")
    assert (code, out) == (2, "")
    assert err.startswith("nothing.yaml  ")
    assert len(err.splitlines()) == 1
    (tmp_path / "empty").mkdir()
    code, out, err = sft("train", "empty")
    assert (code, out) == (2, "")
    assert err == "empty  is a folder, but no run.  Name a recipe, or a folder that `sft train` wrote.\n"


def test_a_wrong_option_exits_2(sft: paper.Door) -> None:
    code, out, err = sft("train", "small.yaml", "--fersh")
    assert (code, out) == (2, "")
    assert "--fersh" in err
    assert "Traceback" not in err


def test_as_json_faults_are_one_document(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path)
    code, out, err = sft("train", "small.yaml", "--json", "--set", "lora.rank=0", "--set", "epochs=0")
    assert code == 2
    problems = json.loads(out)["problems"]
    assert [one["what"] for one in problems] == ["lora.rank is 0.", "epochs is 0."]
    assert all(one["remedy"] for one in problems)
    assert len(err.splitlines()) == 2


def test_a_base_that_is_nowhere_is_told_before_a_folder_is_made(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path, base="nobody/no-such-base")
    code, out, err = sft("train", "small.yaml")
    assert code == 2
    assert "nobody/no-such-base" in err
    assert "Traceback" not in err + out
    assert not (tmp_path / "runs/small/run.json").exists()


# --- a run


def test_a_run_from_its_first_line_to_its_last(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path, epochs=2)
    code, out, err = sft("train", "small.yaml")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Loading pocket (nf4)."
    assert [line.split(":")[0] for line in lines if line.startswith("look")] == ["look at epoch 0", "look at epoch 2"]
    assert any(
        re.fullmatch(r"epoch 1/2  step 3  loss \d\.\d{5}  lr 1\.00e-03  travel 3\.00e-03  .*", one) for one in lines
    )
    end = lines[-3:]
    assert [line.split(" ")[0] for line in end] == ["Verdict:", "Next:", "Adapter:"]
    assert "on 2 held-out examples" in end[0]
    assert end[2].startswith("Adapter: runs/small/adapter (epoch 2: ")
    assert (tmp_path / "runs/small/report.html").is_file()
    assert sft("train", "small.yaml") == (0, "\n".join(end) + "\n", "")  # again: the same result, at once
    assert sft("train", "runs/small") == (0, "\n".join(end) + "\n", "")


def test_planned_numbers_have_reasons(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path, epochs=1)
    sft("train", "small.yaml")
    numbers = runs.read_json(tmp_path / "runs/small/run.json")["derived"]
    assert {"steps", "travel", "micro_batch", "accumulation", "looks"} <= set(numbers)
    assert all(len(one["reason"]) >= 20 for one in numbers.values()), numbers
    assert numbers["steps"] == {"value": 3, "reason": "3 an epoch (6 texts an epoch, batch size 2)"}


def test_json_prints_one_document(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path, epochs=1)
    code, out, err = sft("train", "small.yaml", "--json", "--out", "elsewhere")
    assert code == 0
    said = json.loads(out)
    assert said["run"] == "elsewhere"
    assert said["adapter"] == "elsewhere/adapter"
    assert (said["state"], said["steps"], said["interrupted"]) == ("finished", 3, False)
    assert "Loading pocket" in err  # talk and progress are on stderr


def test_fresh_renames_and_never_deletes(sft: paper.Door, tmp_path: Path) -> None:
    path = small.recipe(tmp_path, epochs=1)
    sft("train", "small.yaml")
    before = (tmp_path / "runs/small/adapter/adapter_model.safetensors").read_bytes()
    path.write_text(path.read_text().replace("rank: 4", "rank: 8"))
    code, _, err = sft("train", "small.yaml")
    assert code == 2
    assert "lora.rank was 4, is 8" in err
    assert "--fresh" in err
    code, out, _ = sft("train", "small.yaml", "--fresh")
    assert code == 0
    assert out.splitlines()[0] == "The old run is now runs/small.old-1."
    assert (tmp_path / "runs/small.old-1/adapter/adapter_model.safetensors").read_bytes() == before
    assert recipe.load_resolved(tmp_path / "runs/small/recipe.yaml").lora.rank == 8
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    code, _, err = sft("train", "small.yaml", "--fresh", "--out", "mine")
    assert (code, err) == (2, "mine  is no run folder.  Choose another --out.\n")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "ten years"


def test_a_setting_on_the_command_line_wins(sft: paper.Door, tmp_path: Path) -> None:
    small.recipe(tmp_path)
    sft("train", "small.yaml", "--set", "epochs=1", "--set", "optimizer.learning_rate=2e-5", "--json")
    steps = [row for row in runs.read_lines(RunFolder(tmp_path / "runs/small").metrics) if row["kind"] == "step"]
    assert [row["lr"] for row in steps] == [2e-5] * 3


def test_our_own_fault_in_a_run_is_exit_1_and_in_its_log(
    sft: paper.Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(night.train, "train", lambda *_given: 1 / 0)
    small.recipe(tmp_path)
    code, _, err = sft("train", "small.yaml")
    assert code == 1
    assert "ZeroDivisionError" in err
    assert len(err.splitlines()) == 1
    assert "ZeroDivisionError" in (tmp_path / "runs/small/log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_exits_130_and_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    path = small.recipe(tmp_path, epochs=400)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "watch": {"every": 400}}))
    words = [sys.executable, "-m", "finetune", "train", "small.yaml"]
    metrics, ended = tmp_path / "runs/small/metrics.jsonl", time.monotonic() + 120
    with subprocess.Popen(words, cwd=tmp_path, stdout=-1, stderr=-1, text=True, env={**os.environ}) as child:
        while child.poll() is None and time.monotonic() < ended:
            if metrics.is_file() and '"kind": "step"' in metrics.read_text().replace('":"', '": "'):
                break
            time.sleep(0.05)
        child.send_signal(number)
        out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (130, "")
    assert "Stopping after this step; once more to stop at once." in out
    assert "Stopped; everything is saved. Go on with: sft train runs/small\n" in out
    assert "There is no adapter yet" in out
    run = RunFolder(tmp_path / "runs/small")
    steps = [row["step"] for row in runs.read_lines(run.metrics) if row["kind"] == "step"]
    kept = run.newest_valid(full=True)
    assert kept is not None
    assert kept.step == steps[-1] < 1200
    assert runs.read_json(run.run_json)["state"] == "stopped"
