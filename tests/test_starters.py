"""Starters: found by name, described by their first line, copied so that the copy works from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import starters
from finetune.errors import UserError
from finetune.recipe import load

RECIPE = """\
# A small start.
#
# It names ../sets/one here, in a comment, which is nobody's business.
base: pocket   # stays
data: {train: ../sets/one, held_out: '../sets/one/held.jsonl'}  # ../sets/one again
epochs: 3
"""


@pytest.fixture
def starter(tmp_path: Path) -> Path:
    """A recipe on a shelf, with the dataset it points to."""
    (tmp_path / "shelf" / "sets" / "one").mkdir(parents=True)
    (tmp_path / "shelf" / "sets" / "one" / "held.jsonl").write_text("{}\n")
    (tmp_path / "shelf" / "recipes").mkdir()
    recipe = tmp_path / "shelf" / "recipes" / "small.yaml"
    recipe.write_text(RECIPE)
    return recipe


def test_every_starter_says_in_one_line_what_it_is_for() -> None:
    shipped = starters.starters("recipes")
    assert {"quickstart", "handwritten", "minisymposium"} <= {path.stem for path in shipped}
    for path in shipped:
        assert 30 < len(starters.describe(path)) <= 118, path
        assert path.read_text(encoding="utf-8").startswith("# ")


def test_every_starter_says_what_it_costs() -> None:
    for path in starters.starters("recipes"):
        header = "".join(line.lstrip("#") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
        assert "Measured cost:" in header, path


def test_a_starter_is_found_by_name_or_named_nearly() -> None:
    assert starters.find("quickstart") == starters.find("quickstart.yaml")
    with pytest.raises(UserError, match="Did you mean quickstart"):
        starters.find("quikstart")
    with pytest.raises(UserError, match=r"There is .*quickstart"):
        starters.find("zzz")


def test_installed_starters_come_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetune" / "_starters" / "recipes").mkdir(parents=True)
    (tmp_path / "finetune" / "_starters" / "recipes" / "only.yaml").write_text("# One.\n")
    monkeypatch.setattr(starters, "__file__", str(tmp_path / "finetune" / "starters.py"))
    assert [path.stem for path in starters.starters("recipes")] == ["only"]
    assert starters.starters("datasets") == []


def test_a_copy_works_from_anywhere(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "else where" / "mine.yaml"
    assert starters.copy(starter, target) == [target]
    monkeypatch.chdir("/")
    assert load(target) == load(starter)


def test_a_copy_with_data_needs_the_shelf_no_more(starter: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "mine.yaml"
    written = starters.copy(starter, target, with_data=True)
    assert written == [target.parent / "one", target.parent / "held.jsonl", target]
    (tmp_path / "shelf").rename(tmp_path / "gone")
    assert load(target).data.train == str(target.parent / "one")


def test_only_the_named_paths_change_in_a_copy(starter: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    starters.copy(starter, target)
    before, after = RECIPE.splitlines(), target.read_text().splitlines()
    changed = [number for number, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    one = tmp_path / "shelf" / "sets" / "one"
    assert changed == [4]
    assert after[4] == f"data: {{train: {one}, held_out: {one}/held.jsonl}}  # ../sets/one again"


def test_an_odd_folder_name_is_quoted(starter: Path, tmp_path: Path) -> None:
    odd = tmp_path / 'a, "b": #c é'
    (tmp_path / "shelf").rename(odd)
    target = tmp_path / "mine.yaml"
    starters.copy(odd / "recipes" / "small.yaml", target)
    assert load(target).data.train == str(odd / "sets" / "one")


def test_nothing_is_ever_overwritten(starter: Path, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "mine.yaml"
    (target.parent / "one").mkdir(parents=True)
    target.write_text("mine")
    with pytest.raises(UserError) as caught:
        starters.copy(starter, target, with_data=True)
    assert [problem.file for problem in caught.value.problems] == [target, target.parent / "one"]
    assert target.read_text() == "mine"
    assert sorted(path.name for path in target.parent.iterdir()) == ["mine.yaml", "one"]


def test_a_dataset_that_is_not_shipped_is_said_before_anything_is_written(starter: Path, tmp_path: Path) -> None:
    (starter.parent.parent / "sets" / "one" / "held.jsonl").unlink()
    target = tmp_path / "mine" / "mine.yaml"
    with pytest.raises(UserError, match="not shipped"):
        starters.copy(starter, target, with_data=True)
    assert not target.parent.exists()


def test_a_place_that_cannot_be_written_is_no_traceback(starter: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Choose another place"):
        starters.copy(starter, tmp_path / "file" / "mine.yaml")
