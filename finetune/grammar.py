"""Formats nobody listed: a grammar of pseudo-markdown turns, drawn by name, and small slips of the known formats.

`sampled:1f3a9c` is drawn from its own name and nothing else, `chatml~blank-line` from the format before the tilde, so
either is found again wherever its name is read. Nothing is remembered, weighed or tokenized here. The lists below are
the grammar: a change in them changes what a name means, and so what a run that goes on would train.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, count
from typing import TypeVar

from finetune.conversation import Turn
from finetune.errors import refuse
from finetune.filling import PROBE, filled, mapped
from finetune.format import Format
from finetune.shelf import SHELF, read, shipped

T = TypeVar("T")

PREFIX = "sampled:"
_NAME = re.compile(f"{PREFIX}[0-9a-f]{{6}}")

# Who asks, who answers.
_PAIRS = tuple(
    tuple(pair.split("/"))
    for pair in """
    User/Assistant Human/AI Human/Assistant User/AI Question/Answer Prompt/Response Prompt/Completion Q/A You/Me Me/You
    Me/AI Instruction/Reply Instruction/Response Request/Reply Input/Output Query/Answer Ask/Tell Message/Reply
    Task/Solution Guest/Host Host/Guest Visitor/Guide Student/Teacher Pupil/Tutor Reader/Author Caller/Operator
    Customer/Clerk Interviewer/Interviewee Patient/Doctor Child/Grandmother Traveller/Ferryman Person/Machine
    Client/Counsel Apprentice/Master Player/Narrator Citizen/Oracle Speaker1/Speaker2 A/B P1/P2
    """.split()  # noqa: SIM905
)
_PEOPLE = """
    Anna Boris Mira Tom Alice Joseph Fatima Kofi Ingrid Mei Ravi Lucía Watson Holmes Sancho Quixote Dante Virgil Jim
    Huck Dorothy Scarecrow Hamlet Horatio Frodo Gandalf Ishmael Queequeg Wanderer Shadow
    """.split()  # noqa: SIM905
_SYSTEMS = ("System", "Context", "Note", "Setting", "Background", "Scene", "Instructions")
_CASES: tuple[Callable[[str], str], ...] = (str, str, str.lower, str.upper)

# How a role stands: the user's, the assistant's. Only a closed one needs nothing but a space behind it.
# fmt: off
_CLOSED = (
    ("**{}**", "**{}**"), ("*{}*", "*{}*"), ("_{}_", "_{}_"), ("__{}__", "__{}__"), ("***{}***", "***{}***"),
    ("[{}]", "[{}]"), ("({})", "({})"), ('"{}"', '"{}"'), ("«{}»", "«{}»"), ("`{}`", "`{}`"), ("~{}~", "~{}~"),
    ("> **{}**", "> **{}**"), ("- **{}**", "- **{}**"), ("[**{}**]", "[**{}**]"), ("== {} ==", "== {} =="),
    ("--- {} ---", "--- {} ---"), ("**{}**", "*{}*"), ("[{}]", "({})"),
)
_OPEN = (
    ("{}", "{}"), ("{}", "{}"), ("{}", "{}"), ("# {}", "# {}"), ("## {}", "## {}"), ("### {}", "### {}"),
    ("#### {}", "#### {}"), ("# {}", "## {}"), ("## {}", "### {}"), ("> {}", "> {}"), ("- {}", "- {}"),
    ("* {}", "* {}"), ("1. {}", "2. {}"), ("1) {}", "2) {}"), ("(1) {}", "(2) {}"), ("@{}", "@{}"),
)

# What follows the role: inside its emphasis, behind it.
_SEPARATORS = (
    (":", " "), (":", " "), ("", ": "), (":", "  "), (":", ""), ("", " : "), ("", " - "), ("", " — "), ("", " -> "),
    ("", " → "), ("", " => "), ("", " | "), ("", " >> "), ("", "\n"), (":", "\n"), ("", ":\n"), ("", "\n\n"),
    (":", "\n\n"), ("", " ->\n"),
)
_SPACE = ("", " ")

# What ends a question, what ends an answer.
_GAPS = (
    ("\n", "\n"), ("\n\n", "\n\n"), ("\n\n", "\n\n"), ("\n", "\n\n"), ("\n\n\n", "\n\n\n"), ("\n\n", "\n\n\n"),
    ("\n", "\n\n---\n\n"), ("\n\n", "\n\n---\n\n"), ("\n\n---\n\n", "\n\n---\n\n"), ("\n\n", "\n\n***\n\n"),
)
# fmt: on

_ASKED = (Turn("system", ""), PROBE.turns[0])


class _Lot:
    """Choices that depend on nothing but `parts`: 256 bits, spent by division. The same on every Python."""

    def __init__(self, *parts: object) -> None:
        self._rest = int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest(), "big")

    def take(self, options: Sequence[T]) -> T:
        self._rest, at = divmod(self._rest, len(options))
        return options[at]


def sample(*parts: object) -> Format:
    """One pseudo-markdown format, drawn by `parts`; it never asks with the very string of a shipped format."""
    return next(samples(*parts))


def samples(*parts: object) -> Iterator[Format]:
    """Draws without end, for whoever must pass some over. The n-th depends on `parts` and n alone."""
    for attempt in count():
        digest = hashlib.sha256("\x1f".join(map(str, (*parts, attempt))).encode()).hexdigest()
        yield named(PREFIX + digest[:6])


@lru_cache(maxsize=256)
def named(name: str) -> Format:
    """The format that a name such as `sampled:1f3a9c` means. UserError where the name is none."""
    if not _NAME.fullmatch(name):
        raise refuse(f"{name} is not a sampled format.", f"Write six hex digits, as in {PREFIX}1f3a9c.")
    drawn = (_drawn(name, _Lot(name, again)) for again in count())
    return next(fmt for fmt in drawn if sends(fmt) not in _shipped())


def sends(fmt: Format) -> str:
    """What a client sends for a first question without a system text; white space at its end does not count."""
    said = mapped(fmt, "<s>", "</s>")
    return "".join(segment.text for segment in filled(_ASKED, said, said.end)).rstrip()


@lru_cache(maxsize=1)
def _shelf() -> tuple[Format, ...]:
    return tuple(read(SHELF / f"{name}.yaml") for name in shipped())


@lru_cache(maxsize=1)
def _shipped() -> frozenset[str]:
    return frozenset(map(sends, _shelf()))


@dataclass(frozen=True)
class _Heads:
    """How every turn of one format opens."""

    user: str
    assistant: str
    system: str


def _drawn(name: str, lot: _Lot) -> Format:
    heads, (asked, told) = _heads(lot), lot.take(_GAPS)
    generation = heads.assistant.rstrip(" ")
    if generation.endswith("\n") and lot.take((False, False, True)):  # some clients leave the line break to the model
        generation = generation.rstrip("\n")
    mode, prefix, suffix = lot.take((("before", "", "\n\n"), ("before", heads.system, told), ("inside", "", "\n\n")))
    return Format(
        name=name,
        family="sampled",
        user_prefix=heads.user,
        user_suffix=asked,
        assistant_prefix=heads.assistant,
        assistant_suffix=told,
        generation_prompt=generation,
        system_mode="before" if mode == "before" else "inside_first_user",
        system_prefix=prefix,
        system_suffix=suffix,
        stop_strings=("\n" + heads.user.rstrip(" "),),
        source=("drawn from the house's pseudo-markdown grammar",),
    )


def _heads(lot: _Lot) -> _Heads:
    user, assistant, system = map(lot.take(_CASES), (*_roles(lot), lot.take(_SYSTEMS)))
    frames = lot.take(_OPEN + _CLOSED)
    inside, behind = lot.take(_SEPARATORS + (_SPACE,) * (2 * (frames in _CLOSED)))
    asks, answers = (
        frame.format(word + inside) + behind for frame, word in zip(frames, (user, assistant), strict=True)
    )
    return _Heads(asks, answers, frames[0].replace("1", "0").format(system + inside) + behind)


def _roles(lot: _Lot) -> Sequence[str]:
    if lot.take((True, True, True, False)):
        return lot.take(_PAIRS)
    user = lot.take(_PEOPLE)
    return user, lot.take([one for one in _PEOPLE if one != user])


def widest() -> tuple[int, int]:
    """UTF-8 bytes that no sampled format exceeds: around a question and its answer; around a system text."""

    def most(texts: Iterator[str]) -> int:
        return max(len(text.encode()) for text in texts)

    word = most(chain.from_iterable((*_PAIRS, _PEOPLE)))
    head = most(a + b for a, b in (*_OPEN, *_CLOSED)) + 2 * most(a + b for a, b in _SEPARATORS)
    return head + 2 * word + most(a + b for a, b in _GAPS), head + most(iter(_SYSTEMS)) + most(b for _, b in _GAPS)


# --- slips ---------------------------------------------------------------------------------------------------------


def whitespace_twins(fmt: Format, system: str = "") -> list[Format]:
    """What people and clients make of a format by a slip, each named `chatml~blank-line` and the like.

    Only those that render unlike the original and unlike every shipped format, after one question and after two, in
    a conversation with the text `system`; with none, a missing system shows only where there is a default one.
    """
    known = {*_rendered(fmt, system), *_shown(system)}
    found = [twin for slip in SLIPS if (twin := slipped(fmt, slip)) is not None]
    return [one for one in found if known.isdisjoint(_rendered(one, system))]


def slipped(fmt: Format, slip: str) -> Format | None:
    """The format with one of `SLIPS` made; None where there is nothing to slip on."""
    changed = SLIPS[slip](fmt)
    return None if changed == fmt or fmt.family == "native" else replace(changed, name=f"{fmt.name}~{slip}", aliases=())


def _rendered(fmt: Format, system: str) -> tuple[str, str]:
    """The probe after one exchange and after two; no system text means the format's default."""
    turns, own = ((Turn("system", system),) if system else ()) + PROBE.turns, mapped(fmt, "<s>", "</s>")
    one, two = (filled(some, own, "</s>") for some in (turns[:-2], turns))
    return "".join(row.text for row in one), "".join(row.text for row in two)


