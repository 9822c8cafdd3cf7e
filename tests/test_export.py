"""An export loads where it is meant to and says what was checked; nothing half, nothing of this machine in it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import finished
import gotemplates
import paper
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import bundle, disk, errand, export, llamacpp, merge, mergedfiles, model, opened, reread
from finetune.conversation import Turn
from finetune.errand import Wish
from finetune.errors import UserError
from finetune.export import Done
from finetune.opened import Opened


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a finished run; its files are written into folders beside it."""
    found = tmp_path_factory.mktemp("export")
    finished.run(found, quantization="nf4")
    return found


@pytest.fixture(scope="module")
def run(place: Path) -> Opened:
    return opened.read(place / "runs" / "done")


def made(run: Opened, out: Path, kind: Any, **wish: Any) -> Done:
    return export.export(run, Wish(kind, out=out, **wish))


@pytest.fixture(scope="module")
def merged(run: Opened, place: Path) -> Done:
    return made(run, place / "merged", "merged")


@pytest.fixture(scope="module")
def faithful(run: Opened, place: Path) -> Done:
    return made(run, place / "faithful", "merged", onto="dequantised", dtype="f32")


@pytest.fixture(scope="module")
def ggufs(run: Opened, place: Path) -> Done:
    return made(run, place / "gguf", "gguf", onto="dequantised", dtype="f32")


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: Path) -> paper.Door:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "100")
    return paper.Door(capsys, monkeypatch)


# --- merged


def test_merged_files_are_pefts_own_merge_rounded_once(run: Opened, merged: Done) -> None:
    net = AutoModelForCausalLM.from_pretrained(model.POCKET, dtype=torch.float32)
    wanted = PeftModel.from_pretrained(net, str(run.adapter)).merge_and_unload().state_dict()
    found = load_file(merged.folder / "model.safetensors")
    for name, values in found.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values, wanted[name].to(torch.bfloat16)), name


def test_the_files_are_a_model_transformers_loads_with_its_ends(merged: Done) -> None:
    net = AutoModelForCausalLM.from_pretrained(merged.folder)
    assert net.dtype == torch.bfloat16
    assert net.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(merged.folder).eos_token == "</s>"
    net.generate(torch.tensor([[1, 5]]), max_new_tokens=2)  # with no tokenizer at hand: no stop strings are required


def test_the_faithful_merge_says_what_the_trained_model_says(run: Opened, faithful: Done, merged: Done) -> None:
    gap, other = faithful.about["logits"], merged.about["logits"]
    assert gap["gap"] < 1e-3 * gap["effect"]
    assert gap["same_top"] == 1
    assert other["lost"] > 0.1  # the base in 16 bits is another one than in 4
    assert any("--onto dequantised" in told for told in merged.about["warnings"])
    nll = faithful.about["held_out_nll"]
    assert nll["trained"] == pytest.approx(nll["files"], abs=1e-4)
    ids = [1, 5, 6, 7, 8, 9]
    worn = opened.wear(run)
    net = AutoModelForCausalLM.from_pretrained(faithful.folder)
    torch.testing.assert_close(tiny.logits(net, ids), tiny.logits(worn.model, ids), rtol=1e-3, atol=1e-3)


def test_layer_by_layer_scores_are_the_whole_models(run: Opened, merged: Done) -> None:
    """Against transformers' own forward of the written files."""
    passages = errand.errand(run, Wish("merged")).passages()
    files = reread.Files(merged.folder, torch.device("cpu"))
    reader = reread.speaker(files, run.plan.vocabulary.tokenizer, [one.ids for one in passages])
    net = AutoModelForCausalLM.from_pretrained(merged.folder, dtype=torch.float32)
    for one, scored in zip(passages, reader.score([p.ids for p in passages], [p.read for p in passages]), strict=True):
        log_p = torch.log_softmax(tiny.logits(net, one.ids), -1)
        at = [t for t in range(1, len(one.ids)) if one.read[t]]
        wanted = torch.stack([log_p[t - 1, one.ids[t]] for t in at])
        torch.testing.assert_close(scored.log_p, wanted, rtol=1e-4, atol=1e-4)


def test_the_chat_template_gives_trainings_tokens(merged: Done, run: Opened) -> None:
    assert "chat template: 8 of 8 questions get the tokens of training from transformers" in merged.about["verified"]
    tokenizer = AutoTokenizer.from_pretrained(merged.folder)
    talk = [("system", "Be kind."), ("user", "Hm?"), ("assistant", "Ja."), ("user", "So?")]
    shown = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in talk], tokenize=False, add_generation_prompt=True
    )
    from finetune import prompts

    turns = [Turn(role, text) for role, text in talk]  # type: ignore[arg-type]
    assert shown == "<s>" + prompts.prompt_text(turns, run.plan.formats["chatml"], run.plan.vocabulary)


