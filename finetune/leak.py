"""Training text in answers to prompts that ask for something else: what leaked, whether again, where it was written.

Asks one loaded adapter; the texts and the index over them serve any other of the same run. It gives no verdict and
writes nothing. Training prompts in other formats and twins are not asked: answering them is what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import byheart, prompts, sources, starters, yamlfile
from finetune.asking import Completes
from finetune.conversation import Conversation, Turn
from finetune.errors import UserError, refuse
from finetune.masks import encode
from finetune.odds import Sampler
from finetune.plan import Plan
from finetune.sources import Found, Limits, Sources, Span

Word = Literal["none", "single", "confirmed"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class Rules(BaseModel):
    """`eval/leak.yaml`; what each number means is said there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    tokens: Count
    characters: Count
    near: Share
    quotes: Count
    samples: Annotated[int, Field(ge=0)]
    temperature: Annotated[float, Field(gt=0)]
    top_k: Count
    top_p: Share
    answer: Count

    @property
    def sampler(self) -> Sampler:
        """How samples are drawn."""
        return Sampler(self.temperature, self.top_k, self.top_p)


def read(path: Path | None = None) -> Rules:
    """Of a file, by default the shipped one. UserError naming line and key of every fault."""
    document = yamlfile.read(path or starters.find("leak", "suites"))
    try:
        found = Rules.model_validate(document.data)
    except ValidationError as error:
        for one in error.errors():
            key = str(one["loc"][0])
            document.refuse((key,), f"{key}: {one['msg'].lower()}.", "See the file that is shipped.")
    if document.problems:
        raise UserError(document.problems)
    return found


# what is asked


@dataclass(frozen=True)
class Probes:
    """A file of prompts that no dataset is about; (id, text) of each."""

    name: str
    version: int
    prompts: tuple[tuple[str, str], ...]


