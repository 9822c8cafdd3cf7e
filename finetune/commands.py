"""What may be typed in a talk besides questions: /format, /compare, /echo and the others, one small function each.

Each changes the sitting or shows something of it. Only /save writes a file, and only the one it is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from finetune import byheart, prompts, sheet, tables
from finetune.errors import UserError, refuse
from finetune.format import Format
from finetune.opened import Opened
from finetune.recital import Span
from finetune.sitting import Sitting
from finetune.talk import Exchange
from finetune.voice import Who

_MOST_SCALE = 4.0


@dataclass(frozen=True)
class Command:
    """`usage`: the words that may follow; `does`: is given them as one string."""

    usage: str
    says: str
    does: Callable[[Sitting, str], None]


def follow(sitting: Sitting, head: str) -> list[str]:
    """What may stand after the first words of a command, for the line editor."""
    epochs = [f"{sitting.of.epoch(step):g}" for step in sitting.kept.steps]
    after = {
        "": [f"/{name}" for name in (*COMMANDS, "quit")],
        "/format": list(dict.fromkeys((*sitting.of.plan.formats, *prompts.shipped(), prompts.NATIVE.name))),
        "/epoch": epochs,
        "/compare": ["base", "off", *epochs],
    }
    return after.get(head, [])


def find_format(of: Opened, name: str) -> Format:
    """By the name it has in the recipe, or any other that `prompts` knows. Errors: UserError."""
    known = of.plan.formats.get(name)
    return known if known is not None else prompts.load([name])[0]


# --- what is asked, and how


def _format(sitting: Sitting, words: str) -> None:
    if not words:
        recipe = sitting.of.recipe.formats
        sitting.pane.say(f"Format: {sitting.talk.format.name}")
        sitting.pane.say(f"Trained: {', '.join(recipe.train)}")
        sitting.pane.say(f"Held out: {', '.join(recipe.held_out) or 'none'}")
        sitting.pane.note("`sft ls formats` lists all; a path to a .yaml file works too.")
        return
    sitting.talk.format = find_format(sitting.of, words)
    sitting.pane.note(f"Format {words}: {_met(sitting.of, words)}.")
    _warn_of_system(sitting)


def _met(of: Opened, name: str) -> str:
    if name in of.recipe.formats.train:
        return "trained"
    return "held out of training" if name in of.recipe.formats.held_out else "not in this recipe"


def _system(sitting: Sitting, words: str) -> None:
    if words:
        sitting.talk.system = None if words == "off" else words
    sitting.pane.note(f"System: {sitting.talk.system or 'none'}")
    _warn_of_system(sitting)


def _warn_of_system(sitting: Sitting) -> None:
    fmt = sitting.talk.format
    if sitting.talk.system and fmt.system_mode == "none" and fmt.name != prompts.NATIVE.name:
        sitting.pane.note(f"{fmt.name} has no place for a system text: it is not sent.")


def _show(sitting: Sitting, _words: str) -> None:
    """What the model was sent last, to the byte."""
    last = sitting.last()
    text = sitting.talk.vocabulary.tokenizer.decode(list(last.sent), skip_special_tokens=False)
    sitting.pane.say(text)
    sitting.pane.note(f"[{len(last.sent)} tokens, {last.format}]")


# --- who answers


def _epoch(sitting: Sitting, words: str) -> None:
    if not words:
        sitting.pane.say(f"Kept: {sitting.kept}. Now: {sitting.name(sitting.talk.who)}.")
        return
    sitting.talk.who = Who(sitting.kept.at(_number(words, "an epoch")), sitting.talk.who.scale)
    sitting.pane.note(f"Now {sitting.name(sitting.talk.who)} answers.")


def _base(sitting: Sitting, _words: str) -> None:
    sitting.talk.who = Who(None)
    sitting.pane.note("Now the base answers, without an adapter; /epoch N goes back.")


def _scale(sitting: Sitting, words: str) -> None:
    who = sitting.talk.who
    if not words:
        sitting.pane.say(f"Scale: {who.scale:g}")
        return
    if who.step is None:
        raise refuse("the base has no adapter to scale.", "Choose one with /epoch N.")
    sitting.talk.who = Who(who.step, _number(words, "a scale", 0, _MOST_SCALE))
    sitting.pane.note(f"Now {sitting.name(sitting.talk.who)} answers.")


def _compare(sitting: Sitting, words: str) -> None:
    """`base`, one epoch or two; nothing: the base, or no longer."""
    talk, names = sitting.talk, words.split()
    if words == "off" or (not words and talk.beside):
        talk.beside = None
    elif len(names) <= 2:
        voices = [Who(None) if one == "base" else Who(sitting.kept.at(_number(one, "an epoch"))) for one in names]
        beside, *more = voices or [Who(None)]
        who = more[0] if more else talk.who
        if beside == who:
            raise refuse(f"{sitting.name(who)} beside itself shows nothing.", "Name another epoch, or `base`.")
        talk.beside, talk.who = beside, who
    else:
        raise refuse(f"/compare {words}: too many.", "/compare base, /compare 20, /compare 5 20, or /compare off.")
    beside_whom = f"{sitting.name(talk.beside)} beside {sitting.name(talk.who)}" if talk.beside else ""
    sitting.pane.note(f"Answers of {beside_whom}; the talk goes on from the latter." if beside_whom else "One answer.")


# --- what was said


def _retry(sitting: Sitting, _words: str) -> None:
    last = sitting.last()
    sitting.talk.exchanges.pop()
    try:
        sitting.ask(last.question)
    except UserError:
        sitting.talk.exchanges.append(last)
        raise


def _undo(sitting: Sitting, _words: str) -> None:
    last = sitting.last()
    sitting.talk.exchanges.pop()
    sitting.pane.note(f"Taken back: {last.question.splitlines()[0][:60]}")


def _clear(sitting: Sitting, _words: str) -> None:
    sitting.talk.exchanges.clear()
    sitting.pane.note("Begun anew; settings stay.")


def _echo(sitting: Sitting, _words: str) -> None:
    """Is the last answer recited, from which example, which words; and did the adapter bring them?"""
    last, limits = sitting.last(), byheart.limits()
    found = sitting.library.recited(last.answer)
    long = [one for one in found if one.own >= limits.words]
    sitting.pane.marked(last.answer, [(one.start, one.stop) for one in long])
    if not long:
        sitting.pane.say(f"No {limits.words} words in a row of the dataset's own.")
        if nearest := max(found, key=lambda one: (one.words, one.own), default=None):
            style = " (house style)" if nearest.own < nearest.words else ""
            sitting.pane.say(f"The longest it shares: {nearest.words} words{style} of {_place(sitting, nearest)}.")
        return
    sitting.pane.say(f"{sum(one.words for one in long)} words stand in the dataset, {limits.words} or more in a row:")
    for one, bits in zip(long, _excess(sitting, last, long), strict=True):
        sitting.pane.say(f"  {one.words} words of {_place(sitting, one)}{_told(bits, one, limits)}")


def _told(bits: tuple[float, int] | None, one: Span, limits: byheart.Limits) -> str:
    if bits is None:
        return ""
    excess, tokens = bits
    learned = excess >= max(limits.bits, limits.bits_per_token * tokens)
    says = "learned here" if learned else "too few to call it learned here"
    return f": {excess:.0f} bits likelier than to the base, {says}"


def _place(sitting: Sitting, one: Span) -> str:
    file = Path(one.example.origin.file)
    file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    held = ", held out" if one.example.id in sitting.of.plan.split.held_out else ""
    return f"{one.example.id} ({file}:{one.line}{held})"


def _excess(sitting: Sitting, last: Exchange, spans: list[Span]) -> Iterator[tuple[float, int] | None]:
    """(bits by which whoever answered finds a span likelier than the base does, its tokens); None for the base."""
    said = last.said[-1]
    drawn = "".join(piece for _, piece in said.drawn)
    ends = list(accumulate(len(piece) for _, piece in said.drawn))
    ids = [*last.sent, *(token for token, _ in said.drawn)]
    for one in spans:
        start = drawn.find(said.text[one.start : one.stop])
        if said.who.step is None or start < 0:
            yield None
            continue
        stop = start + one.stop - one.start
        asked = [end > start and begin < stop for begin, end in pairwise([0, *ends])]
        mask = [*(False for _ in last.sent), *asked]
        tuned, base = (sitting.voice.score(ids, mask, who) for who in (said.who, Who(None)))
        yield (base.nll - tuned.nll) / math.log(2), sum(asked)


def _save(sitting: Sitting, words: str) -> None:
    """The last exchange, or the whole talk, as a file for the dataset."""
    name, _, whole = words.rpartition(" ")
    name, whole = (name, whole) if whole == "all" and name else (words, "")
    if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
        name = name[1:-1]  # quoted as in a shell
    if not name:
        raise refuse("/save needs a file.", "/save my-dataset/umbrella.md, or /save my-dataset/umbrella.md all.")
    sitting.last()
    turns = sitting.talk.turns()
    if not whole:
        turns = [turn for turn in turns if turn.role == "system"] + turns[-2:]
    path, made = sheet.write(Path(name).expanduser(), turns, sitting.of.recipe.data.parts)
    sitting.pane.note(f"Wrote {path}: edit it, then `sft check` reads it with the others.")
    if [turn.text for turn in made.turns] != [turn.text for turn in turns]:
        sitting.pane.note("Spacing, or what would have been markup in it, was changed to fit.")


# --- the sampler


def _setting(name: str, low: float, high: float, key: str = "", whole: bool = False) -> Callable[[Sitting, str], None]:
    key = key or name.replace("-", "_")

    def change(sitting: Sitting, words: str) -> None:
        changed: dict[str, Any] = {}
        if words == "off" and name.startswith(("top", "min")):
            changed[key] = None
        elif words:
            value = _number(words, name, low, high)
            if whole and not value.is_integer():
                raise refuse(f"/{name} {words}: not a whole number.", f"{low:g} to {high:g}.")
            changed[key] = int(value) if whole else value
        sitting.talk.draw = replace(sitting.talk.draw, **changed)
        if words and name == "seed":
            sitting.talk.draws = 0
        sitting.pane.note(f"{sitting.sampler()}, at most {sitting.talk.draw.limit} tokens")

    return change


def _number(words: str, what: str, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        value = float(words)
    except ValueError:
        raise refuse(f"{words!r} is not a number.", f"Give {what}.") from None
    if not (math.isfinite(value) and low <= value <= high):
        raise refuse(f"{words} is no {what.removeprefix('an ').removeprefix('a ')}.", f"{low:g} to {high:g}.")
    return value


def _help(sitting: Sitting, _words: str) -> None:
    rows = [(f"/{name} {one.usage}".rstrip(), one.says) for name, one in COMMANDS.items()]
    rows += [
        ("/quit", "leave, as Ctrl-D does"),
        ('"""', "begins and ends a text of several lines; so does a \\ at an end"),
    ]
    sitting.pane.rows(tables.columns(rows))