@lru_cache(maxsize=4)
def _shown(system: str) -> frozenset[str]:
    return frozenset(text for one in _shelf() for text in _rendered(one, system))


def _lower_roles(fmt: Format) -> Format:
    """Marks such as `<|USER|>` or `[INST]` are the vocabulary's and stay."""

    def low(text: str) -> str:
        return "".join(part if at % 2 else part.lower() for at, part in enumerate(_MARKS.split(text)))

    return replace(_on_user(_on_answer(fmt, low), low), system_prefix=low(fmt.system_prefix))


_MARKS = re.compile(r"(<[|｜].*?[|｜]>|</?s>|<</?SYS>>|\[/?(?:INST|SYSTEM_PROMPT)\])")


def _no_newline(fmt: Format) -> Format:
    return _once(fmt, "\n", "")


def _blank_line(fmt: Format) -> Format:
    return _once(fmt, "\n", "\n\n")


def _doubled_space(fmt: Format) -> Format:
    if " " in fmt.user_prefix:
        return _on_user(fmt, lambda text: "  ".join(text.rsplit(" ", 1)))
    return _once(fmt, " ", "  ")


def _no_system(fmt: Format) -> Format:
    return replace(fmt, system_mode="none", default_system="")


SLIPS: dict[str, Callable[[Format], Format]] = {
    "no-newline": _no_newline,
    "blank-line": _blank_line,
    "doubled-space": _doubled_space,
    "lower-roles": _lower_roles,
    "no-system": _no_system,
}


