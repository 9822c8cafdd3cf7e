"""A push arrives whole, private, without what should stay here; and no fault of the network loses it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import finished
import hub_stand_in as stand_in
import huggingface_hub
import paper
import pytest
import torch
from hub_stand_in import Hub
from huggingface_hub import ModelCard, constants, snapshot_download
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finetune import card, corpus, hub, model, parcel, runs
from finetune.errors import UserError
from finetune.hub import Patience
from finetune.parcel import Wish
from finetune.runs import RunFolder

# 2026-11-21 huggingface_hub 2.4 uploads large files by a name that httpx2 2.16 has for them no longer
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
NONE, SOME = Patience(0, 0, 0), Patience(0.001, 0.004, 5.0)
ALWAYS = {"README.md", "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "verdict.json"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.run(tmp_path_factory.mktemp("push"))


@pytest.fixture
def run(finished_run: Path) -> Iterator[RunFolder]:
    """As it was finished, whatever a test does to its small files."""
    kept = {path: path.read_bytes() for path in finished_run.iterdir() if path.is_file()}
    yield RunFolder(finished_run)
    for path in [path for path in finished_run.iterdir() if path.is_file()]:
        path.unlink()
    for path, data in kept.items():
        path.write_bytes(data)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with stand_in.serving() as made:
        yield made


@pytest.fixture
def there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty Hub that the client of this process talks to."""
    settings: dict[str, Any] = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", stand_in.TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for kept in (server.repos, server.stored, server.seen, server.bodies):
        kept.clear()
    server.faults, server.makes_private = lambda _method, _path: None, True
    return server


def push(run: RunFolder, patience: Patience = NONE, **wish: Any) -> tuple[hub.Sent, list[str]]:
    told: list[str] = []
    made = parcel.make(run, Wish("me/rain", **wish))
    return hub.push(made, told.append, patience), told


def count(there: Hub, method: str, ending: str) -> int:
    return sum(one == method and path.endswith(ending) for one, path in there.seen)


# --- what arrives


