"""What makes a dataset teach something else than its writers meant: habits, lopsided parts, debris, private things.

Warnings only; nothing here keeps a night from starting. What counts as a stock phrase or a secret is said below, in
`manner` and `private`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from statistics import median

from finetune import manner, overlap, private
from finetune.conversation import Part
from finetune.reading import Example, Finding, Rule, line_of, parts, quoted

_SIMILAR = 0.4  # Jaccard of the word triples of two perspectives
_UNEQUAL = 10  # times as long
_LONG = 60  # words
_OPENING = 0.1  # share of answers, and at least four of them
_FOREIGN = 0.2  # share of an answer's letters in another script than the dataset's
_AGREED = 0.8  # share of answers whose language is known that makes it the dataset's
_TERSE = 0.1  # of the median answer's words


def look(seen: Sequence[Example]) -> Iterator[Finding]:
    """Every warning about style and privacy."""
    yield from _conclusions(seen)
    yield from _openings(seen)
    yield from _foreign(seen)
    yield from _short(seen)
    for one in seen:
        yield from _perspectives(one)
        yield from _stock(one)
        yield from _debris(one)
        yield from _private(one)


def _conclusions(seen: Sequence[Example]) -> Iterator[Finding]:
    """Where there are perspectives, or where most examples conclude, an answer that does not."""
    kinds = [{part.kind for part, _ in one.pieces} for one in seen]
    usual = sum("conclusion" in some for some in kinds) > len(seen) / 2
    for one, some in zip(seen, kinds, strict=True):
        if "conclusion" not in some and (usual or "perspective" in some) and one.trained:
            remedy = "Write `### conclusion`: what it comes to, and what would change it."
            yield one.told("warn", "no-conclusion", "the answer has no conclusion.", remedy, one.trained[-1].line)


def _perspectives(one: Example) -> Iterator[Finding]:
    views = [(part, some) for part, some in one.pieces if part.kind == "perspective"]
    if len(views) == 1:
        what, remedy = "only one perspective.", "Add another that sees it differently, or write plain text."
        yield one.told("warn", "one-perspective", what, remedy, views[0][0].line)
    for (a, some), (b, others) in combinations(views, 2):
        if (share := overlap.jaccard(overlap.shingles(some), overlap.shingles(others))) >= _SIMILAR:
            what = f"{quoted(b.title)} nearly copies {quoted(a.title)}: {share:.0%} of their word triples are common."
            remedy = "Let it see something of its own, or take it out."
            yield one.told("warn", "similar-perspectives", what, remedy, b.line)
    yield from _unequal(one, [(len(some), part) for part, some in views])


def _unequal(one: Example, views: list[tuple[int, Part]]) -> Iterator[Finding]:
    if len(views) < 2:
        return
    (short, brief), *_, (long, wordy) = sorted(views, key=lambda view: view[0])
    if long >= _LONG and long >= _UNEQUAL * short:
        what = f"{quoted(wordy.title)} has {long} words, {quoted(brief.title)} {short}."
        yield one.told("warn", "unequal-perspectives", what, "Give each about the room it needs.", brief.line)


def _openings(seen: Sequence[Example]) -> Iterator[Finding]:
    """Three first words that many answers, or many conclusions, have in common; told once, where first met."""
    answers = [(one, parts(turn)[0]) for one in seen for turn in one.trained]
    conclusions = [(one, part) for one in seen for part, _ in one.pieces if part.kind == "conclusion"]
    for name, texts in (("answers", answers), ("conclusions", conclusions)):
        groups: defaultdict[str, list[tuple[Example, Part]]] = defaultdict(list)
        for one, part in texts:
            groups[manner.opening(part.text)].append((one, part))
        groups.pop("", None)
        for first, group in groups.items():
            if len(group) >= max(4, _OPENING * len(texts)):
                share = f"{len(group)} of {len(texts)} {name} ({len(group) / len(texts):.0%})"
                one, part = group[0]
                remedy = "Begin most of them otherwise: it will be learned as a habit."
                yield one.told("warn", "same-opening", f"{share} begin with «{first}».", remedy, part.line)


def _stock(one: Example) -> Iterator[Finding]:
    for part, some in one.pieces:
        if found := manner.stock(part.text, some):
            what = f"stock phrases of chat models: {', '.join(map(quoted, found))}."
            yield one.told("warn", "stock-phrase", what, "Say it as you would to a friend.", part.line)


def _debris(one: Example) -> Iterator[Finding]:
    for turn in one.trained:
        for what, mark in manner.debris(turn.text):
            said = f"the answer holds {what}: {quoted(mark)}."
            yield one.told("warn", "debris", said, "Take it out, or finish the text.", line_of(mark, turn))


def _private(one: Example) -> Iterator[Finding]:
    """In every turn, trained or not, and in the twin: `sft push --with-texts` publishes them all."""
    texts = [(part.text, part.line) for turn in one.of.turns for part in parts(turn)]
    texts += [(one.of.twin, one.of.origin.line)] if one.of.twin else []
    for text, line in texts:
        for found in private.find(text):
            rule: Rule = "secret" if found.kind == "secret" else "private"
            remedy = "Revoke it and put a made-up one there." if rule == "secret" else _MADE_UP[found.kind]
            yield one.told("warn", rule, f"{found.what}: {quoted(found.shown)}.", remedy, line)


_MADE_UP = {"e-mail": "Write name@example.org.", "phone": "Write a number kept for fiction: +1 202-555-0142."}


def _foreign(seen: Sequence[Example]) -> Iterator[Finding]:
    """Answers in another script, or surely in another language, than the rest."""
    texts = {one: "\n".join(part.text for part, _ in one.pieces) for one in seen}
    scripts = {one: manner.scripts(text) for one, text in texts.items()}
    usual = _most(scripts.values())
    odd = {one: counts for one, counts in scripts.items() if counts.total() - counts[usual] > _FOREIGN * counts.total()}
    for one, counts in odd.items():
        (name, count), *_ = (pair for pair in counts.most_common() if pair[0] != usual)
        what = f"{count / counts.total():.0%} of the answer is in {name.title()} letters, the rest in {usual.title()}."
        yield one.told("warn", "foreign", what, "Take it out unless it is meant.")
    yield from _languages([one for one in seen if one not in odd])


def _most(counts: Iterable[Counter[str]]) -> str:
    """What most texts are mostly made of; "" where there is nothing."""
    votes = Counter(one.most_common(1)[0][0] for one in counts if one)
    return votes.most_common(1)[0][0] if votes else ""


def _languages(seen: Sequence[Example]) -> Iterator[Finding]:
    spoken = {one: name for one in seen if (name := manner.language(one.words))}
    votes = Counter(spoken.values()).most_common(1)
    if not votes or votes[0][1] < _AGREED * len(spoken):
        return
    for one, name in spoken.items():
        if name != votes[0][0]:
            what = f"the answer is in {name}, most others are in {votes[0][0]}."
            yield one.told("warn", "foreign", what, "Take it out unless it is meant.")


def _short(seen: Sequence[Example]) -> Iterator[Finding]:
    """Answers far shorter than the median; where all are short, none is."""
    usual = median([len(one.words) for one in seen] or [0])
    for one in seen:
        if one.trained and len(one.words) < _TERSE * usual:
            what = f"the answer has {len(one.words)} words, the median {usual:.0f}."
            yield one.told("warn", "short-answer", what, "Write it out, or remove the example.", one.trained[-1].line)