def _once(fmt: Format, old: str, new: str) -> Format:
    """`old` becomes `new` in one place: behind the question, else before the answer, else before the question."""

    def swap(text: str) -> str:
        return new.join(text.rsplit(old, 1))

    if old in fmt.user_suffix:
        return replace(fmt, user_suffix=swap(fmt.user_suffix))
    return _on_answer(fmt, swap) if old in fmt.generation_prompt else _on_user(fmt, swap)


def _on_user(fmt: Format, change: Callable[[str], str]) -> Format:
    """A stop string that names the old prefix names the new one."""
    first, prefix = fmt.first_user_prefix, change(fmt.user_prefix)
    stops = (change(one) if _lost(one, fmt.user_prefix, prefix) else one for one in fmt.stop_strings)
    return replace(
        fmt,
        user_prefix=prefix,
        first_user_prefix=None if first is None else change(first),
        stop_strings=tuple(stops),
    )


def _lost(stop: str, old: str, new: str) -> bool:
    return stop.strip() in old and stop.strip() not in new


def _on_answer(fmt: Format, change: Callable[[str], str]) -> Format:
    asked, lead = change(fmt.generation_prompt), fmt.assistant_prefix[len(fmt.generation_prompt) :]
    return replace(fmt, generation_prompt=asked, assistant_prefix=asked + lead)
