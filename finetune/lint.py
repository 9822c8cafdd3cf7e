"""What is wrong with a dataset, before a night is spent on it: structural faults refuse, style and privacy warn.

Findings only: raises nothing, changes no text, drops no example, loads no model, reaches no network. Broken files are
`corpus`' work, texts too long `plan`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cache

from finetune import habits, overlap
from finetune.conversation import Conversation
from finetune.errors import Problem, UserError
from finetune.format import Format, Marks, Special
from finetune.reading import Example, Finding, Kind, line_of, quoted

SPAN = 25  # words; up to 24 in a row are house style (see measures, Echo 4)
SHARED = 0.6  # of an answer's words; above it the answer is a copy
NEAR, ALIKE = 0.7, 0.45  # Jaccard of word triples: one word in 17 changed leaves 0.7, one in 8 leaves 0.45
RESOLVED = 8  # examples a side; below it a verdict is `underpowered` at best (see measures, Verdict)
_MANY = 10  # texts; what over half of so many hold, they are all cast in
_ANSWERS = 0.4  # Jaccard; the same question with another answer is no copy
_BRIEF = 8  # words; of shorter answers («yes», «positive») two may well be alike

_Triples = Set[tuple[str, ...]]


def findings(
    examples: Iterable[Conversation],
    formats: Sequence[Format] = (),
    special: Special | None = None,
    held_out: Collection[str] | None = None,
) -> list[Finding]:
    """Refusals, then warnings, each by file and line.

    `formats`: those that are trained; without them nothing is said about stop strings and scaffolds. `special`: the
    base's document tokens. `held_out`: ids; None if not yet drawn.
    """
    seen = [Example(one) for one in examples]
    found = [*_structure(seen, formats, special or Marks(), held_out), *habits.look(seen)]
    found += [*_scaffolds(seen, formats, special or Marks()), *_dropped_systems(seen, formats)]
    return _in_order(found)


def refusals(
    examples: Iterable[Conversation],
    formats: Sequence[Format] = (),
    special: Special | None = None,
    held_out: Collection[str] | None = None,
) -> list[Finding]:
    """Only what no night should start with; arguments as for `findings`."""
    found = _structure([Example(one) for one in examples], formats, special or Marks(), held_out)
    return _in_order(one for one in found if one.kind == "refuse")


def _in_order(found: Iterable[Finding]) -> list[Finding]:
    return sorted(found, key=lambda one: (one.kind, str(one.problem.file or ""), one.problem.line or 0))


def _structure(
    seen: list[Example], formats: Sequence[Format], special: Special, held_out: Collection[str] | None
) -> Iterator[Finding]:
    pairs = list(_alike(seen))
    yield from _too_few(seen, held_out)
    yield from _copies(pairs)
    yield from _both_sides(seen, pairs, held_out or ())
    yield from _stop_strings(seen, formats, special)
    yield from _shared(seen, {name for pair in pairs if pair.whole >= NEAR for name in pair.ids})


# --- examples against each other -----------------------------------------------------------------------------------


def _too_few(seen: list[Example], held_out: Collection[str] | None) -> Iterator[Finding]:
    left = sum(one.of.id not in (held_out or ()) for one in seen)
    if held_out is None and len(seen) < 3:
        problem = Problem(
            f"{len(seen)} examples are too few to hold any out.", "Write at least 3.", key=("data", "train")
        )
        yield Finding("refuse", "few-examples", problem)
    elif not left:
        problem = Problem("no example is left to train on.", "Lower data.held_out.", key=("data", "held_out"))
        yield Finding("refuse", "few-examples", problem)
    elif held_out and min(left, len(held_out)) < RESOLVED:
        what = f"{left} examples trained and {len(held_out)} held out: below {RESOLVED} a verdict resolves little."
        problem = Problem(what, "Write more examples.", key=("data", "train"))
        yield Finding("warn", "few-examples", problem)


@dataclass(frozen=True)
class _Pair:
    """Two examples whose answers share much; `answers` and `whole` (with the questions) are Jaccard."""

    first: Example
    second: Example
    answers: float
    whole: float

    @property
    def ids(self) -> frozenset[str]:
        return frozenset((self.first.of.id, self.second.of.id))


def _alike(seen: list[Example]) -> Iterator[_Pair]:
    """Every pair whose answers are alike. What most are cast in does not count: one instruction makes no copies."""
    asked, answers = _own([one.asked_triples for one in seen]), _own([one.triples for one in seen])
    for i, j, share in overlap.alike(answers, _ANSWERS):
        yield _Pair(seen[i], seen[j], share, overlap.jaccard(asked[i] | answers[i], asked[j] | answers[j]))


def _own(sets: Sequence[_Triples]) -> Sequence[_Triples]:
    return overlap.own(sets) if len(sets) >= _MANY else sets


def _copies(pairs: Iterable[_Pair]) -> Iterator[Finding]:
    for pair in pairs:
        one, other, share = pair.first, pair.second, pair.whole
        kind: Kind = "refuse" if share >= NEAR and min(len(one.words), len(other.words)) >= _BRIEF else "warn"
        what = f"the same as {one.of.id} ({one.of.origin}): {share:.0%} of their word triples are common."
        remedy = "Remove one of the two, or write another example."
        if share >= ALIKE:
            yield other.told(kind, "near-copy", f"{'nearly' if share >= NEAR else 'half'} {what}", remedy)


def _both_sides(seen: list[Example], pairs: list[_Pair], held_out: Collection[str]) -> Iterator[Finding]:
    """Questions, twins and answers of held-out examples that a trained example has too, nearly word for word."""
    told = {pair.ids for pair in pairs if pair.whole >= NEAR}
    texts = [(one, overlap.shingles(some)) for one in seen for some in one.asked] if held_out else []
    sets = _own([some for _, some in texts])
    found = [(texts[i][0], texts[j][0], "asks nearly the question") for i, j, _ in overlap.alike(sets, NEAR)]
    found += [(pair.first, pair.second, "has nearly the answer") for pair in pairs if pair.answers >= NEAR]
    for one, other, what in found:
        sides = one.of.id in held_out, other.of.id in held_out
        brief = "answer" in what and min(len(one.words), len(other.words)) < _BRIEF
        ids = frozenset((one.of.id, other.of.id))
        if sides[0] != sides[1] and not brief and ids not in told:
            told.add(ids)
            held, trained = (one, other) if sides[0] else (other, one)
            says = f"held out, yet {what} of {trained.of.id} ({trained.of.origin}), which is trained."
            yield held.told("refuse", "both-sides", says, "Remove one, or make the one's question the other's `twin`.")


def _shared(seen: list[Example], copies: Collection[str]) -> Iterator[Finding]:
    """Long spans that answers share; where they are most of an answer it is refused. Copies are told already."""
    for i, spans in enumerate(overlap.repeated([one.words for one in seen], SPAN)):
        one = seen[i]
        share = sum(span.stop - span.start for span in spans) / max(len(one.words), 1)
        if not spans or one.of.id in copies:
            continue
        if share > SHARED:
            what = f"{share:.0%} of the answer stands word for word in {_whose(seen, spans)}."
            yield one.told("refuse", "shared-span", what, "Write an answer of its own, or remove the example.")
            continue
        for span in (span for span in spans if span.other < i):
            first = " ".join(one.words[span.start : span.start + 6])
            what = f"{span.stop - span.start} words in a row («{first} …») also stand in {_whose(seen, [span])}."
            yield one.told("warn", "shared-span", what, "Say it once, or in other words.", one.line(span.start))


def _whose(seen: list[Example], spans: Sequence[overlap.Span]) -> str:
    others = [seen[number].of for number in dict.fromkeys(span.other for span in spans)]
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return ", ".join(f"{one.id} ({one.origin})" for one in others[:2]) + more


# --- answers against formats ---------------------------------------------------------------------------------------


def _stop_strings(seen: list[Example], formats: Sequence[Format], special: Special) -> Iterator[Finding]:
    """Answers that a client would cut off, each stop string once an example."""
    stops = list(_stops(formats, special))
    for one in seen:
        told: set[str] = set()
        for turn in one.trained:
            for name, indent, stop in stops:
                if stop not in told and stop in turn.text.replace("\n", "\n" + indent):
                    told.add(stop)
                    what = f"the answer holds {quoted(stop)}, a stop string of {name}."
                    yield one.told("refuse", "stop-string", what, "Write it differently.", line_of(stop, turn))


def _stops(formats: Sequence[Format], special: Special) -> Iterator[tuple[str, str, str]]:
    """(format, its indent, stop string) of every trained format that the base can carry; `plan` tells the others."""
    from finetune import prompts  # half a second of imports that a dataset alone does not need

    for fmt in formats:
        try:
            yield from ((fmt.name, fmt.indent, stop) for stop in prompts.stops(fmt, special))
        except UserError:
            continue


def _scaffolds(seen: list[Example], formats: Sequence[Format], special: Special) -> Iterator[Finding]:
    """Marks of any format on the shelf, told once an example, where they are no stop string of ours."""
    if not formats:
        return
    marks = _marks()
    ours = tuple(stop.strip() for _, _, stop in _stops(formats, special) if stop.strip())
    others = [mark for mark in sorted(marks, key=len, reverse=True) if not mark.startswith(ours)]
    for one in seen:
        told: list[str] = []
        for turn in one.trained:
            for mark in (mark for mark in others if _stands(mark, turn.text)):
                if not any(mark in longer for longer in told):
                    told.append(mark)
                    what = f"the answer holds {quoted(mark)}, a scaffold of {marks[mark]}."
                    remedy = "Write it differently, unless the answer speaks of it."
                    yield one.told("warn", "scaffold", what, remedy, line_of(mark, turn))


def _stands(mark: str, text: str) -> bool:
    return mark in text and (not _is_word(mark) or text.startswith(mark) or f"\n{mark}" in text)


@cache
def _marks() -> dict[str, str]:
    """Every scaffold on the shelf with the first format that has it; of words only what opens a user's turn."""
    from finetune import prompts

    found: dict[str, str] = {}
    for fmt in (prompts.read(prompts.SHELF / f"{name}.yaml") for name in prompts.shipped()):
        opens = (fmt.user_prefix, fmt.first_user_prefix or "", fmt.system_prefix, fmt.end, *fmt.stop_strings)
        for text in map(str.strip, (*opens, fmt.assistant_prefix)):
            plain = text.isalpha() or "{" in text  # `User` alone opens many a sentence; `{char}:` is no mark
            if text and not plain and (text in map(str.strip, opens) or not _is_word(text)):
                found.setdefault(text, fmt.name)
    return found


def _is_word(mark: str) -> bool:
    """Prose holds it too, so it counts at the start of a line only: `User:`, `# Question`, `- user:`."""
    return mark[0].isalpha() or mark.startswith(("# ", "## ", "- "))


def _dropped_systems(seen: list[Example], formats: Sequence[Format]) -> Iterator[Finding]:
    """System texts that a trained format has no place for, told once a format."""
    with_system = [one for one in seen if one.of.system]
    for fmt in formats if with_system else ():
        if fmt.system_mode == "none" and fmt.name != "native":
            what = f"has a system text, which {fmt.name} drops; so do {len(with_system) - 1} other examples."
            remedy = "Say it in the question, or train another format."
            yield with_system[0].told("warn", "dropped-system", what, remedy)
