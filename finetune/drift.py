"""What the base knew and the adapter may have lost: general text, foreign scripts, stock openings, facts, voice.

At looks all is read by teacher forcing, adapter beside base; answers already written are judged as they are. It writes
nothing but the base's own figures, once; what the rows amount to is `forgotten`'s, whether that is harm `verdict`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from finetune import facts, phrases, prompts, runs, scripts, suite
from finetune.conversation import Conversation, Origin, Turn
from finetune.facts import Fact, Held
from finetune.format import Rendered, Segment
from finetune.looks import Place
from finetune.masks import Tokens, Vocabulary, encode
from finetune.plan import Plan
from finetune.runlength import Bools
from finetune.speak import Contrast, Speaker
from finetune.suite import Axis, Suite

CACHE = "drift_base.json"  # in a run folder
_NATS_PER_BIT = 0.6931471805599453
Row = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A text that is read: neutral, or a held-out answer after its prompt. `size`: UTF-8 bytes of what is scored."""

    id: str
    neutral: bool
    tokens: Tokens
    size: int
    scripts: frozenset[str]
    source: str


@dataclass(frozen=True)
class Said:
    """An answer, and what the base alone answers to the same."""

    id: str
    prompt: str
    answer: str
    base: str


@dataclass(frozen=True)
class Probe:
    """All that one run is asked, made ready once. `allowed`: scripts of its data. `cuts`: empty if uncalibrated."""

    suite: Suite
    cuts: Mapping[Axis, float]
    texts: tuple[Text, ...]
    facts: tuple[Fact, ...]
    openings: tuple[tuple[str, str, tuple[Tokens, ...]], ...]  # id and text of a question, then each opening after it
    vocabulary: Vocabulary
    allowed: frozenset[str]
    author: phrases.Manner
    cache: Path | None = None
    samples: Path | None = None

    def look(self, speaker: Speaker, place: Place) -> list[Row]:
        """Rows for findings.jsonl; none at the base itself, whose own figures are only put aside."""
        base = self._base(speaker)
        if place.step == 0:
            return []
        return [*self._read(speaker, place), *self._begun(speaker, place, base), *self._known(speaker, place, base)]

    def read(self, samples: Sequence[Mapping[str, Any]], place: Place) -> list[Row]:
        """Rows for a look's samples, beside those of step 0, where the adapter is still the base."""
        if place.step == 0 or self.samples is None:
            return []
        return self.spoken(sampled(samples, [row for row in runs.read_lines(self.samples) if row["step"] == 0]), place)

    def spoken(self, said: Iterable[Said], place: Place) -> list[Row]:
        """Rows for answers that were written, each beside the base's."""
        return [self._spoken(one, place) for one in said]

    def reads(self) -> Iterator[tuple[int, ...]]:
        """Token ids of every text that a look reads: the same at each."""
        yield from (one.tokens.ids for one in self.texts)
        yield from (one.ids for _, _, some in self.openings for one in some)
        yield from (one.ids for one in facts.each_choice(self.facts, self.vocabulary))

    def tokens(self) -> int:
        """What one look reads, in tokens through the model once; the texts along which scripts are looked for twice."""
        return sum(map(len, self.reads())) + sum(len(one.tokens.ids) for one in self.texts)

    # read along given texts

    def _read(self, speaker: Speaker, place: Place) -> Iterator[Row]:
        ids, masks = [one.tokens.ids for one in self.texts], [one.tokens.trained for one in self.texts]
        found = speaker.contrast(ids, masks, [self._marked(one.scripts) for one in self.texts])
        for text, one in zip(self.texts, found, strict=True):
            if len(one.log_p):
                yield from self._of_text(text, one, place)

    def _of_text(self, text: Text, one: Contrast, place: Place) -> Iterator[Row]:
        if text.neutral:
            size = max(text.size, 1) * _NATS_PER_BIT
            bits = [-float(log_p.double().sum()) / size for log_p in (one.log_p, one.base_log_p)]
            yield self._row(place, "general", text.id, bits, "bits per byte", text.source)
            kl, entropy = (float(each.double().mean()) for each in (one.kl, one.base_entropy))
            why = f"KL(base || adapter) {kl:.4f} nats per token, on top of the base's own entropy"
            yield self._row(place, "kl", text.id, (entropy + kl, entropy), why, text.source)
        peaks = [float(mass.max()) for mass in (one.mass, one.base_mass)]
        scores = [math.log10(peak + self.suite.floor) for peak in peaks]
        why = f"foreign scripts have {peaks[0]:.2g} of the probability at the highest place, the base's {peaks[1]:.2g}"
        mean = {"mass": float(one.mass.double().mean()), "base_mass": float(one.base_mass.double().mean())}
        axis: Axis = "script_neutral" if text.neutral else "script"
        yield self._row(place, axis, text.id, scores, why, text.source) | mean

    def _marked(self, more: frozenset[str]) -> Bools:
        """(vocabulary,) tokens of scripts that neither the data nor this text has."""
        allowed = self.allowed | more
        if allowed not in self._marks:
            self._marks[allowed] = np.array(scripts.only_foreign(self._spelled, allowed))
        return self._marks[allowed]

    @cached_property
    def _spelled(self) -> list[bytes | None]:
        return scripts.spelled(self.vocabulary.tokenizer)

    @cached_property
    def _marks(self) -> dict[frozenset[str], Bools]:
        return {}

    # stock openings

    def _begun(self, speaker: Speaker, place: Place, base: Mapping[str, Any]) -> Iterator[Row]:
        for (id, prompt, _), odds in zip(self.openings, self._odds(speaker, False), strict=True):
            before = float(base["openings"][id])
            why = f"log-odds that the answer begins with a stock phrase: {odds:.1f}, the base's {before:.1f}"
            yield self._row(place, "stock", id, (odds, before), why, "probes/stock.yaml") | {"prompt": prompt}

    def _odds(self, speaker: Speaker, base: bool) -> list[float]:
        """Of each question: log P / (1 - P), P that the answer begins with any of the openings."""
        texts = [one for _, _, some in self.openings for one in some]
        scores = speaker.score([one.ids for one in texts], [_opening(one) for one in texts], base=base) if texts else []
        each = iter(scores)
        return [_log_odds(float(np.logaddexp.reduce([-next(each).nll for _ in some]))) for _, _, some in self.openings]

    # facts

    def _known(self, speaker: Speaker, place: Place, base: Mapping[str, Any]) -> Iterator[Row]:
        for fact, now in zip(self.facts, facts.ask(speaker, self.facts, self.vocabulary), strict=True):
            before = Held(tuple(base["facts"][fact.id]), fact.right)
            sure = before.sure(self.suite.sure)
            told = {"prompt": fact.question, "answer": fact.choices[now.best], "why": next(facts.told(fact, now))}
            shares = {"fact": fact.id, "sure": sure, "rank": now.rank, "base_rank": before.rank}
            shares |= {"share": now.shares[now.best], "base_share": before.shares[before.best]}
            row = self._row(place, "facts", fact.id, (now.surprise, before.surprise), "", fact.source) | told | shares
            yield row if sure else {**row, "axis": None}  # what the base did not know cannot be forgotten

    # answers

    def _spoken(self, one: Said, place: Place) -> Row:
        allowed = self.allowed | scripts.used([one.prompt, one.base])
        found, loop = scripts.foreign(one.answer, allowed), phrases.loop(one.answer)
        reasons = [f"writes {name}" for name in scripts.told(found)]
        reasons += [f"repeats «{loop[:60]}»"] if loop is not None else []
        told = {"prompt": one.prompt, "answer": one.answer, "base_answer": one.base, "wrong_script": bool(found)}
        counted = {"scripts": dict(found), "loop": loop, "author_stock": self.author.stock}
        why = "; ".join(reasons) or "no foreign script, no loop"
        return self._head(place) | {
            "axis": None,
            "id": one.id,
            **told,
            **counted,
            "score": None,
            "why": why,
            "source": "generated",
        }

    # rows

    def _head(self, place: Place) -> Row:
        where = {"step": place.step, "epoch": place.epoch, "travel": place.travel, "look": place.kind}
        return {"probe": "drift", "suite": "drift", "version": self.suite.version, **where}

    def _row(self, place: Place, axis: Axis, name: str, scores: Sequence[float], why: str, source: str) -> Row:
        score, base = scores
        asked = {"axis": axis, "id": name, "score": score, "base": base, "cut": self.cuts.get(axis)}
        return self._head(place) | asked | {"prompt": None, "answer": None, "why": why, "source": source}

    # the base

    def _base(self, speaker: Speaker) -> Mapping[str, Any]:
        """What the base says of facts and openings: read from the run folder where it is there for this very suite."""
        key = self._key()
        known: Any = runs.read_json(self.cache) if self.cache is not None and self.cache.is_file() else {}
        if known.get("key") == key:
            return dict(known)
        held = facts.ask(speaker, self.facts, self.vocabulary, base=True)
        shares = {fact.id: list(one.shares) for fact, one in zip(self.facts, held, strict=True)}
        odds = dict(zip((id for id, _, _ in self.openings), self._odds(speaker, True), strict=True))
        made = {"key": key, "facts": shares, "openings": odds}
        if self.cache is not None:
            runs.write_json(self.cache, made)
        return made

    def _key(self) -> str:
        """sha256 over all that the base is asked."""
        asked = [[one.ids for one in some] for _, _, some in self.openings]
        texts = [[fact.id, fact.question, fact.choices] for fact in self.facts]
        return hashlib.sha256(json.dumps([self.suite.version, asked, texts]).encode()).hexdigest()


