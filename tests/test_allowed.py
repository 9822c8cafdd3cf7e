"""What may be recited: read from a file, told where it stands in no answer, and no echo when it is said."""

from __future__ import annotations

from pathlib import Path

import nights
import paper
import pytest

from finetune import allowed, corpus, gathered, plan, recipe, tokenwise
from finetune.errors import UserError


def spans(tmp_path: Path, text: str) -> list[tuple[str, int]]:
    (tmp_path / "own.txt").write_text(text)
    return [(one.text, one.line) for one in allowed.read(tmp_path / "own.txt")]


def test_a_line_is_a_span_and_a_block_is_one_too(tmp_path: Path) -> None:
    found = spans(tmp_path, "Ask twice.\n\n  \nBe kind to\nthe\nnext one\n\nSelah\n")
    whole = ("Be kind to\nthe\nnext one", 4)
    assert found == [("Ask twice.", 1), whole, ("Be kind to", 4), ("next one", 6), ("Selah", 8)]


@pytest.mark.parametrize(
    ("text", "what"), [(None, "No such file"), (b"\xff\xfe\x00", "UTF-8"), (b"\n --- \n", "no words")]
)
def test_a_file_without_spans_is_refused(tmp_path: Path, text: bytes | None, what: str) -> None:
    path = tmp_path / "own.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=what):
        allowed.read(path)


def test_a_span_in_no_answer_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Ask TWICE, always\n\nnobody says this\n\nhave a seat\nand some tea\n")
    answers = ["I say: ask twice; always. Bye", "Have a seat and some tea."]
    told = list(allowed.strangers(allowed.read(tmp_path / "own.txt"), answers))
    assert [(one.line, "nobody says this" in one.what) for one in told] == [(3, True)]


def test_check_tells_a_missing_file_and_a_stranger_with_file_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sft, file = paper.Door(capsys, monkeypatch), paper.folder(tmp_path)
    file.write_text(file.read_text().replace("held_out: 0.3", "held_out: 0.3, intended: own.txt"))
    code, out, err = sft("check", file)
    assert code == 2
    assert "r.yaml:3" in out + err
    assert "data.intended is own.txt, where there is nothing" in out + err
    (tmp_path / "own.txt").write_text("otherwise your legs win\nnever written anywhere\n")
    code, out, err = sft("check", file)
    assert code == 0
    assert "own.txt:2  data.intended: no answer holds «never written anywhere»." in out + err
    assert "legs" not in out + err
    made = plan.make(recipe.load(file), tmp_path / "base")
    assert "otherwise your legs win" in made.intended


def test_the_page_counts_as_the_run_did(tmp_path: Path) -> None:
    folder = nights.night(tmp_path, nights.Shape(examples=6, epochs=2, looks=(1,)))
    wanted = recipe.load_resolved(folder / "recipe.yaml")
    answer = corpus.read(wanted.data.train, wanted.data.parts)[0].answer
    (tmp_path / "own.txt").write_text(answer.split("\n")[-1])
    changed = wanted.model_copy(update={"data": wanted.data.model_copy(update={"intended": str(tmp_path / "own.txt")})})
    (folder / "recipe.yaml").write_text(recipe.resolved_yaml(changed))
    found = tokenwise.find(gathered.read(folder))
    assert isinstance(found, tokenwise.Texts)
    assert any(mask.any() for masks in found.formulas.values() for mask in masks)
