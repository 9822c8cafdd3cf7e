"""The page of a run: complete, honest about what is missing, small, and deaf to what dataset and model say."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import nights
import numpy as np
import paper
import pytest
from nights import HOSTILE, Shape
from safetensors.numpy import save_file

from finetune import gathered, heard, heat, pages, plots, report, runs, sidebyside, tokenwise
from finetune.errors import UserError
from finetune.plots import Bar, Curve, Panel
from finetune.report import Writer
from finetune.runs import RunFolder

SECTIONS = ("chosen", "course", "echo", "formats", "leaks", "drift", "words", "answers", "moved", "cost", "papers")
FEW = Shape(examples=10, epochs=20, looks=(1, 5, 10, 15, 20), words=45)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished night that nobody here writes into, but for its page."""
    return nights.night(tmp_path_factory.mktemp("night"), FEW)


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    """Its page."""
    return report.write(run).read_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with markup and script in every text that a person or a model wrote."""
    shape = Shape(examples=10, epochs=20, looks=FEW.looks, hostile=True)
    return nights.night(tmp_path_factory.mktemp("hostile"), shape)


@pytest.fixture(scope="module")
def hostile_page(hostile: Path) -> Path:
    """Its page, as a file."""
    return report.write(hostile)


class Parts(HTMLParser):
    """Every start tag with its attributes, and the texts of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.get_starttag_text() is not None:
            self.scripts.append(data)