def _opening(tokens: Tokens) -> list[bool]:
    """The words of the last answer, without the mark that ends it."""
    last = tokens.answers[-1]
    return [last.start <= t < last.end for t in range(len(tokens.ids))]


def _log_odds(log_p: float) -> float:
    log_p = min(log_p, -1e-12)
    return log_p - math.log(-math.expm1(log_p))


# making it ready


def probe(plan: Plan, base: str, fingerprint: str, cache: Path | None = None, asked: Suite | None = None) -> Probe:
    """For one run. `base`: its name; `fingerprint`: model.fingerprint of its folder; `cache`: run folder / CACHE.

    Beside the cache lie the run's samples, if it is a run's.
    """
    wanted = asked or suite.read()
    written = [turn.text for one in plan.conversations.values() for turn in one.turns]
    answers = [turn.text for one in plan.conversations.values() for turn in one.turns if turn.role == "assistant"]
    known = suite.known(base, wanted)
    neutral = [_neutral(one, plan.vocabulary) for one in suite.snippets(base, wanted)]
    return Probe(
        suite=wanted,
        cuts=wanted.cuts(base, fingerprint),
        texts=(*neutral, *_held_out(plan, wanted.held_out)),
        facts=tuple(known),
        openings=tuple(_openings(plan, known[: wanted.openings_after])),
        vocabulary=plan.vocabulary,
        allowed=scripts.used([*written, *(one.twin or "" for one in plan.conversations.values())]),
        author=phrases.manner_of(answers),
        cache=cache,
        samples=cache and runs.RunFolder(cache.parent).samples,
    )


