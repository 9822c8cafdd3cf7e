"""One example's answers, each token shaded by how surely it is recited, the base beside it.

Hits are what greedy decoding repeats; the shade is the probability, which is what sampling repeats. In colour, or with
hits in ⟦ ⟧. It shows what was read and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune import prompts
from finetune.byheart import judge
from finetune.conversation import Conversation
from finetune.ear import Ear
from finetune.heard import Reading
from finetune.masks import encode
from finetune.passage import Passage
from finetune.tables import harmless

_SHADES = ((0.5, "white on color(52)"), (0.9, "white on color(88)"), (0.99, "white on color(124)"))
_SUREST = "bold white on color(160)"
_MASKED = "dim italic"
_SIDE_BY_SIDE = 100  # columns from which two texts stand beside one another


@dataclass(frozen=True)
class Piece:
    """One token of an answer. `p`, `base_p`: its probability; `hit`, `base_hit`: it is the likeliest; `counted`: in no
    formula and no end mark."""

    text: str
    p: float
    hit: bool
    base_p: float
    base_hit: bool
    counted: bool


@dataclass(frozen=True)
class View:
    """An example as one adapter and the base read it. `run`, `base_run`: counted tokens hit in a row, at most."""

    example: str
    place: str
    split: str
    format: str
    epoch: float
    run: int
    base_run: int
    bits: float
    question: str
    pieces: tuple[Piece, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def view(ear: Ear, one: Passage, readings: tuple[Reading, Reading], epoch: float, place: str) -> View:
    """`readings`: adapter's and base's. `place`: file:line, as it is to be told."""
    conversation = ear.plan.conversations[one.example]
    own, base = readings
    bits = float((own.log_p - base.log_p)[one.counted].sum() / np.log(2))
    pieces = [
        Piece(text, float(np.exp(p)), bool(hit), float(np.exp(b)), bool(known), bool(counted))
        for text, p, hit, b, known, counted in zip(
            _spelled(ear, one, conversation), own.log_p, own.hits, base.log_p, base.hits, one.counted, strict=True
        )
    ]
    longest, base_longest = (judge(one, reading, None, ear.limits).run_max for reading in readings)
    where = (one.example, place, one.split, one.format, epoch)
    return View(*where, longest, base_longest, bits, conversation.question, tuple(pieces))


def _spelled(ear: Ear, one: Passage, conversation: Conversation) -> Iterator[str]:
    """Characters of each token that is read; where several share one, the first has it; end marks by name."""
    plan = ear.plan
    fmt = plan.formats.get(one.format) or prompts.load([one.format])[0]
    rendered = prompts.render(conversation, fmt, plan.vocabulary)
    tokens = encode(rendered, plan.vocabulary)
    special, end = {mark.id for mark in plan.vocabulary.marks.values()}, 0
    for id, read, (start, stop) in zip(tokens.ids, one.read, tokens.places, strict=True):
        shown = rendered.text[max(start, end) : stop]
        end = max(end, stop)
        if read:
            yield (plan.vocabulary.tokenizer.id_to_token(id) or "") if id in special or start == stop else shown


# onto a screen


def show(found: View, console: Console) -> None:
    """The question, then adapter and base beside one another, or below where the screen is narrow."""
    console.print(_caption(found))
    console.print(Text(f"> {harmless(found.question)}", "italic"), soft_wrap=not console.is_terminal)
    console.print()
    colour = console.color_system is not None
    sides = [_page(found.pieces, base, colour) for base in (False, True)]
    longest = {"adapter": found.run, "base": found.base_run}
    heads = [f"{who}: {run} token{'' if run == 1 else 's'} in a row" for who, run in longest.items()]
    if console.width >= _SIDE_BY_SIDE:
        table = Table(*heads, box=None, padding=(0, 2, 0, 0), expand=True)
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(*sides)
        console.print(table)
    else:
        for head, side in zip(heads, sides, strict=True):
            console.print(Text(head, "bold"))
            console.print(side, soft_wrap=not console.is_terminal)
            console.print()
    console.print(_legend(colour))


def _caption(found: View) -> Text:
    side = {"train": "trained", "held_out": "held out, never trained"}.get(found.split, found.split)
    hits = sum(piece.hit for piece in found.pieces)
    at = f"epoch {found.epoch:g}" if found.epoch else "adapter"
    counts = f"{hits} of {len(found.pieces)} tokens are the likeliest, {found.bits:+.0f} bits over the base"
    return Text(
        f"{harmless(found.example)} · {found.format} · {side} · {at} · {counts}\n{harmless(found.place)}", "bold"
    )


def _page(pieces: Sequence[Piece], base: bool, colour: bool) -> Text:
    return _coloured(pieces, base) if colour else _bracketed(pieces, base)


def _coloured(pieces: Sequence[Piece], base: bool) -> Text:
    page = Text()
    for one in pieces:
        p, hit = (one.base_p, one.base_hit) if base else (one.p, one.hit)
        page.append(harmless(one.text), _shade(p) if hit and one.counted else "" if one.counted else _MASKED)
    return page


def _shade(p: float) -> str:
    return next((style for limit, style in _SHADES if p < limit), _SUREST)


def _bracketed(pieces: Sequence[Piece], base: bool) -> Text:
    """A formula inside a stretch of hits does not end it, and begins none."""
    page, inside = Text(), False
    for one in pieces:
        hit = one.base_hit if base else one.hit
        if one.counted and hit != inside:
            page.append("⟦" if hit else "⟧")
            inside = hit
        page.append(harmless(one.text))
    return page.append("⟧") if inside else page


def _legend(colour: bool) -> Text:
    if not colour:
        return Text("⟦ ⟧ what greedy decoding repeats from what stands before it")
    shades: list[str | Text | tuple[str, str]] = [
        *((f" under {limit:.0%} ", style) for limit, style in _SHADES),
        (" surer ", _SUREST),
        "  not repeated  ",
        ("house style or end mark: not counted", _MASKED),
    ]
    return Text.assemble("repeated by greedy decoding, with a probability ", *shades)