def embedded(page: str, name: str) -> Any:
    """The JSON that a page carries under a name."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


# --- what it says


def test_the_page_says_the_verdict_why_and_what_to_do(run: Path, page: str) -> None:
    told = json.loads((run / "verdict.json").read_text())
    head = html.unescape(re.sub(r"<[^>]*>", "", page[page.index("<body") : page.index("<nav")]))
    assert told["verdict"] in head
    assert told["reason"] in head
    assert told["next"].replace("RUN", str(run)).replace("`", "") in head
    assert all(f'<section id="{name}">' in page for name in SECTIONS)
    assert "<b>not measured</b>" not in page


def test_what_was_not_measured_says_so_and_is_no_empty_frame(tmp_path: Path) -> None:
    folder = nights.night(tmp_path, Shape(examples=8, epochs=4, looks=(), state="running"))
    (folder / "findings.jsonl").unlink(missing_ok=True)
    page = Writer(folder).html()
    assert "No verdict yet. Its first look is still to come." in page
    for name in ("course", "echo", "formats", "leaks", "drift", "answers", "moved"):
        section = page[page.index(f'<section id="{name}">') :].partition("</section>")[0]
        assert "<b>not measured</b>" in section
        assert "<table" not in section
        assert "<svg" not in section


def test_the_page_says_what_untouched_formats_kept_look_by_look(run: Path, page: str) -> None:
    rows = [row for row in runs.read_lines(run / "findings.jsonl") if row.get("suite") == "look"]
    told = [row for row in rows if row["score"] is not None]
    assert told
    text = html.unescape(re.sub(r"<[^>]*>", "", page))
    line = text[text.index("Carried over to formats never trained") :].partition("\n")[0]
    for row in told:
        assert f"{row['score']:.0%} at epoch {row['epoch']:g}" in line.replace("\u202f", "").replace(
            "\xa0", ""
        ).replace(" %", "%")


def test_only_a_running_night_looks_again_by_itself(page: str, tmp_path: Path) -> None:
    assert "data-refresh" not in page
    going = nights.night(tmp_path, Shape(examples=8, epochs=4, looks=(), state="running"))
    tags = Parts(Writer(going).html()).tags
    (every,) = [attrs["data-refresh"] for tag, attrs in tags if tag == "body"]
    assert 15 <= int(every or 0) <= 120
    assert [attrs["content"] for tag, attrs in tags if attrs.get("http-equiv") == "refresh"] == [every]


def test_verdicts_that_are_known_are_not_judged_again(run: Path) -> None:
    words = {one.step: "watch" for one in gathered.read(run).looks if one.step > 0}
    assert gathered.read(run, words).verdicts == words
    some = dict.fromkeys(list(words)[:2], "watch")
    assert gathered.read(run, some).verdicts == {**gathered.read(run).verdicts, **some}


def test_a_page_that_cannot_be_written_does_not_end_a_night(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    runs.write_json(folder / "run.json", {"state": "running"})
    (folder / "metrics.jsonl").write_text('{"kind": "look"}\n')  # a row without its keys
    assert Writer(folder).keep_up() is None
    assert "report.html was not written" in (folder / "log.txt").read_text()
    writer = Writer(run)
    assert writer.keep_up() == run / "report.html"
    assert writer.keep_up() is None  # at once again would cost more than 2 % of the time


# --- who recites


def test_every_token_of_an_example_spells_its_answer_and_bears_its_reading(run: Path, page: str) -> None:
    found = gathered.read(run)
    told = embedded(page, "texts")
    assert {key.partition("/")[2] for key in told} == {*found.split["train"], *found.split["held_out"]}  # type: ignore[index]
    digits = tokenwise._DIGITS
    for key, one in told.items():
        split, _, name = key.partition("/")
        sizes, at = [], 0
        for digit in one["sizes"]:
            at += digits.index(digit)
            if digit != digits[-1]:
                sizes, at = [*sizes, at], 0
        assert sum(sizes) == len(one["text"])
        assert "**The farmer**" in one["text"]
        assert one["text"].rstrip("\n").endswith("<|im_end|>")
        assert re.fullmatch(rf"examples/{name}\.md:\d+", one["place"])
        for epoch, levels in one["looks"]:
            step = next(look.step for look in found.looks if look.epoch == epoch)
            reading = heard.load(RunFolder(run).tokens_at(step))[split, name, "chatml"]
            codes = np.array([digits.index(sign) for sign in levels])
            assert (codes > 31).tolist() == reading.hits.tolist()
            surprise = np.minimum(-reading.log_p / np.log(2), 15.5)
            assert np.abs((codes % 32) / 2 - surprise).max() <= 0.26
        assert len(one["base"]) == len(sizes) == len(one["looks"][0][1])


def test_what_was_recited_first_is_marked_where_its_row_says(run: Path, page: str) -> None:
    first = heat.firsts(gathered.read(run))
    assert first
    told = embedded(page, "texts")
    for name, row in first.items():
        begin, end, epoch = told[f"train/{name}"]["first"]
        style = told[f"train/{name}"]["style"]
        masked = {t for a, b in zip(style[::2], style[1::2], strict=True) for t in range(a, b)}
        assert (begin, epoch) == (row["run_start"], row["epoch"])
        assert sum(t not in masked for t in range(begin, end)) == row["run_max"]


def test_the_heat_map_is_the_rows_strongest_first(run: Path) -> None:
    found = gathered.read(run)
    heated = heat.heat(found)
    assert heated is not None
    assert [one.epoch for one in heated.columns] == list(FEW.looks)
    strongest = [max(map(int, line.levels)) for line in heated.trained]
    assert strongest == sorted(strongest, reverse=True)
    assert strongest[0] == 5
    rows = {(row["id"], row["epoch"]): row for row in found.examples if row["split"] == "train"}
    for line in heated.trained:
        for look, level in zip(heated.columns, line.levels, strict=True):
            row = rows[line.example, look.epoch]
            assert (level == "5") == bool(row["echo_whole"])
            assert (level == "0") == (row["windows"][0] == 0 and not row["long"])


def test_many_looks_are_thinned_to_what_can_be_clicked() -> None:
    rows = [
        {"kind": "look", "look": "full" if n % 10 == 0 else "light", "step": n, "epoch": float(n), "travel": n * 1e-7}
        for n in range(1, 400)
    ]
    told = [
        {"id": "a", "split": "train", "format": "f", "step": n, "epoch": n, "windows": [0, 9]} for n in range(1, 400)
    ]
    heated = heat.heat(gathered.Run(Path("x"), {"chosen": {"step": 123}}, {}, metrics=rows, examples=told))
    assert heated is not None
    epochs = [one.epoch for one in heated.columns]
    assert len(epochs) == heat.COLUMNS
    assert heated.left_out == 399 - heat.COLUMNS
    assert {1.0, 123.0, 399.0, *(10.0 * n for n in range(1, 40))} <= set(epochs)


def test_a_dataset_that_changed_is_not_shown_as_what_was_trained(tmp_path: Path) -> None:
    folder = nights.night(tmp_path, Shape(examples=8, epochs=4, looks=(1, 4)))
    one = next((tmp_path / "examples").glob("*.md"))
    one.write_text(one.read_text() + "And one word more.\n")
    page = Writer(folder).html()
    assert "The dataset changed since this run began" in page
    assert embedded(page, "texts") == {}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("verdict.json", "[]", "verdict.json  is not what sft writes there."),
        ("run.json", "7", "run.json  is not what sft writes there."),
        ("metrics.jsonl", '\n{"garbage": 1}\n', "metrics.jsonl:2  is no row that sft writes there.  Remove this line."),
        ("examples.jsonl", '{"step": 3}\n', "examples.jsonl:1  is no row that sft writes there.  Remove this line."),
    ],
)
def test_a_file_that_something_else_wrote_is_told_by_its_line(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        gathered.read(tmp_path)
    assert told in str(caught.value)


def test_a_page_that_would_grow_too_large_leaves_out_who_recites_least(
    run: Path, page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = embedded(page, "texts")
    size = sum(len(pages.packed(one).encode()) for one in whole.values())
    monkeypatch.setattr(report, "_TOKENS", size // 2)
    smaller = Writer(run).html()
    kept = embedded(smaller, "texts")
    assert 0 < len(kept) < len(whole)
    assert next(iter(kept)) == next(iter(whole))
    assert f"{len(whole) - len(kept)} examples are told without their tokens" in smaller


# --- hostile text, by reading the page


def test_nothing_but_our_script_and_style_can_act(hostile_page: Path) -> None:
    page = hostile_page.read_text()
    parts = Parts(page)
    assert not [name for _, attrs in parts.tags for name in attrs if name.startswith("on") or name == "style"]
    kinds = [attrs.get("type") for tag, attrs in parts.tags if tag == "script"]
    assert sorted(map(str, kinds)) == ["None", "application/json", "application/json"]
    assert not [tag for tag, _ in parts.tags if tag in ("img", "iframe", "object", "embed", "base", "form", "link")]
    assert not [attrs for _, attrs in parts.tags if str(attrs.get("href") or attrs.get("src") or "#")[0] != "#"]
    (policy,) = [str(a["content"]) for t, a in parts.tags if a.get("http-equiv") == "Content-Security-Policy"]
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert style
    assert script
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src '{pages._hash(script[1])}'; style-src '{pages._hash(style[1])}'" in policy


def test_json_in_a_page_cannot_end_its_element_and_stays_what_it_was() -> None:
    for text in (HOSTILE, "<!--<script>", "\u2028\u202e\x00\ud800", "]]>"):
        told = str(pages.packed({text: [text, 1.5, None]}))
        assert not re.search(r"[<>&\u2028\u202e\x00\ud800]", told)
        assert json.loads(told) == {text: [text, 1.5, None]}


def test_a_page_to_hand_on_holds_no_text_and_no_path(run: Path, page: str, tmp_path: Path) -> None:
    bare = Writer(run).write(to=tmp_path / "bare.html", texts=False).read_text()
    texts = [one["answer"] for one in runs.read_lines(run / "samples.jsonl")]
    for file in (run.parent / "examples").glob("*.md"):
        texts += [line for line in file.read_text().splitlines() if len(line.split()) > 6]
    assert any(one in page for one in texts)
    assert not [one for one in (*texts, str(run.parent), "FutureWarning", "The harbour froze") if one in bare]
    assert all(f'<section id="{name}">' in bare for name in SECTIONS)


# --- other folders


def test_an_adapter_made_elsewhere_says_what_can_be_said(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 8, "peft_type": "LORA", "target_modules": ["q"]}))
    weights = {"q.lora_A.weight": np.ones((8, 64), np.float32), "q.lora_B.weight": np.zeros((64, 8), np.float32)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    page = report.write(tmp_path).read_text()
    assert "all of lora_B is zero: it is the base, unchanged" in page
    assert "This adapter was not made by a run that is at hand" in page
    assert page.count("<b>not measured</b>") > 5
    weights["q.lora_B.weight"][0, 0] = 1e-9
    save_file(weights, tmp_path / "adapter_model.safetensors")
    assert "1 of 1 lora_B matrices are not zero" in report.write(tmp_path).read_text()


def test_runs_side_by_side_differ_where_their_recipes_do(run: Path, tmp_path: Path) -> None:
    shape = Shape(examples=10, epochs=20, looks=FEW.looks, rate=1e-6, pace=1.5)
    other = nights.night(tmp_path, shape)
    both = sidebyside.write([run, other], tmp_path / "both.html").read_text()
    cells = re.sub(r"\s+", " ", both[both.index('id="recipes"') :])
    assert "optimizer.learning_rate</th><td>1e-07</td><td>1e-06</td>" in cells
    assert "epochs</th>" not in cells
    assert "At equal train loss" in both
    assert "At equal travel (2e-06)" in both or "At equal travel (4e-06)" in both
    assert "Careful." not in both
    stranger = replace(gathered.read(other), facts={"fingerprints": {"dataset": "0" * 64}})
    assert "trained on other data than" in sidebyside.html([gathered.read(run), stranger])


# --- pictures


def test_pictures_have_no_style_of_their_own_and_meet_without_quarrel() -> None:
    curves = [Curve("a $x$ <b>&", "train", [(0, 1), (1, 2)], [(1, 1.5, 2.5)]), Curve("漢字", "held", [(0, 1)])]
    one = plots.course("one", [Panel("nats", curves, ("base", 1.0))], "epoch", 900)
    other = plots.intervals(
        "two", [("held out", [Bar("z", 0.1, -0.1, 0.3, "held"), Bar("y", 0.1, None, None, "train")])], "bits", 370
    )
    for picture in (one, other):
        assert "style=" not in picture.svg
        assert set(re.findall(r'class="(p\w{7})"', picture.svg)) <= picture.rules.keys()
        assert not re.search(r"#0[0-9a-f]{5}", " ".join(picture.rules.values()))
    ids = [set(re.findall(r' id="([^"]*)"', picture.svg)) for picture in (one, other)]
    assert not ids[0] & ids[1]
    assert "a $x$ &lt;b&gt;&amp;" in one.svg
    assert "漢字" in one.svg


# --- at the door


def test_the_verb_writes_a_page_and_says_where(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sft = paper.Door(capsys, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert sft("report", run) == (
        0,
        f"Wrote {run}/report.html, {(run / 'report.html').stat().st_size / 2**20:.1f} MiB\n",
        "",
    )
    code, out, _ = sft("report", run, "--out", "p.html", "--json")
    assert (code, json.loads(out)["page"]) == (0, "p.html")
    none = "nowhere  is no run and no adapter.  Name a folder that `sft train` wrote, such as runs/mine.\n"
    assert sft("report", "nowhere") == (2, "", none)
    assert sft("report", run, run, "--without-texts")[0] == 2


# --- a real browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.FOUND is None:
        pytest.skip(browser.WHY_NOT)
    with browser.browser() as one:
        yield one


def test_a_browser_runs_nothing_that_a_dataset_or_a_model_says(hostile_page: Path, chromium: browser.Browser) -> None:
    page = hostile_page
    name = next(iter(embedded(page.read_text(), "texts")))
    for width in (1280, 390):
        chromium.open(page, f"#read={name.replace('/', '%2F')}", width)
        assert (
            chromium.run("document.title")
            == "run: " + json.loads(page.with_name("verdict.json").read_text())["verdict"]
        )
        assert chromium.said == []
        assert chromium.asked == [page.as_uri()]
        assert chromium.run("document.querySelectorAll('img, iframe, svg[onload]').length") == 0
        assert HOSTILE in chromium.run("document.getElementById('reader').textContent")
        assert chromium.run("document.documentElement.scrollWidth") <= width
        chromium.run("document.getElementById('reader').close()")
        for section in SECTIONS:
            assert chromium.run(f"document.getElementById('{section}').getBoundingClientRect().height") > 40
    assert chromium.run("document.querySelector('#answers .said').textContent").endswith(HOSTILE)


def test_a_script_that_got_in_would_not_run(page: str, tmp_path: Path, chromium: browser.Browser) -> None:
    bad = "<script>document.title='owned'</script><p id=bad onclick=\"document.title='owned'\">x</p><main>"
    path = tmp_path / "bad.html"
    path.write_text(page.replace("<main>", bad, 1))
    chromium.open(path)
    chromium.run("document.getElementById('bad').click()")
    assert chromium.run("document.title") != "owned"
    assert any("Content Security Policy" in one for one in chromium.said)


def test_tables_sort_and_axes_switch_and_examples_open(run: Path, page: str, chromium: browser.Browser) -> None:
    chromium.open(run / "report.html")
    column = "[...document.querySelectorAll('table.heat tbody')[0].rows].slice(1).map((row) => row.cells[2].dataset.v)"
    click = "document.querySelector('table.heat').tHead.rows[0].cells[2].firstElementChild.click()"
    chromium.run(click)
    falling = [float(one) for one in chromium.run(column)]
    assert falling == sorted(falling, reverse=True)
    assert len(set(falling)) > 1
    chromium.run(click)
    assert [float(one) for one in chromium.run(column)] == falling[::-1] == sorted(falling)
    shown = "[...document.querySelectorAll('.switched > figure')].map((one) => getComputedStyle(one).display)"
    assert chromium.run(shown) == ["block", "none", "none"]
    chromium.run("document.getElementById('along-travel').click()")
    assert chromium.run(shown) == ["none", "block", "none"]
    name = chromium.run("document.querySelector('.open').click(), document.querySelector('.open').dataset.example")
    assert chromium.run("new Promise((done) => setTimeout(() => done(document.getElementById('reader').open), 50))")
    told = embedded(page, "texts")[name]
    sides = chromium.run("[...document.querySelectorAll('#reader .sides p')].map((one) => one.textContent)")
    assert sides == [told["text"]] * (1 + len(told["looks"]))
    hits = chromium.run("document.querySelectorAll('#reader .sides > div:first-child .hit').length")
    assert hits == sum(tokenwise._DIGITS.index(sign) > 31 for sign in told["looks"][0][1])