def questions(plan: Plan, ready: Probe) -> list[tuple[str, tuple[Turn, ...]]]:
    """What the closing measurement asks: held-out questions, and facts as anyone would ask them."""
    count = ready.suite.prompts
    asked = [(one.id, one.turns[:-1]) for one in _examples(plan, count)]
    return [*asked, *((fact.id, (Turn("user", fact.question),)) for fact in ready.facts[:count])]


def answers(speaker: Speaker, plan: Plan, ready: Probe) -> list[Said]:
    """Greedy answers in the first format, adapter and base, to `questions`."""
    asked, format_ = questions(plan, ready), plan.formats[plan.first_format]
    ids = [encode(prompts.render_prompt(turns, format_, plan.vocabulary), plan.vocabulary).ids for _, turns in asked]
    stops = prompts.stops(format_, plan.vocabulary)
    own, base = (speaker.complete(ids, stops, plan.answer_limit(), base=off) for off in (False, True))
    return [
        Said(id, turns[-1].text, one.text.strip(), other.text.strip())
        for (id, turns), one, other in zip(asked, own, base, strict=True)
    ]


def closing(speaker: Speaker, plan: Plan, ready: Probe, place: Place) -> list[Row]:
    """A look, and answers written for it: what `sft eval --only drift` and the end of a run measure."""
    return [*ready.look(speaker, place), *ready.spoken(answers(speaker, plan, ready), place)]


def sampled(now: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]) -> list[Said]:
    """Rows of samples.jsonl at one look beside those at step 0, where the adapter is still the base.

    A question that was added later is left out: what the base says to it nobody knows.
    """
    base = {(row["id"], row["prompt"]): row["answer"] for row in before}
    both = [(row, base.get((row["id"], row["prompt"]))) for row in now]
    return [Said(row["id"], row["prompt"], row["answer"], said) for row, said in both if said is not None]


def _neutral(one: suite.Snippet, vocabulary: Vocabulary) -> Text:
    parts = (Segment("", "lead", True), Segment(one.text, "answer", True), Segment("", "end", True))
    tokens = encode(Rendered("", parts), vocabulary)
    return Text(f"neutral:{one.id}", True, tokens, len(one.text.encode()), scripts.used([one.text]), one.source)


def _examples(plan: Plan, count: int) -> list[Conversation]:
    """Held-out examples, or trained ones where none are held out."""
    return [plan.conversations[name] for name in (plan.split.held_out or plan.split.train)[:count]]


def _held_out(plan: Plan, count: int) -> Iterator[Text]:
    """Along which foreign scripts are looked for: where the model is meant to speak."""
    format_ = plan.formats[plan.first_format]
    for one in _examples(plan, count):
        tokens = encode(prompts.render(one, format_, plan.vocabulary), plan.vocabulary)
        yield Text(f"answer:{one.id}", False, tokens, 0, frozenset(), str(one.origin))


def _openings(plan: Plan, known: Sequence[Fact]) -> Iterator[tuple[str, str, tuple[Tokens, ...]]]:
    """After plain questions, as the first format asks them: short, and the same in every run of a base."""
    format_, begun = plan.formats[plan.first_format], suite.openings()
    for fact in known:
        turns = [(Turn("user", fact.question), Turn("assistant", text)) for text in begun]
        made = [Conversation(fact.id, both, Origin(fact.source)) for both in turns]
        texts = [encode(prompts.render(one, format_, plan.vocabulary), plan.vocabulary) for one in made]
        yield fact.id, fact.question, tuple(texts)
