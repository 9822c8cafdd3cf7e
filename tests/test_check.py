"""`sft check`: all faults at once, then every number with its reason; whatever a file holds, never a traceback."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import paper
import pytest

from finetune import bases, ledger, memory, outlook
from finetune.errors import UserError
from finetune.memory import Load

ROOT = Path(__file__).parent.parent


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    """In a folder of its own, on a computer of 16 GiB with 100 GiB free, on a terminal of 100 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(ledger.machine, "memory_gib", lambda: 16.0)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(ledger.shutil, "disk_usage", lambda _path: usage(0, 0, 100 * 2**30))
    return paper.Door(capsys, monkeypatch)


def test_a_good_recipe_is_told_number_by_number(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    code, out, err = sft("check", "r.yaml", "--gpu", "12GB")
    assert (code, err) == (0, "")
    assert out == (Path(__file__).parent / "transcripts" / "check.txt").read_text()


def test_it_fits_a_narrow_terminal(sft: paper.Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paper.folder(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = sft("check", "r.yaml", "--gpu", "12GB")
    assert max(map(len, out.splitlines())) <= 60


BROKEN = """\
base: ./bsae
lora: {rnak: 8, targets: [q_prj]}
data: {train: talk, held_out: 0.9}
formats:
  train: [chatml, alpaka]
  held_out: [zephyr, chatml]
optimizer:
  learning_rate: 1e-7x
  warmup_steps: 5
machine: {micro_batch: 2}
epochs: 0
"""
TOLD = """\
r.yaml:1  base is ./bsae, where there is nothing.  Did you mean {folder}/base?
r.yaml:2  lora.rnak is not a setting.  Did you mean lora.rank?
r.yaml:3  data.held_out is 0.9.  Write auto, a share from 0 to 0.34, or a path.
r.yaml:5  alpaka is not a prompt format.  Did you mean alpaca?
r.yaml:6  formats.held_out names chatml, which is also trained.  Take it out of one of the two.
r.yaml:8  optimizer.learning_rate is 1e-7x.  Write a number (> 0, <= 1).
r.yaml:9  optimizer.warmup_steps is 5, which the schedule constant ignores.  \
Write schedule: constant_with_warmup, or remove warmup_steps.
r.yaml:10  machine.micro_batch is 2, which does not divide batch_size 1.  Write 1 or auto.
r.yaml:11  epochs is 0.  Write a whole number (>= 1, <= 100000).
talk/moss.md:9  assistant speaks where user should.  Write [system], user, assistant, user, assistant ...
talk/tram.md  the file is empty.  Write an example in it, or remove it.
"""


def test_ten_faults_of_recipe_and_dataset_are_told_at_once(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    (tmp_path / "r.yaml").write_text(BROKEN)
    with (tmp_path / "talk" / "moss.md").open("a") as file:
        file.write("## assistant\nAgain.\n")
    (tmp_path / "talk" / "tram.md").write_text("")
    code, out, err = sft("check", "r.yaml")
    assert (code, out) == (2, "11 to mend.\n")
    assert err == TOLD.format(folder=tmp_path)


def test_as_json_there_is_one_document_on_stdout(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    code, out, err = sft("check", "r.yaml", "--json")
    said = json.loads(out)
    assert (code, err, said["problems"], said["recipe"]) == (0, "", [], "r.yaml")
    assert said["plan"]["Training"]["steps"] == {
        "value": 40,
        "reason": "4 an epoch (4 texts at batch size 1) x 10 epochs",
    }
    code, out, err = sft("check", "r.yaml", "--json", "--set", "epochs=0", "--set", "lora.rnak=1")
    said = json.loads(out)
    assert (code, said["plan"], len(said["problems"]), len(err.splitlines())) == (2, {}, 2, 2)
    assert said["problems"][0]["file"].startswith("--set")
    code, out, _ = sft("check", "absent.yaml", "--json")
    assert (code, json.loads(out)["problems"][0]["what"]) == (2, "there is no such file.")


def test_a_base_without_its_adapters_matrices_is_refused(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    code, _, err = sft("check", "r.yaml", "--set", "lora.targets=[q_prj]", "--set", "lora.layers={top: 9}")
    assert code == 2
    assert "lora.targets: this base has no q_prj." in err
    assert "lora.layers: top 9 of 4 layers." in err


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_base_that_is_not_whole_is_refused(sft: paper.Door, tmp_path: Path, missing: str) -> None:
    paper.folder(tmp_path)
    (tmp_path / "base" / missing).unlink()
    code, _, err = sft("check", "r.yaml")
    assert code == 2
    assert len(err.splitlines()) == 1


def test_a_card_that_is_too_small_is_refused_with_remedies(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    seven = ["--set", "base=mistralai/Mistral-7B-v0.1", "--set", "quantization=none"]
    code, out, err = sft("check", "r.yaml", *seven, "--gpu", "12 gib")
    assert code == 2
    assert "12 GiB of GPU memory would not do" in err
    assert "quantization: nf4" in err
    assert "too small" in out  # the plan is shown all the same
    code, _, err = sft("check", "r.yaml", "--gpu", "a lot")
    assert (code, err) == (2, "--gpu a lot is no size.  Write the card's memory, such as --gpu 12GB.\n")


def test_without_the_tokenizer_it_estimates_and_names_the_remedy(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    code, out, _ = sft("check", "r.yaml", "--set", "base=mistralai/Mistral-7B-v0.1", "--set", "revision=abc")
    assert code == 0
    joined = " ".join(out.split())
    assert re.search(r"~\d+ tokens the words of all trained examples; estimated at 4 characters a token", joined)
    assert "hf download mistralai/Mistral-7B-v0.1 config.json tokenizer.json tokenizer_config.json" in joined
    assert "7.24 B weights" in joined
    assert "13.49 GiB" in joined


def cached(home: Path, **files: Path | str) -> None:
    """A repository in the Hub's cache, as `hf download` leaves it."""
    snapshot = home / "hub" / "models--me--mine" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    for name, content in files.items():
        text = content.read_text() if isinstance(content, Path) else content
        (snapshot / name.replace("__", ".").replace("_dash_", "-")).write_text(text)


def test_a_base_in_the_cache_is_counted_and_the_rest_is_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = paper.base(tmp_path / "base")
    index = {"metadata": {"total_size": 2**30}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    small = {f"{name}__json": folder / f"{name}.json" for name in ("config", "tokenizer", "tokenizer_config")}
    cached(tmp_path, **small, model__safetensors__index__json=json.dumps(index), one__safetensors="")
    known = bases.look_up("me/mine")
    assert known.counted
    assert known.shape is not None
    assert known.shape.layers == 4
    assert known.download == pytest.approx(0.5)
    assert bases.look_up("me/other").download is None


def test_a_hub_dataset_is_said_not_to_be_read(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    code, out, err = sft("check", "r.yaml", "--set", "data.train=someone/something")
    assert (code, err) == (0, "")
    assert "someone/something is on the Hub, which `sft check` does not ask" in " ".join(out.split())


def test_well_known_shapes_have_their_published_sizes() -> None:
    sizes = {name: shape.weights for name, shape in memory.WELL_KNOWN.items()}
    assert sizes["mistral-7b-v0.1"] == 7_241_732_096
    assert sizes["llama-2-7b"] == 6_738_415_616
    assert sizes["meta-llama-3-8b"] == 8_030_261_248
    assert sizes["qwen2.5-7b"] == 7_615_616_512 - 28 * (3584 + 2 * 512)  # its attention biases
    assert memory.well_known("mistralai/Mistral-7B-Instruct-v0.1") == memory.WELL_KNOWN["mistral-7b-v0.1"]
    assert memory.well_known("someone/unheard-of") is None
    shape = memory.WELL_KNOWN["mistral-7b-v0.1"]
    assert memory.adapter_weights(shape, 16, memory.MATRICES, 32) == 41_943_040


def test_a_seven_b_in_four_bits_fits_twelve_gib_only_when_checkpointed() -> None:
    shape = memory.WELL_KNOWN["mistral-7b-v0.1"]
    loads = [Load(shape, "nf4", 41_943_040, 32, "adamw", 2048, again) for again in (0, 32)]
    plain, again = (sum(line.gib for line in memory.bill(load)) for load in loads)
    assert again < 10 < 12 < plain
    few = memory.recomputed(loads[0], 12.0)
    assert 0 < few < 32
    one, fewer = (memory.total(replace(loads[0], recomputed=count)) for count in (few, few - 1))
    assert one <= 0.95 * 12 < fewer  # a twentieth of a card is left alone
    assert memory.recomputed(loads[0], 3.0) == 32
    base = memory.bill(loads[0])[0].gib
    assert base == pytest.approx(6_979_321_856 * (4 + 0.127) / 8 / 2**30, rel=1e-3)  # 0.127 bits [QLoRA]


def test_what_lies_below_the_trained_layers_is_neither_held_nor_computed() -> None:
    shape = memory.WELL_KNOWN["mistral-7b-v0.1"]
    loads = [Load(shape, "nf4", 10_485_760, 8, "adamw", 1024, 8, below) for below in (0, 24)]
    whole, short = ({line.name: line.gib for line in memory.bill(load)} for load in loads)
    assert short["base"] == pytest.approx(whole["base"] / 4)
    assert sum(short.values()) < 3 < sum(whole.values())
    assert memory.lower_layers(loads[1]) == pytest.approx(whole["base"] * 3 / 4)
    assert memory.training_flops(loads[1], 1) < 0.3 * memory.training_flops(loads[0], 1)
    assert memory.prefix(loads[1], 1024) == 1024 * 4096 * 4 / 2**30


def test_minutes_come_from_a_run_on_this_machine(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    assert "a guess" in sft("check", "r.yaml")[1]
    from finetune import recipe

    run = tmp_path / "runs" / "before"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.resolved_yaml(recipe.load("r.yaml")))
    row = {"kind": "step", "step": 1, "tokens": 191, "seconds": 0.5}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(row)] * 5) + '\n{"torn')
    said = json.loads(sft("check", "r.yaml", "--json")[1])["plan"]["Disk and time"]
    assert said["  training"]["value"] == pytest.approx(7640 / 382 / 60, rel=0.05)
    assert said["time"]["reason"] == "measured in runs/before"
    assert "a guess by what they read and write" in said["  looks"]["reason"]


def test_minutes_hold_the_looks_of_an_earlier_run_at_the_same_texts(sft: paper.Door, tmp_path: Path) -> None:
    paper.folder(tmp_path)
    from finetune import bases, plan, recipe

    wanted, run = recipe.load("r.yaml"), tmp_path / "runs" / "before"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe.resolved_yaml(wanted))
    texts = plan.make(wanted, bases.look_up(wanted.base).vocabulary).fingerprint()
    (run / "run.json").write_text(json.dumps({"fingerprints": {"rendered texts": texts}}))
    rows: list[dict[str, object]] = [{"kind": "step", "step": 1, "tokens": 191, "seconds": 0.5}] * 5
    for step, kind, took in ((0, "full", 40.0), (3, "light", 1.0), (40, "full", 60.0), (44, "full", 80.0)):
        rows += [{"kind": "look", "look": kind, "step": step, "took": took}, {"kind": "look", "step": step}]
    odd: list[dict[str, object]] = [{"kind": "step", "tokens": 1, "seconds": 0}, {"kind": "look", "took": None}]
    odd += [{"kind": "look", "look": "full", "step": 9, "took": "x"}, {"kind": "step", "tokens": 0, "seconds": 1}]
    alarm = {"kind": "look", "look": "full", "step": 9, "took": 1e6, "cause": "alarm"}
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, *odd, alarm])))
    said = json.loads(sft("check", "r.yaml", "--set", "watch.every=5", "--json")[1])["plan"]["Disk and time"]
    assert said["  looks"]["value"] == pytest.approx((40 + 2 * 70) / 60)  # the base's, and at epoch 5 and 10
    assert said["time"]["value"] == pytest.approx(said["  training"]["value"] + said["  looks"]["value"])
    other = sft("check", "r.yaml", "--set", "watch.every=5", "--set", "formats.sampled=0.5", "--json")[1]
    assert "a guess" in json.loads(other)["plan"]["Disk and time"]["  looks"]["reason"]
    (next(tmp_path.glob("talk/*.md"))).write_text(paper.example("Another one?", "### conclusion\nYes.", id="other"))
    grown = json.loads(sft("check", "r.yaml", "--set", "watch.every=5", "--json")[1])["plan"]["Disk and time"]
    assert "a guess" in grown["  looks"]["reason"], "other texts take another time"


def test_no_torch_is_imported_before_the_night(tmp_path: Path) -> None:
    paper.folder(tmp_path)
    (tmp_path / "far.yaml").write_text((tmp_path / "r.yaml").read_text().replace("./base", "mistralai/Mistral-7B-v0.1"))
    verbs = [
        "--help",
        "ls",
        "explain",
        "check r.yaml",
        "check far.yaml",
        "preview r.yaml",
        "new x.yaml --from quickstart",
    ]
    code = f"""
import sys
from finetune import cli
for words in {verbs!r}:
    sys.argv = ["sft", *words.split()]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    heavy = {{"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes"}} & set(sys.modules)
    assert not heavy, (words, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# --- whatever a file holds

TRICKS: list[bytes] = [
    b"&a [*a]",
    b"&a {b: *a}",
    b"!!python/object/apply:os.system ['true']",
    b"!!python/name:os.system",
    b"!<tag:yaml.org,2002:python/object:x> {}",
    b"<<: {epochs: 3}",
    b"? [a, b]\n: c",
    b"--- \n---\n",
    b"%YAML 9.9\n",
    b"%TAG ! !python\n",
    b"\t",
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b'"\\ud800"',
    b'"\\UFFFFFFFF"',
    b"{" * 3000,
    b"[" * 3000,
    b"9" * 5000,
    b"1e999",
    b"-.inf",
    b".nan",
    b"|\n  x\n y",
    b"'",
    b"\x1b[2J",
    b"\r\n",
    b"a: " * 500,
    b"../" * 400,
    b"/dev/null",
    b"~nobody/x",
    b"epochs: 1\nepochs: 2\n",
    b"base: ./talk\n",
    b"base: a/b--c..d\n",
    b"data: []\n",
    b"formats: {train: [native]}\n",
    b"formats: {train: [r.yaml]}\n",
    b"## assistant\n",
    b"<!-- no-loss -->",
    b"---\nid: [1, {2: 3}]\n---\n",
    b"### perspective:\n",
    b"\xf0\x9f\x98\x80" * 50,
]


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """A file after one to three accidents."""
    for _ in range(draw.randint(1, 3)):
        at, size = draw.randrange(len(raw) + 1), draw.randint(1, 40)
        kind = draw.randrange(7)
        if kind == 0:
            raw = raw[:at] + draw.choice(TRICKS) + raw[at:]
        elif kind == 1:
            raw = raw[:at] + draw.choice(TRICKS) + raw[at + size :]
        elif kind == 2:
            raw = raw[:at] + draw.randbytes(size) + raw[at + size :]
        elif kind == 3:
            raw = raw[:at] + raw[at + size :]
        elif kind == 4:
            lines = raw.splitlines(keepends=True)
            draw.shuffle(lines)
            raw = b"".join(lines)
        elif kind == 5:
            raw = raw.decode("utf-8", "replace").encode(draw.choice(["utf-16", "latin-1", "utf-7", "cp037"]), "replace")
        else:
            raw = draw.choice([b"", b"\n" * 9, raw * 3, raw[:at], b"x" * (2**20 + 1)])
    return raw


@pytest.mark.parametrize("part", range(10))
def test_no_mutated_file_ever_ends_in_a_traceback(sft: paper.Door, tmp_path: Path, part: int) -> None:
    """Thirty a part: recipes and examples by turns, through `check`, and some through `preview`."""
    paper.folder(tmp_path)
    targets = [tmp_path / "r.yaml", tmp_path / "talk" / "moss.md", tmp_path / "talk" / "more.jsonl"]
    targets[2].write_text('{"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}\n')
    whole = {target: target.read_bytes() for target in targets}
    for number in range(30):
        draw = random.Random(1000 * part + number)
        target = targets[number % 3]
        target.write_bytes(mutated(whole[target], draw))
        words: list[Any] = ["preview" if number % 10 == 9 else "check", "r.yaml", *(["--json"] if number % 2 else [])]
        code, out, err = sft(*words)
        assert code in (0, 2), (part, number, err)
        assert "Traceback" not in out + err
        if "--json" in words:
            json.loads(out)
        target.write_bytes(whole[target])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_no_mutated_base_ever_ends_in_a_traceback(sft: paper.Door, tmp_path: Path, name: str) -> None:
    paper.folder(tmp_path)
    target = tmp_path / "base" / name
    whole = target.read_bytes()
    for number in range(12):
        target.write_bytes(mutated(whole, random.Random(number)))
        code, _, err = sft("check", "r.yaml")
        assert code in (0, 2), (name, number, err)


def test_a_size_is_read_as_it_stands_on_the_box() -> None:
    assert [outlook.gib_of(text) for text in ("12GB", "12 GiB", "24g", "80", "7.5 gb")] == [12, 12, 24, 80, 7.5]
    for wrong in ("", "GB", "-1", "0", "1e9GB", "12MB"):
        with pytest.raises(UserError, match="is no size"):
            outlook.gib_of(wrong)