COMMANDS: dict[str, Command] = {
    "help": Command("", "this list", _help),
    "format": Command("[F]", "ask in another prompt format; alone: which were trained", _format),
    "system": Command("[TEXT|off]", "a system text from here on", _system),
    "epoch": Command("[N]", "answer with the adapter of an epoch that was kept", _epoch),
    "base": Command("", "answer with the base alone", _base),
    "scale": Command("[X]", "add only a part of the adapter, such as 0.7", _scale),
    "compare": Command("[base|N|N N|off]", "two answers side by side", _compare),
    "echo": Command("", "is the last answer recited: which words, from which example", _echo),
    "save": Command("FILE [all]", "the last exchange, or the whole talk, as a Markdown example", _save),
    "retry": Command("", "ask the last question again", _retry),
    "undo": Command("", "take the last exchange back", _undo),
    "clear": Command("", "begin anew", _clear),
    "show": Command("", "the exact prompt that was sent last", _show),
    "temperature": Command("[X]", "0 takes the likeliest token", _setting("temperature", 0, 5)),
    "top-k": Command("[N|off]", "draw from the N likeliest tokens", _setting("top-k", 1, 10**6, whole=True)),
    "top-p": Command("[X|off]", "draw from the likeliest tokens that make up X", _setting("top-p", 0.001, 1)),
    "min-p": Command("[X|off]", "draw from tokens X times as likely as the likeliest", _setting("min-p", 0, 1)),
    "seed": Command("[N]", "of the draws to come", _setting("seed", 0, 10**9, whole=True)),
    "max": Command("[N]", "tokens of an answer at most", _setting("max", 1, 10**6, "limit", whole=True)),
}