def test_an_end_mark_of_one_token_becomes_an_end_of_the_model(run: Opened) -> None:
    one = errand.errand(run, Wish("merged", format="chatml"))
    assert mergedfiles.ends(one) == [2]
    assert mergedfiles.spelled_end(one) == "<|im_end|>"
    marks = {**run.plan.vocabulary.marks, "<|im_end|>": replace(run.plan.vocabulary.marks["</s>"], id=7)}
    known = replace(run, plan=replace(run.plan, vocabulary=replace(run.plan.vocabulary, marks=marks)))
    other = errand.errand(known, Wish("merged"))
    assert mergedfiles.ends(other) == [7, 2]
    assert mergedfiles.spelled_end(other) is None
    assert mergedfiles.spelled_end(errand.errand(run, Wish("merged", format="alpaca"))) is None  # the EOS ends it


def test_a_swallowed_adapter_is_warned_of_and_counted(tmp_path: Path) -> None:
    """Changes far below half a step of bf16."""
    net = tiny.stirred(tiny.adapted(model.POCKET), 1e-7)
    model.save_adapter(net, tmp_path, "pocket")
    found = bundle.Bundle(tmp_path)
    plan = merge.plan(model.POCKET, tmp_path)
    for one in plan.tensors:
        plan.weight(one)
    mergedfiles.told_of_rounding(found, plan.count, "bf16")
    assert plan.count.entries == 1_572_864
    assert plan.count.still_share is not None
    assert plan.count.still_share > 0.99
    assert plan.count.lost is not None
    assert plan.count.lost > 0.9
    assert "swallowed the adapter" in found.warnings[0]
    assert "--dtype" in found.warnings[0]
    finer = merge.plan(model.POCKET, tmp_path, "f32")
    for one in finer.tensors:
        finer.weight(one)
    assert finer.count.lost is not None
    assert finer.count.lost < 0.1