def test_a_push_arrives_whole_and_private(there: Hub, run: RunFolder) -> None:
    sent, told = push(run)
    repo = there.repos["me/rain"]
    assert repo.private
    assert set(repo.files) - {".gitattributes"} == ALWAYS
    assert repo.files["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert repo.files["verdict.json"] == run.verdict.read_bytes()
    assert (sent.private, sent.changed, sent.files, told) == (True, True, 5, [])
    assert sent.commit == repo.commits[-1]


def test_no_path_no_token_and_nothing_pickled_leaves(there: Hub, run: RunFolder) -> None:
    push(run)
    sent = b"\n".join(there.bodies)
    for path in (run.path.resolve(), run.path.parent.parent.resolve(), Path.home()):
        assert not re.search(re.escape(str(path).encode()) + rb"(?![\w.-])", sent)
    assert stand_in.TOKEN.encode() not in sent
    assert not [name for name in there.repos["me/rain"].files if name.endswith((".bin", ".pt", ".pkl"))]
    kept = b"".join(path.read_bytes() for path in run.path.iterdir() if path.is_file())
    assert stand_in.TOKEN.encode() not in kept
    answers = [turn.text for one in corpus.read(run.path.parent.parent / "examples") for turn in one.turns]
    assert not [text for text in answers if text[:40].encode() in sent]


def test_plain_peft_loads_what_was_pushed(there: Hub, run: RunFolder, tmp_path: Path) -> None:
    push(run)
    folder = Path(snapshot_download("me/rain", local_dir=tmp_path / "back"))
    base = AutoModelForCausalLM.from_pretrained(model.POCKET, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(folder))
    here = load_file(run.adapter / "adapter_model.safetensors")
    found = {name.replace(".default", ""): weight for name, weight in adapted.state_dict().items() if "lora_" in name}
    assert found.keys() == here.keys()
    assert all(torch.equal(found[name], here[name]) for name in here)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad(), adapted.disable_adapter():
        bare = adapted(ids).logits
    assert not torch.allclose(adapted(ids).logits, bare, atol=1e-3)


def test_the_code_in_the_card_runs(there: Hub, run: RunFolder, tmp_path: Path, capsys: Any) -> None:
    push(run)
    folder = snapshot_download("me/rain", local_dir=tmp_path / "back")
    code = re.search(r"```python\n(.*?)```", (tmp_path / "back" / "README.md").read_text(), re.S)
    assert code
    exec(code[1].replace("'me/rain'", repr(folder)).replace("max_new_tokens=400", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()


def test_a_second_push_sends_nothing_and_makes_no_commit(there: Hub, run: RunFolder) -> None:
    push(run)
    before = list(there.repos["me/rain"].commits)
    sent, _ = push(run)
    assert not sent.changed
    assert there.repos["me/rain"].commits == before
    assert count(there, "PUT", "") == 1


def test_texts_go_only_when_asked_and_are_taken_out_again(there: Hub, run: RunFolder) -> None:
    runs.append_lines(run.samples, [{"prompt": "Rain?", "answer": "Yes, I like the rain on most days."}])
    run.report.write_text("<p>The rain helps the field number 0.</p>")
    push(run, with_texts=True)
    files = there.repos["me/rain"].files
    assert {"samples.jsonl", "split.json", "dataset/examples/rain.md"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or "training_args" in name or "log" in name]
    _, told = push(run)
    assert set(there.repos["me/rain"].files) - {".gitattributes"} == ALWAYS
    assert "Older versions still hold them" in told[0]


def test_a_report_without_texts_is_proven_to_have_none(run: RunFolder) -> None:
    words = "The farmer<br>The rain helps the field number 0. The child: I can play in the rain. Conclusion"
    with pytest.raises(UserError, match=r"report\.html  it holds \d+ words of rain"):
        parcel.make(run, Wish("me/rain"), report=f"<style>a {{}}</style><td>{words}</td>")
    made = parcel.make(run, Wish("me/rain"), report="<h1>ok</h1><td>1.602 ± 0.014</td>")
    assert "report.html" in {item.name for item in made.items}


@pytest.mark.parametrize("there", [True, False])
def test_what_is_recited_is_sent_only_when_asked(run: RunFolder, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "The rain helps the field number 0. The child: I can play in the rain."
    said = runs.read_json(run.verdict)
    row = {"id": "rain", "echo_whole": True, "words": words}
    runs.write_json(run.verdict, {**said, "recited": [row], "run": {**said["run"], "recited": [row]}})
    if not there:  # then nothing can be searched for
        monkeypatch.setattr(card, "dataset", lambda _recipe: [])
    bare, asked = (
        {item.name: item.bytes() for item in parcel.make(run, Wish("me/rain", with_texts=texts)).items}["verdict.json"]
        for texts in (False, True)
    )
    assert b"helps the field" not in bare
    assert json.loads(bare)["recited"] == [{"id": "rain", "echo_whole": True}]
    assert b"helps the field" in asked


# --- the card


def test_the_card_says_what_the_run_says(there: Hub, run: RunFolder) -> None:
    push(run)
    text = there.repos["me/rain"].files["README.md"].decode()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.language) == ("peft", "text-generation", ["en"])
    assert "verdict:ok" in data.tags
    assert data.license is None
    assert {one.metric_type: one.metric_value for one in data.eval_results} == {
        "nll_tstar": 1.96,
        "accuracy": pytest.approx(0.6),
        "bpb": 0.98,
    }
    figures = ("| zephyr | never trained | 1.600 | 1.310 |", "| recites | 0.000 | counted |")
    for told in ("**Verdict: ok.**", *figures, "6 examples", "harmed", "epoch 4"):
        assert told in text
    assert "umbrella" in text
    assert "**Limits.**" in text


def test_what_a_run_says_is_no_markup_in_the_card(run: RunFolder) -> None:
    finished.changed(run.path, "verdict.json", reason="<script>x</script> [a](http://b) | **c** `d`\n# e")
    text = parcel.make(run, Wish("me/rain")).readme({}).bytes().decode()
    assert r"&lt;script&gt;x&lt;/script&gt; \[a\](http://b) \| \*\*c\*\* \`d\` \# e" in text


def test_a_base_on_the_hub_is_named_with_its_revision(run: RunFolder) -> None:
    text = run.recipe.read_text().replace("base: pocket", "base: mistralai/Mistral-7B-v0.1")
    run.recipe.write_text(text)
    finished.changed(run.path, "run.json", commit="a" * 40)
    made = parcel.make(run, Wish("me/rain"))
    page = made.readme({}).bytes().decode()
    data = ModelCard(page).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("mistralai/Mistral-7B-v0.1", "adapter")
    for told in (f'revision="{"a" * 40}"', "vllm serve mistralai/Mistral-7B-v0.1", "convert_lora_to_gguf", "ADAPTER"):
        assert told in page
    (config,) = (json.loads(item.bytes()) for item in made.items if item.name == "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("mistralai/Mistral-7B-v0.1", "a" * 40)


def test_a_licence_written_by_hand_survives_the_next_push(there: Hub, run: RunFolder) -> None:
    push(run)
    files = there.repos["me/rain"].files
    files["README.md"] = files["README.md"].replace(b"---\n", b"---\nlicense: mit\nthumbnail: x.png\n", 1)
    files["README.md"] = files["README.md"].replace(b"tags:\n", b"tags:\n- mine\n", 1)
    finished.changed(run.path, "verdict.json", reason="Another reason.")
    push(run)
    text = there.repos["me/rain"].files["README.md"].decode()
    data = ModelCard(text).data
    assert data.license == "mit"
    assert data.to_dict()["thumbnail"] == "x.png"
    assert {"mine", "lora"} <= set(data.tags)
    assert "Another reason." in text


# --- what is refused


def test_an_existing_public_repository_is_refused_before_anything_is_sent(there: Hub, run: RunFolder) -> None:
    there.repos["me/rain"] = stand_in.Repository(private=False)
    with pytest.raises(UserError, match="is public: nothing was sent"):
        push(run)
    assert not there.stored
    assert there.repos["me/rain"].files == {}
    sent, _ = push(run, public=True)
    assert not sent.private


def test_a_repository_the_hub_makes_public_gets_nothing(there: Hub, run: RunFolder) -> None:
    there.makes_private = False
    with pytest.raises(UserError, match="was made public by the Hub"):
        push(run)
    assert not there.stored


def test_public_makes_a_public_one_and_never_opens_a_private_one(there: Hub, run: RunFolder) -> None:
    there.repos["me/rain"] = stand_in.Repository(private=True)
    sent, told = push(run, public=True)
    assert sent.private
    assert "stays so" in told[0]
    there.repos.clear()
    assert not push(run, public=True)[0].private
    assert not there.repos["me/rain"].private


def test_overfit_needs_anyway_and_the_card_says_so(there: Hub, run: RunFolder) -> None:
    finished.changed(run.path, "verdict.json", verdict="overfit")
    with pytest.raises(UserError, match=r"overfit.*--anyway"):
        push(run)
    assert there.seen == []
    push(run, anyway=True)
    text = there.repos["me/rain"].files["README.md"].decode()
    assert "**Verdict: overfit.**" in text
    assert "[!WARNING]" in text


def test_secrets_and_addresses_are_refused_by_name(there: Hub, run: RunFolder) -> None:
    prompts = "watch:\n  prompts: [write to jane@uni-hamburg.de]\n"
    run.recipe.write_text(re.sub(r"watch:\n", prompts, run.recipe.read_text().replace("  prompts: []\n", "")))
    with pytest.raises(UserError, match=r"recipe\.yaml:\d+  an e-mail address \(jane@uni-hamburg\.de\) would be sent"):
        push(run)
    assert there.seen == []


def test_a_secret_in_the_dataset_keeps_the_adapter_here(run: RunFolder) -> None:
    file = run.path.parent.parent / "examples" / "rain.md"
    kept = file.read_text()
    secret = "hf_" + "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0z"
    try:
        file.write_text(kept.replace("most days", f"most days, {secret}"))
        with pytest.raises(UserError, match="rain holds a Hugging Face token") as caught:
            parcel.make(run, Wish("me/rain"))
        assert secret not in str(caught.value)
        with pytest.raises(UserError, match="would be sent"):
            parcel.make(run, Wish("me/rain", with_texts=True))
    finally:
        file.write_text(kept)


def test_a_run_without_a_verdict_or_an_adapter_is_refused(run: RunFolder) -> None:
    run.verdict.unlink()
    with pytest.raises(UserError, match="no adapter or no verdict yet"):
        parcel.make(run, Wish("me/rain"))


def test_no_token_and_no_network_are_said_at_once(
    there: Hub, run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        push(run)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push(run)
    assert there.seen == []


@pytest.mark.parametrize(("status", "told"), [(403, "may write there"), (413, "Mend that"), (404, "after --to")])
def test_what_the_hub_refuses_is_not_tried_twice(there: Hub, run: RunFolder, status: int, told: str) -> None:
    there.faults = lambda _method, path: status if path.endswith("/commit/main") else None
    with pytest.raises(UserError, match=told):
        push(run, SOME)
    assert count(there, "POST", "/commit/main") == 1


def test_an_unknown_token_is_said_so_and_not_repeated(
    there: Hub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_" + "zY9xW8vU7tS6rQ5pO4nM3lK2jI1hG0fE"
    monkeypatch.setenv("HF_TOKEN", secret)
    with pytest.raises(UserError, match="does not know this token") as caught:
        push(run, SOME)
    assert secret not in str(caught.value) + (run.path / hub.STATE).read_text()


# --- faults of the network


def test_a_push_that_fails_half_way_goes_on_with_resume(there: Hub, run: RunFolder) -> None:
    there.faults = lambda _method, path: 503 if path.endswith("/commit/main") else None
    with pytest.raises(UserError, match="Nothing is lost: go on with sft push RUN --resume"):
        push(run, with_texts=True)
    state = json.loads((run.path / hub.STATE).read_text())
    assert (state["state"], state["wish"]["with_texts"]) == ("queued", True)
    assert set(there.repos["me/rain"].files) == {".gitattributes"}
    there.faults = lambda _method, _path: None
    wish = hub.resumed(run)
    assert wish == Wish("me/rain", with_texts=True)
    hub.push(parcel.make(run, wish), lambda _line: None, NONE)
    assert "dataset/examples/rain.md" in there.repos["me/rain"].files
    assert count(there, "PUT", "") == 1
    assert json.loads((run.path / hub.STATE).read_text())["state"] == "arrived"


def test_resume_without_a_push_is_refused(run: RunFolder) -> None:
    with pytest.raises(UserError, match="no push of this run was begun"):
        hub.resumed(run)


@pytest.mark.parametrize("fault", [409, 429, 500, "drop", "lost", "half", "slow"])
@pytest.mark.parametrize("place", ["/api/repos/create", "/commit/main", "/api/models/me/rain"])
def test_a_fault_that_passes_is_waited_out(there: Hub, run: RunFolder, fault: Any, place: str) -> None:
    hit: list[str] = []

    def once(_method: str, path: str) -> Any:
        if path.endswith(place) and not hit:
            hit.append(path)
            return fault
        return None

    there.faults = once
    _, told = push(run, SOME)
    assert hit
    assert set(there.repos["me/rain"].files) - {".gitattributes"} == ALWAYS
    assert len(there.repos["me/rain"].commits) == 2  # the first is the Hub's own
    assert not told or "again in" in told[0]


def test_with_a_third_of_all_requests_failing_every_push_arrives(
    there: Hub, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(7)
    kinds = (500, 502, 503, 429, "drop", "lost", "half")
    there.faults = lambda _method, _path: draw.choice(kinds) if draw.random() < 0.3 else None
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    for number in range(4):
        there.repos.clear()
        there.stored.clear()
        finished.changed(run.path, "verdict.json", reason=f"Push {number}.")
        push(run, SOME)
        assert set(there.repos["me/rain"].files) - {".gitattributes"} == ALWAYS
        assert f"Push {number}.".encode() in there.repos["me/rain"].files["README.md"]


def test_a_recipe_sends_at_the_end_and_never_fails_the_run(there: Hub, run: RunFolder) -> None:
    assert hub.after_run(run, lambda: "<p>") is None
    run.recipe.write_text(run.recipe.read_text().replace("repo: null", "repo: me/snow"))
    there.faults = lambda _method, _path: 503
    told = hub.after_run(run, lambda: "<p>", NONE)
    assert told
    assert "--resume" in told
    there.faults = lambda _method, _path: None
    assert "Not sent to the Hub (ZeroDivisionError)" in str(hub.after_run(run, lambda: str(1 / 0), NONE))
    assert "ZeroDivisionError" in run.log.read_text()
    assert str(hub.after_run(run, lambda: "<p>", NONE)).endswith("/me/snow (private).")
    finished.changed(run.path, "verdict.json", verdict="overfit")
    assert "its verdict is overfit" in str(hub.after_run(run, lambda: "<p>", NONE))


def test_something_else_than_was_sent_is_noticed(there: Hub, run: RunFolder) -> None:
    def spoil(method: str, path: str) -> None:
        if path.endswith("/tree/main"):
            there.repos["me/rain"].files["verdict.json"] += b" "

    there.faults = spoil
    with pytest.raises(UserError, match=r"verdict\.json did not arrive whole"):
        push(run)


# --- the door


def test_sft_push_from_a_shell(server: Hub, there: Hub, run: RunFolder) -> None:
    """The real command in a process of its own, which learns of the Hub as any user's does."""
    given = {"HF_ENDPOINT": server.url, "HF_TOKEN": stand_in.TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-m", "finetune", "push", str(run.path), "--to", "me/rain"]
    done = subprocess.run(words, env=os.environ | given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    commit = there.repos["me/rain"].commits[-1][:12]
    assert done.stdout == f"{server.url}/me/rain  private, 6 files, commit {commit}\n"


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> paper.Door:
    return paper.Door(capsys, monkeypatch)


def test_push_says_where_to_and_json(there: Hub, run: RunFolder, sft: paper.Door) -> None:
    assert "sft push needs --to" in sft("push", run.path)[2]
    assert "is no name on the Hub" in sft("push", run.path, "--to", "a/b/c")[2]
    assert "is no run" in sft("push", run.path.parent, "--to", "me/rain")[2]
    code, out, err = sft("push", run.path, "--to", "me/rain", "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert (told["repo"], told["private"], told["files"]) == ("me/rain", True, 6)
    code, out, err = sft("push", run.path, "--resume")
    assert (code, err) == (0, "")
    assert "nothing new" in out


def test_a_dry_run_shows_the_card_and_asks_no_network(there: Hub, run: RunFolder, sft: paper.Door) -> None:
    code, out, _ = sft("push", run.path, "--to", "me/rain", "--dry-run")
    assert code == 0
    assert out.startswith("me/rain, private: nothing was sent\n")
    assert "**Verdict: ok.**" in out
    assert json.loads(sft("push", run.path, "--to", "me/x", "--dry-run", "--json")[1])["files"].keys() == {
        *ALWAYS,
        "report.html",
    }
    assert there.seen == []
    assert not (run.path / hub.STATE).exists()


def test_the_recipe_names_the_repository(there: Hub, run: RunFolder, sft: paper.Door) -> None:
    text = run.recipe.read_text()
    run.recipe.write_text(text.replace("repo: null", "repo: me/snow").replace("private: true", "private: false"))
    assert sft("push", run.path)[0] == 0
    assert not there.repos["me/snow"].private
    assert sft("push", run.path, "--to", "me/other")[0] == 0
    assert there.repos["me/other"].private


def test_cards_of_every_verdict_are_whole(run: RunFolder) -> None:
    for word in card._MEANS:
        finished.changed(run.path, "verdict.json", verdict=word)
        page = parcel.make(run, Wish("me/rain", anyway=True)).readme({}).bytes().decode()
        assert f"**Verdict: {word}.** {card._MEANS[word]}" in page
        assert "None" not in page
        assert huggingface_hub.ModelCard(page).data.to_dict()["library_name"] == "peft"
