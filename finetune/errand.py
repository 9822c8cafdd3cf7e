"""What is to be exported: a run, one of its formats, and how. The model is loaded when it is first needed, once.

It reads a run and a user's words; it writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from finetune import ear, opened, prompts
from finetune.conversation import Turn
from finetune.errors import UserError, refuse
from finetune.format import Format
from finetune.masks import Vocabulary
from finetune.opened import Opened, Worn
from finetune.passage import Passage

Kind = Literal["merged", "gguf", "ollama", "presets"]
KINDS: tuple[Kind, ...] = ("merged", "gguf", "ollama", "presets")
ONTO = ("base", "dequantised")
DTYPES: Mapping[str, tuple[str, ...]] = {
    "merged": ("bf16", "f16", "f32"),
    "gguf": ("f16", "bf16", "f32", "q8_0"),
    "ollama": ("f16", "bf16", "f32", "q8_0"),
    "presets": (),
}


@dataclass(frozen=True)
class Wish:
    """What a user asked for. `onto`: the base as published or as trained on; `dtype`: None for the usual one.

    `only`: adapter or model, "" for both. `source`: a model Ollama knows, in place of a base written beside it.
    `converter`: a folder with llama.cpp's scripts. `check`: score the files once they are written.
    """

    kind: Kind
    format: str | None = None
    out: Path | None = None
    onto: str = "base"
    dtype: str | None = None
    only: str = ""
    source: str = ""
    converter: Path | None = None
    check: bool = True


def wish(kind: str, fmt: str | None, out: Path | None, onto: str, dtype: str | None, more: Sequence[str]) -> Wish:
    """From a user's words; `more`: `key=value`, as of --set. Errors: UserError."""
    chosen = next((one for one in KINDS if one == kind), None)
    if chosen is None:
        raise refuse(f"--to {kind}: there is no such export.", _near(kind, KINDS))
    if onto not in ONTO:
        raise refuse(f"--onto {onto}: there is no such base.", _near(onto, ONTO))
    if dtype is not None and dtype not in DTYPES[kind]:
        remedy = (
            f"It is one of {', '.join(DTYPES[kind])}." if DTYPES[kind] else "Presets hold no weights: leave it out."
        )
        raise refuse(f"--dtype {dtype} is not for {kind}.", remedy)
    return _more(Wish(chosen, fmt, out, onto, dtype), more)


def _more(asked: Wish, more: Sequence[str]) -> Wish:
    keys = ("only", "from", "converter", "check")
    for one in more:
        key, _, value = one.partition("=")
        if key not in keys or not value:
            raise refuse(f"--set {one}: not a setting of an export.", f"It is key=value, with {', '.join(keys)}.")
        if key == "only" and value not in ("adapter", "model"):
            raise refuse(f"--set {one}: there is no such part.", "It is adapter or model.")
        if key == "check" and value not in ("yes", "no"):
            raise refuse(f"--set {one}: neither yes nor no.", "check=no leaves the written files unscored.")
        if key == "check":
            asked = replace(asked, check=value == "yes")
        elif key == "converter":
            asked = replace(asked, converter=Path(value))
        elif key == "from":
            asked = replace(asked, source=value)
        else:
            asked = replace(asked, only=value)
    return asked


def _near(word: str, known: Sequence[str]) -> str:
    near = get_close_matches(word, known, 1, 0.5)
    return f"Did you mean {near[0]}?" if near else f"It is one of {', '.join(known)}."


@dataclass(eq=False)
class Errand:
    """A run and a wish. `format_name`: as the recipe says it."""

    opened: Opened
    wish: Wish
    format: Format
    format_name: str
    _worn: list[Worn] = field(default_factory=list)

    @property
    def vocabulary(self) -> Vocabulary:
        return self.opened.plan.vocabulary

    @property
    def name(self) -> str:
        """Of the run, as a file may be called."""
        return _fit(self.opened.run.path.resolve().name)

    @property
    def base_name(self) -> str:
        """Of the base, likewise."""
        return _fit(self.opened.base.name.rsplit("/", 1)[-1])

    @property
    def folder(self) -> Path:
        """Where the files go."""
        return self.wish.out or self.opened.run.path / "export" / self.wish.kind

    @property
    def secrets(self) -> tuple[Path, ...]:
        """Places that no file may name."""
        return self.opened.run.path, self.opened.base.folder, Path.cwd()

    def worn(self) -> Worn:
        """The base as it was trained on, wearing the chosen adapter."""
        if not self._worn:
            self._worn.append(opened.wear(self.opened))
        return self._worn[0]

    def facts(self) -> dict[str, Any]:
        """What is said of it in every export."""
        step = self.opened.chosen
        return {
            "name": self.name,
            "kind": self.wish.kind,
            "base": self.opened.base.name,
            "base_revision": self.opened.base.commit,
            "trained_in": self.opened.recipe.quantization,
            "step": step,
            "epoch": None if step is None else round(self.opened.epoch(step), 3),
            "format": self.format_name,
        }

    def passages(self) -> list[Passage]:
        """Every held-out and trained example in the format."""
        heard = ear.ear(self.opened.plan)
        return [*heard.passages("held_out", self.format_name), *heard.passages("train", self.format_name)]

    def questions(self, count: int) -> list[tuple[list[Turn], Passage]]:
        """Turns up to the last question of some examples, held-out ones first, and their passages."""
        found = [one for one in self.passages() if one.asked][:count]
        return [([*self.opened.plan.conversations[one.example].turns[:-1]], one) for one in found]


def _fit(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model"


def errand(run: Opened, asked: Wish) -> Errand:
    """Errors: UserError for a run without an adapter, and for a format it was not trained in."""
    run.adapter  # noqa: B018  # refuses where there is none
    trained = run.recipe.formats.train
    name = asked.format or trained[0]
    if name not in trained:
        chosen = _by_name(name, trained)
        if chosen is None:
            what = f"--format {name}: the run was not trained in it."
            raise refuse(what, f"It was trained in {', '.join(trained)}.")
        name = chosen
    return Errand(run, asked, run.plan.formats[name], name)


def _by_name(name: str, trained: Sequence[str]) -> str | None:
    """Under another of its names."""
    try:
        wanted = prompts.load([name])[0].name
    except UserError:
        return None
    return next((one for one in trained if prompts.load([one])[0].name == wanted), None)
