"""`sft preview`: the exact tokens, and which of them are trained."""

from __future__ import annotations

import io
import json
from pathlib import Path

import paper
import pytest
from rich.console import Console

from finetune import preview, prompts


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    paper.folder(tmp_path)
    return paper.Door(capsys, monkeypatch)


def shown(out: str) -> str:
    """The page between caption and key."""
    return "\n".join(out.split("\n\n⟦trained⟧")[0].splitlines()[2:])


def test_a_page_of_tokens(sft: paper.Door, tmp_path: Path) -> None:
    code, out, err = sft("preview", "r.yaml", "--format", "zephyr")
    assert (code, err) == (0, "")
    wanted = (Path(__file__).parent / "transcripts" / "preview.txt").read_text()
    assert out == wanted.format(folder=tmp_path)


def test_what_is_shown_is_what_is_trained(sft: paper.Door) -> None:
    said = json.loads(sft("preview", "r.yaml", "--format", "all", "-n", "6", "--json")[1])
    assert len(said) == 12
    assert [view["held_out"] for view in said[::2]] == [False] * 4 + [True] * 2
    for view in said:
        assert view["tokens"] == len(view["pieces"])
        assert view["supervised"] == sum(piece["trained"] for piece in view["pieces"])
        answer = "".join(piece["text"] for piece in view["pieces"] if piece["trained"])
        question, written = paper.TALK[view["example"]]
        assert written.removeprefix("### conclusion\n") in answer
        assert question not in answer
        whole = "".join(piece["text"] for piece in view["pieces"])
        assert whole.startswith("<s>")
        assert question in whole


@pytest.mark.parametrize("name", [*prompts.shipped(), "MPT-chat"])
def test_every_format_of_ls_can_be_previewed(sft: paper.Door, name: str) -> None:
    code, out, err = sft("preview", "r.yaml", "--format", name)
    assert (code, err) == (0, "")
    assert "⟦" in shown(out)


def test_a_format_file_of_ones_own_works(sft: paper.Door, tmp_path: Path) -> None:
    text = (prompts.SHELF / "zephyr.yaml").read_text().replace("name: zephyr", "name: mine")
    (tmp_path / "mine.yaml").write_text(text)
    code, out, _ = sft("preview", "r.yaml", "--format", "mine.yaml")
    assert code == 0
    assert " · mine · " in out


def test_several_turns_are_all_shown(sft: paper.Door, tmp_path: Path) -> None:
    talk = (
        "## system\nBe brief.\n## user\nOne?\n## assistant <!-- no-loss -->\nUno.\n## user\nTwo?\n## assistant\nDue.\n"
    )
    (tmp_path / "several").mkdir()
    (tmp_path / "several" / "a.md").write_text(talk)
    code, out, _ = sft("preview", "r.yaml", "--set", "data={train: several, held_out: 0.0}")
    assert code == 0
    assert ", 2 answers" in out
    page = shown(out)
    assert page.count("⟦") == 1
    assert "Uno." in page.split("⟦")[0]
    assert page.split("⟦")[1].startswith("Due.")


def test_tokens_of_half_a_letter_are_named(sft: paper.Door, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.md").write_text(paper.example("Sun?", "☀ \x1b[2J"))
    said = json.loads(sft("preview", "r.yaml", "--set", "data={train: one, held_out: 0.0}", "--json")[1])
    pieces = [piece["text"] for piece in said[0]["pieces"] if piece["trained"]]
    assert pieces[0] == "☀"
    assert all(pieces)
    assert "\x1b" not in sft("preview", "r.yaml", "--set", "data={train: one, held_out: 0.0}")[1]


def test_without_the_tokenizer_nothing_is_made_up(sft: paper.Door) -> None:
    code, out, err = sft("preview", "r.yaml", "--set", "base=mistralai/Mistral-7B-v0.1")
    assert (code, out) == (2, "")
    assert "hf download mistralai/Mistral-7B-v0.1 config.json tokenizer.json" in err


def test_a_wrong_format_names_the_nearest(sft: paper.Door) -> None:
    assert "Did you mean alpaca?" in sft("preview", "r.yaml", "--format", "alpaka")[2]
    code, _, err = sft("preview", "r.yaml", "--set", "formats.train=[chatml, alpaka]", "--format", "all")
    assert code == 2
    assert "Did you mean alpaca?" in err


def test_in_colour_trained_tokens_have_a_ground(sft: paper.Door, tmp_path: Path) -> None:
    page = io.StringIO()
    console = Console(file=page, force_terminal=True, color_system="standard", width=60)
    preview.show(preview.views(tmp_path / "r.yaml"), console)
    assert "\x1b[30;42m" in page.getvalue()
    assert "⟦" not in page.getvalue()