def probes(name: str = "unrelated") -> Probes:
    """`unrelated`, `pocket`, or a file of the same shape: see `eval/probes/README.md`. UserError by line."""
    path = Path(name) if name.endswith(".jsonl") else starters.shelf("suites") / "probes" / f"{name}.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise refuse("cannot be read.", "Name `unrelated`, `pocket` or a file of prompts.", path) from None
    rows = [(number, _row(line, path, number)) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows or not isinstance(rows[0][1].get("version"), int):
        raise refuse("begins with no name and version.", 'Write {"name": "mine", "version": 1} first.', path, 1)
    for number, row in rows[1:]:
        if not isinstance(row.get("prompt"), str) or not isinstance(row.get("id"), str):
            raise refuse("a prompt is text, and has an id.", 'Write {"id": "...", "prompt": "..."}.', path, number)
    head = rows[0][1]
    return Probes(str(head.get("name", path.stem)), head["version"], tuple((r["id"], r["prompt"]) for _, r in rows[1:]))


def _row(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise refuse("is not a row of JSON.", "Write one object a line.", path, number)
    return row


@dataclass(frozen=True)
class Question:
    """One prompt. `ids`: as the model reads it; `known`: texts of which an answer may take over a stretch."""

    suite: str
    version: int
    id: str
    prompt: str
    ids: tuple[int, ...]
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inquiry:
    """What any adapter of a run is asked, and searched for: made once. `training`: the trained prompts."""

    questions: tuple[Question, ...]
    training: tuple[Question, ...]
    sources: Sources
    stops: tuple[str, ...]
    limit: int
    rules: Rules


def prepare(plan: Plan, suite: Probes | None = None, rules: Rules | None = None) -> Inquiry:
    """Prompts of a run in its first format, and its trained texts indexed. UserError for wrong rules or probes.

    `suite`: by default the little world's own for the bundled base, which knows no other, else the unrelated ones.
    """
    rules, suite = rules or read(), suite or probes("pocket" if plan.recipe.base == "pocket" else "unrelated")
    limits = Limits(rules.tokens, rules.characters, rules.near)
    formulas = byheart.limits()
    examples = [plan.conversations[name] for name in (*plan.split.train, *plan.split.held_out)]
    answers = {one.id: [turn.text for turn in one.turns if turn.role == "assistant"] for one in examples}
    style = sources.style(answers, formulas.shortest_formula, formulas.longest_formula, plan.intended)
    trained = [plan.conversations[name] for name in plan.split.train]
    return Inquiry(
        questions=tuple(_questions(plan, suite, rules)),
        training=tuple(_of_example(plan, one, "train", rules, whole=True) for one in trained),
        sources=Sources(trained, style, plan.vocabulary.tokenizer, limits, rules.quotes),
        stops=prompts.stops(plan.formats[plan.first_format], plan.vocabulary),
        limit=max(rules.answer, plan.answer_limit()),
        rules=rules,
    )


def _questions(plan: Plan, suite: Probes, rules: Rules) -> Iterator[Question]:
    for name, text in suite.prompts:
        yield Question(suite.name, suite.version, name, text, _ids(plan, [Turn("user", text)]), (text,))
    yield Question("bare", rules.version, "empty", "", _ids(plan, [Turn("user", "")]))
    begin = plan.vocabulary.bos_id if plan.vocabulary.bos_id is not None else plan.vocabulary.eos_id
    if begin is not None:  # where a base has no BOS, its EOS parts documents
        yield Question("bare", rules.version, "bos", "", (begin,))
    for name in plan.split.held_out:
        yield _of_example(plan, plan.conversations[name], "held_out", rules)


def _of_example(plan: Plan, one: Conversation, suite: str, rules: Rules, whole: bool = False) -> Question:
    """An example's last question, with what came before it. `whole`: its own answers are known too."""
    asked = one.turns[:-1]
    known = tuple(turn.text for turn in (one.turns if whole else asked))
    return Question(suite, rules.version, one.id, one.question, _ids(plan, asked), known)


def _ids(plan: Plan, turns: Sequence[Turn]) -> tuple[int, ...]:
    rendered = prompts.render_prompt(turns, plan.formats[plan.first_format], plan.vocabulary)
    return encode(rendered, plan.vocabulary).ids


# what was answered


@dataclass(frozen=True)
class Told:
    """One answer and what it holds. `seed`: of the draw, None: greedy. `severity`: of its span, 1 or more is a leak."""

    text: str
    seed: int | None
    found: Found
    severity: float

    @property
    def leaks(self) -> bool:
        return self.severity >= 1


@dataclass(frozen=True)
class Finding:
    """A prompt and all its answers, the greedy one first."""

    question: Question
    told: tuple[Told, ...]

    @property
    def leak(self) -> Word:
        """Confirmed: two of the answers leak, so greedy and a sample, or two seeds."""
        return ("none", "single", "confirmed")[min(2, sum(one.leaks for one in self.told))]

    @property
    def worst(self) -> Told:
        """The answer with the longest span; of none, the one with the longest altered copy."""
        return max(self.told, key=lambda one: (one.severity, one.found.near.characters if one.found.near else 0))

    def row(self, step: int) -> dict[str, Any]:
        """For findings.jsonl."""
        seed = self.worst.seed
        told = {"leak": self.leak, "drawn": "greedy" if seed is None else f"seed {seed}", "answers": len(self.told)}
        return {**_row_of("leak", self.question, self.worst, step), "why": self._why(), **told}

    def _why(self) -> str:
        count, leaks, span = len(self.told), sum(one.leaks for one in self.told), self.worst.found.span
        if leaks:
            again = "" if leaks > 1 else ", and was not seen again"
            return f"{leaks} of {count} answers {_hold(leaks)} training text{again}; the longest span is {_size(span)}."
        near = _near(self.worst.found.near)
        return f"No answer of {count} holds a long span of training text; the longest is {_size(span)}.{near}"


@dataclass(frozen=True)
class CrossTalk:
    """A trained prompt whose greedy answer was searched for other examples' text."""

    question: Question
    told: Told

    def row(self, step: int) -> dict[str, Any]:
        """For findings.jsonl. `recites`: the other example, or None."""
        span = self.told.found.span
        recites = span.example if span and self.told.leaks else None
        what = f"recites {recites}" if recites else "recites no other example"
        why = f"Asked as in {self.question.id} it {what}; the longest span of another is {_size(span)}."
        row = _row_of("cross_talk", self.question, self.told, step)
        return {**row, "why": f"{why}{_near(self.told.found.near)}", "recites": recites}


def _row_of(probe: str, question: Question, told: Told, step: int) -> dict[str, Any]:
    """What every row of this room has. `score`: the span's length, 1 is a leak's; `near`: a long altered copy."""
    span, near = told.found
    asked = {"suite": question.suite, "version": question.version, "step": step, "id": question.id}
    return {
        "probe": probe,
        **asked,
        "prompt": question.prompt,
        "answer": told.text,
        "score": told.severity,
        "source": span.source if span else None,
        "span": span.text if span else None,
        "tokens": span.tokens if span else 0,
        "characters": span.characters if span else 0,
        "example": span.example if span else None,
        "near": {**asdict(near), "source": near.source} if near else None,
    }


def _hold(count: int) -> str:
    return "holds" if count == 1 else "hold"


def _size(span: Span | None) -> str:
    if span is None:
        return "empty"
    return f"{span.tokens} tokens, {span.characters} characters without spaces, of {span.example} ({span.source})"


def _near(span: Span | None) -> str:
    return f" Almost verbatim, {span.edits} edits: {_size(span)}." if span else ""


def ask(speaker: Completes, inquiry: Inquiry, seed: int = 0) -> list[Finding]:
    """Greedy answers and samples to every question, searched. `seed`: of the first sample."""
    seeds = [None, *range(seed, seed + inquiry.rules.samples)]
    told = zip(*(_told(speaker, inquiry, inquiry.questions, one) for one in seeds), strict=True)
    return [Finding(*both) for both in zip(inquiry.questions, told, strict=True)]


def cross_talk(speaker: Completes, inquiry: Inquiry) -> list[CrossTalk]:
    """Greedy answers to the trained prompts, searched for what is not their own example's."""
    told = _told(speaker, inquiry, inquiry.training, None)
    return [CrossTalk(*both) for both in zip(inquiry.training, told, strict=True)]


def _told(speaker: Completes, inquiry: Inquiry, asked: Sequence[Question], seed: int | None) -> list[Told]:
    ids, sampler = [one.ids for one in asked], None if seed is None else inquiry.rules.sampler
    answers = speaker.complete(ids, inquiry.stops, inquiry.limit, sampler=sampler, seed=seed or 0)
    texts = [answer.text.strip() for answer in answers]
    found = inquiry.sources.search(texts, [one.known for one in asked])
    limits = inquiry.sources.limits
    return [
        Told(text, seed, one, limits.severity(one.span.tokens, one.span.characters) if one.span else 0.0)
        for text, one in zip(texts, found, strict=True)
    ]
