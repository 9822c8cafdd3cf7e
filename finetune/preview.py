"""The exact tokens of an example in a format, trained ones told from the others. Shows; trains and judges nothing.

In colour, tokens take turns in two shades; without it, trained stretches stand in ⟦ ⟧. Newlines are shown as ↵, special
tokens by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from finetune import bases, plan, prompts, recipe
from finetune.conversation import Conversation
from finetune.errors import UserError, refuse
from finetune.format import Format
from finetune.masks import Tokens, Vocabulary, encode
from finetune.tables import harmless

_TRAINED, _CONTEXT = ("black on green", "black on bright_green"), ("default", "bright_black")
_SPECIAL = "bold reverse"


@dataclass(frozen=True)
class Piece:
    """One token: its id, the characters it stands for (a special token's name), whether it is in the loss."""

    id: int
    text: str
    trained: bool
    special: bool


@dataclass(frozen=True)
class View:
    """One example in one format. `prompt`: tokens a client would send before the last answer."""

    example: str
    place: str
    format: str
    held_out: bool
    prompt: int
    answers: int
    pieces: tuple[Piece, ...]

    @property
    def supervised(self) -> int:
        """Tokens in the loss."""
        return sum(piece.trained for piece in self.pieces)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        counts = {"tokens": len(self.pieces), "supervised": self.supervised, "prompt": self.prompt}
        where = {"example": self.example, "origin": self.place, "format": self.format, "held_out": self.held_out}
        return {**where, **counts, "pieces": [vars(piece) for piece in self.pieces]}


def views(path: Path, sets: Sequence[str] = (), formats: Sequence[str] = (), count: int = 1) -> list[View]:
    """The first `count` examples, trained ones first, in the formats named; in the recipe's first where none is.

    Errors: UserError, also where the base's tokenizer is not on this machine.
    """
    wanted = recipe.load(path, sets)
    try:
        known = bases.look_up(wanted.base, wanted.revision)
        if not known.counted:
            what = f"base: the tokenizer of {wanted.base} is not on this machine, so its tokens are not known."
            raise refuse(what, f"Fetch it alone: `{known.remedy}`, or try --set base=pocket.", key=("base",))
        names = wanted.formats.train if "all" in formats else formats or wanted.formats.train[:1]
        wearing = prompts.load(names)
        examples, held_out = plan.examples(wanted)
    except UserError as error:
        raise UserError(recipe.placed(error.problems, path, sets)) from None
    first = sorted(examples, key=lambda one: one.id in held_out)[:count]
    return [_view(one, fmt, known.vocabulary, one.id in held_out) for one in first for fmt in wearing]


def _view(one: Conversation, fmt: Format, vocabulary: Vocabulary, held_out: bool) -> View:
    rendered = prompts.render(one, fmt, vocabulary)
    tokens = encode(rendered, vocabulary)
    pieces = tuple(_pieces(rendered.text, tokens, vocabulary))
    return View(one.id, str(one.origin), fmt.name, held_out, tokens.prompt, len(tokens.answers), pieces)


def _pieces(text: str, tokens: Tokens, vocabulary: Vocabulary) -> Iterator[Piece]:
    """Each token with its characters; where several share one character, the first has it, the others their names."""
    special = {mark.id for mark in vocabulary.marks.values()}
    end = 0
    for id, trained, (start, stop) in zip(tokens.ids, tokens.trained, tokens.places, strict=True):
        shown = text[max(start, end) : stop]
        end = max(end, stop)
        if id in special or not shown:
            shown = vocabulary.tokenizer.id_to_token(id) or f"<{id}>"
        yield Piece(id, shown, trained, id in special)


def show(found: Sequence[View], console: Console) -> None:
    """Onto a console, with a line above each that counts."""
    colour = console.color_system is not None
    for number, view in enumerate(found):
        if number:
            console.print()
        console.print(_caption(view))
        console.print(_coloured(view) if colour else _bracketed(view), soft_wrap=not console.is_terminal)
    marked = [("trained", _TRAINED[0]), " context"] if colour else ["⟦trained⟧ context"]
    console.print(Text.assemble("\n", *marked, "  ", ("<special>", _SPECIAL if colour else ""), "  ↵ newline"))


def _caption(view: View) -> Text:
    share = view.supervised / max(len(view.pieces), 1)
    side = "held out, so only measured" if view.held_out else "trained"
    answers = f", {view.answers} answers" if view.answers > 1 else ""
    counts = f"{len(view.pieces):,} tokens, {view.supervised:,} of them in the loss ({share:.0%}){answers}"
    return Text(f"{harmless(view.example)} · {view.format} · {side} · {counts}\n{harmless(view.place)}", "bold")


def _shown(piece: Piece) -> str:
    return harmless(piece.text).replace("\n", "↵\n")


def _coloured(view: View) -> Text:
    page = Text()
    for number, piece in enumerate(view.pieces):
        style = (_TRAINED if piece.trained else _CONTEXT)[number % 2]
        page.append(_shown(piece), f"{style} {_SPECIAL}" if piece.special else style)
    return page


def _bracketed(view: View) -> Text:
    page, inside = Text(), False
    for piece in view.pieces:
        if piece.trained != inside:
            page.append("⟦" if piece.trained else "⟧")
            inside = piece.trained
        page.append(_shown(piece))
    return page.append("⟧") if inside else page