def test_large_weights_go_into_several_files(tmp_path: Path, run: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "_SHARD", 10**6)
    done = made(run, tmp_path / "x", "merged", check=False)
    shards = sorted(done.folder.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    whole = {name: values for shard in shards for name, values in load_file(shard).items()}
    assert index["weight_map"].keys() == whole.keys()
    assert AutoModelForCausalLM.from_pretrained(done.folder).num_parameters() > 2_000_000


# --- gguf and ollama


def test_llama_cpp_answers_as_the_trained_model_does(ggufs: Done) -> None:
    assert llamacpp.installed()
    told = ggufs.about["llama_cpp"]["done-f32.gguf"]
    assert (told["asked"], told["same"]) == (3, 3)
    assert all("3 of 3 questions" in one for one in ggufs.about["verified"] if "loaded by llama.cpp" in one)
    assert {*ggufs.about["files"]} == {"README.md", "done-f32.gguf", "done-lora.gguf"}
    assert not ggufs.about["warnings"]


def test_an_ollama_model_is_a_base_and_an_adapter_llama_cpp_loads(run: Opened, tmp_path: Path) -> None:
    done = made(run, tmp_path / "x", "ollama")
    read = gotemplates.parsed((done.folder / "Modelfile").read_text())
    assert read[:2] == [("from", "./pocket-f16.gguf"), ("adapter", "./done-lora.gguf")]
    assert all((done.folder / name).is_file() for _, name in read[:2])
    assert "done-lora.gguf on pocket-f16.gguf" in done.about["llama_cpp"]
    assert next(value for key, value in read if key == "stop") == "<|im_end|>"


def test_an_ollama_model_stands_on_a_name_or_is_merged(run: Opened, tmp_path: Path) -> None:
    named = made(run, tmp_path / "named", "ollama", source="mistral:text")
    assert {*named.about["files"]} == {"Modelfile", "README.md", "done-lora.gguf"}
    assert (named.folder / "Modelfile").read_text().startswith("FROM mistral:text\nADAPTER ./done-lora.gguf\n")
    whole = made(run, tmp_path / "whole", "ollama", only="model", check=False, format="alpaca")
    assert (whole.folder / "Modelfile").read_text().startswith("FROM ./done-f16.gguf\nTEMPLATE")
    with pytest.raises(UserError, match="adapter alone"):
        made(run, tmp_path / "none", "ollama", only="adapter")


SCRIPT = """import pathlib, sys
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--outfile") + 1])
here = sorted(path.name for path in pathlib.Path(words[0]).iterdir())
assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(here), here
out.write_bytes(pathlib.Path(sys.argv[0]).with_name("answer.gguf").read_bytes())
"""


def test_llama_cpps_own_converter_is_used_where_there_is_one(
    run: Opened, ggufs: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "llama.cpp"
    home.mkdir()
    (home / "convert_hf_to_gguf.py").write_text(SCRIPT)
    shutil.copyfile(ggufs.folder / "done-f32.gguf", home / "answer.gguf")
    monkeypatch.setenv("LLAMA_CPP", str(home))
    done = made(run, tmp_path / "x", "gguf", only="model", dtype="f32")
    assert done.about["written_by"] == "convert_hf_to_gguf.py"
    assert (done.folder / "done-f32.gguf").read_bytes() == (home / "answer.gguf").read_bytes()
    (home / "convert_hf_to_gguf.py").write_text("raise SystemExit('Model FooForCausalLM is not supported')")
    with pytest.raises(UserError, match="failed: Model FooForCausalLM is not supported"):
        made(run, tmp_path / "y", "gguf", only="model", converter=home)
    assert not (tmp_path / "y").exists()
    with pytest.raises(UserError, match="there is no convert_lora_to_gguf"):
        made(run, tmp_path / "y", "gguf", only="adapter", converter=home)


# --- folders


def test_no_file_names_a_place_of_this_machine(merged: Done, ggufs: Done, run: Opened, tmp_path: Path) -> None:
    shown = made(run, tmp_path / "presets", "presets")
    spelled = [str(run.run.path.resolve()), str(model.POCKET.resolve()), str(tmp_path), os.getcwd(), "/tmp/"]
    for done in (merged, ggufs, shown):
        for name, path in disk.files_below(done.folder).items():
            raw = path.read_bytes()
            assert not [one for one in spelled if one.encode() in raw], name


def test_a_path_that_slips_in_is_our_fault_and_leaves_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "home" / "me"
    with pytest.raises(RuntimeError, match=r"note\.txt names"), bundle.bundle(tmp_path / "x", 1, [secret]) as made:
        (made.folder / "note.txt").write_text(f"made in {secret}/run")
    assert os.listdir(tmp_path) == []


def test_nothing_half_is_left_when_it_fails(run: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is no export"):
        made(run, tmp_path / "x", "presets")
    monkeypatch.setattr(bundle.shutil, "disk_usage", lambda _path: os.statvfs_result and type("D", (), {"free": 2**20}))
    with pytest.raises(UserError, match=r"needs .* MiB and 1\.0 MiB are free"):
        made(run, tmp_path / "y", "merged")
    monkeypatch.undo()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save_file", full)
    with pytest.raises(UserError, match="the disk is full; nothing was left"):
        made(run, tmp_path / "y", "merged")
    assert os.listdir(tmp_path) == ["x"]


def test_a_second_export_takes_the_place_of_the_first(run: Opened, tmp_path: Path) -> None:
    made(run, tmp_path / "x", "presets")
    done = made(run, tmp_path / "x", "presets", format="alpaca")
    assert done.about["format"] == "alpaca"
    assert json.loads((tmp_path / "x" / "export.json").read_text())["format"] == "alpaca"
    assert os.listdir(tmp_path) == ["x"]


# --- the verb


def test_presets_are_told_line_by_line(sft: paper.Door, place: Path) -> None:
    code, out, err = sft("export", "runs/done", "--to", "presets", "--format", "alpaca")
    wanted = Path(__file__).with_name("transcripts") / "export.txt"
    assert (code, err) == (0, "")
    assert out == wanted.read_text()
    assert (place / "runs/done/export/presets/KoboldCpp").is_dir()


def test_json_tells_the_same(sft: paper.Door, tmp_path: Path) -> None:
    code, out, _ = sft("export", "runs/done", "--to", "presets", "--out", tmp_path / "x", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["folder"] == str(tmp_path / "x")
    assert told["format"] == "chatml"
    assert {"files", "verified", "warnings", "next", "step", "base"} <= told.keys()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--to", "ggfu"], "Did you mean gguf?"),
        (["--to", "merged", "--onto", "dequantized"], "Did you mean dequantised?"),
        (["--to", "merged", "--dtype", "q8_0"], "bf16, f16, f32"),
        (["--to", "presets", "--dtype", "f16"], "Presets hold no weights"),
        (["--to", "gguf", "--format", "zephyr"], "It was trained in chatml, alpaca."),
        (["--to", "gguf", "--set", "only=half"], "It is adapter or model."),
        (["--to", "gguf", "--set", "onyl=model"], "only, from, converter, check"),
        (["--to", "gguf", "--set", "check=maybe"], "check=no"),
    ],
)
def test_a_slip_is_told_with_what_to_do(sft: paper.Door, words: list[str], told: str) -> None:
    code, out, err = sft("export", "runs/done", *words)
    assert (code, out) == (2, "")
    assert told in err


def test_a_place_where_no_folder_can_be_made_exits_2(sft: paper.Door, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = sft("export", "runs/done", "--to", "presets", "--out", tmp_path / "file" / "presets")
    assert (code, out) == (2, "")
    assert "file/presets  cannot be written (" in err
    assert "Name another place with --out." in err


def test_a_run_without_an_adapter_exits_2(sft: paper.Door, place: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "young"
    shutil.copytree(place / "runs" / "done", copy, ignore=shutil.ignore_patterns("export"))
    finished.changed(copy, "run.json", chosen=None)
    code, _, err = sft("export", copy, "--to", "presets")
    assert code == 2
    assert "has no adapter yet" in err
    assert not (copy / "export").exists()
    assert sft("export", tmp_path, "--to", "presets")[0] == 2
