"""Find what is shipped: recipes, suites, datasets; and copy a starter recipe so that the copy works from anywhere.

It judges no recipe and changes no line but those that name a path. Nothing is ever overwritten.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from finetune import places, yamlfile
from finetune.errors import Problem, UserError, refuse

Kind = Literal["recipes", "suites", "datasets"]
_SHELVES: dict[Kind, str] = {"recipes": "recipes", "suites": "eval", "datasets": "datasets"}


def shelf(kind: Kind) -> Path:
    """The folder that holds them: inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).parent
    shipped = package / "_starters"
    return (shipped if shipped.is_dir() else package.parent) / _SHELVES[kind]


def starters(kind: Kind) -> list[Path]:
    """All of them, by name: `.yaml` files, or folders where datasets are meant. Empty where the shelf is missing."""
    wanted = sorted(shelf(kind).glob("*" if kind == "datasets" else "*.yaml"))
    return [one for one in wanted if one.is_dir() == (kind == "datasets") and not one.name.startswith((".", "_"))]


def find(name: str, kind: Kind = "recipes") -> Path:
    """A starter by its name, with or without `.yaml`. UserError naming the nearest where there is none."""
    there = {one.stem if one.is_file() else one.name: one for one in starters(kind)}
    if (found := there.get(name.removesuffix(".yaml"))) is not None:
        return found
    close = get_close_matches(name, there, 1) or list(there)
    remedy = f"Did you mean {close[0]}?" if len(close) == 1 else f"There is {', '.join(close) or 'none installed'}."
    raise refuse(f"no starter is called {name}.", remedy)


def describe(starter: Path) -> str:
    """One line: a recipe's or suite's first comment, the first heading of a dataset's README, or nothing."""
    file = starter / "README.md" if starter.is_dir() else starter
    if not file.is_file():
        return ""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").strip() for line in lines if line.startswith("#")), "")


def copy(starter: Path, target: Path, with_data: bool = False) -> list[Path]:
    """Copy a starter recipe to a file; what was written, the recipe last.

    Relative paths become absolute, or with `with_data` what they name is copied beside the target. Comments stay.
    UserError, before anything is written, where a file or folder of that name is there already.
    """
    starter, target = Path(starter), Path(target)
    links = list(_links(starter))
    goods = {link.source: target.parent / link.source.name for link in links} if with_data else {}
    problems = [_taken(path) for path in [target, *goods.values()] if path.exists() or path.is_symlink()]
    problems += [_missing(link, starter) for link in links if link.source in goods and not link.source.exists()]
    if problems:
        raise UserError(problems)
    text = _rewritten(starter, links, {source: f"./{copied.name}" for source, copied in goods.items()})
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for source, copied in goods.items():
            shutil.copytree(source, copied) if source.is_dir() else shutil.copy2(source, copied)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise refuse(f"cannot be written: {error.strerror}.", "Choose another place.", target) from None
    return [*goods.values(), target]


@dataclass(frozen=True)
class _Link:
    """A value of the recipe that leads to a file or folder; `line` counts from 1."""

    line: int
    written: str
    source: Path


def _links(starter: Path) -> Iterator[_Link]:
    read = yamlfile.read(starter)
    folder = os.path.dirname(os.path.abspath(starter))
    for key, origin in read.origins.items():
        value = yamlfile.at(read.data, key)
        if not isinstance(value, str) or "/" not in value or origin.line is None or os.path.isabs(value):
            continue
        if value.startswith((".", "~")) or os.path.exists(os.path.join(folder, value)):
            yield _Link(origin.line, value, Path(places.absolute(value, folder)))


def _rewritten(starter: Path, links: list[_Link], copied: dict[Path, str]) -> str:
    """The text of the recipe, with only the named paths changed."""
    lines = starter.read_text(encoding="utf-8").splitlines(keepends=True)
    for link in links:
        new = copied.get(link.source, str(link.source))
        new = new if re.fullmatch(r"[\w./~+-]+", new) else json.dumps(new, ensure_ascii=False)
        old = re.compile(rf"""(?<![\w./])(["']?){re.escape(link.written)}\1(?![\w./])""")
        lines[link.line - 1] = old.sub(lambda _, new=new: new, lines[link.line - 1], count=1)  # type: ignore[misc]
    return "".join(lines)


def _taken(path: Path) -> Problem:
    return Problem("is there already.", "Choose another name, or move it away: nothing is overwritten.", path)


def _missing(link: _Link, starter: Path) -> Problem:
    return Problem(f"{link.written} is not shipped with this version.", "Copy the recipe alone.", starter, link.line)
