"""The little world that pocket speaks of: what can be said in it, what can be asked, which answer is right.

The words and facts are data (`pocket_base/world.yaml`); this room reads them as a grammar, draws text from a seed and
judges text by the same templates. It knows no model, tokenizer or prompt format, and keeps no list of drawn text.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, Literal

import yaml

Thing = Mapping[str, str]
Binding = dict[str, Thing]
Claims = dict[str, list[Thing]]  # for each variable, the things a text may be speaking of
Part = Literal["seen", "unseen"]

SOURCE = Path(__file__).parent / "pocket_base" / "world.yaml"
HELD_OUT_ONE_IN = 8
_TOKEN = re.compile(r"\{([^}]*)\}|\[([^\]]*)\]")
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True)
class Asked:
    """A question of one kind with one right answer; `judge` knows the other right ones."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Choice:
    """A fact to choose: `choices[right]` is the only right answer."""

    kind: str
    question: str
    choices: tuple[str, ...]
    right: int


def cell(thing: Thing, path: str) -> str:
    """What `{x.path}` stands for; a last step `a` or `the` adds the article. Raises KeyError for an unknown column."""
    column, _, article = path.rpartition(".")
    if article not in ("a", "the"):
        return thing[path or "name"]
    text = thing[column or "name"]
    if article == "the":
        return f"the {text}"
    return f"{'an' if text[0] in 'aeiou' or text.startswith(('honest', 'hour')) else 'a'} {text}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


@dataclass(frozen=True)
class Piece:
    """One stretch of a template: a choice of fixed strings, or a slot `variable.path` (then `strings` is empty)."""

    strings: tuple[str, ...]
    variable: str = ""
    path: str = ""
    starts: bool = False  # opens a sentence: written with a capital

    def spell(self, thing: Thing) -> str:
        text = cell(thing, self.path)
        return _capital(text) if self.starts else text


def _pieces(source: str) -> Iterator[Piece]:
    position = 0
    for found in _TOKEN.finditer(source):
        before = source[position : found.start()]
        if before:
            yield Piece((before,))
        starts = re.search(r"(?:^|[.?!]\s)$", source[: found.start()]) is not None
        if found[1] is not None:
            variable, _, path = found[1].partition(".")
            yield Piece((), variable, path, starts)
        else:
            yield Piece(tuple(found[2].split("|")))
        position = found.end()
    if position < len(source):
        yield Piece((source[position:],))


class Template:
    """A sentence pattern over variables: writes text from things, and reads the things back out of text."""

    def __init__(self, source: str, variables: Mapping[str, Sequence[Thing]]) -> None:
        self.source = source
        self.pieces = tuple(_pieces(source))
        self.slots = tuple(piece for piece in self.pieces if not piece.strings)
        self.variables = {slot.variable: variables[slot.variable] for slot in self.slots}
        self.landmark = max((p.strings[0] for p in self.pieces if len(p.strings) == 1), key=len, default="")

    def write(self, binding: Binding, rng: Random) -> str:
        return "".join(rng.choice(p.strings) if p.strings else p.spell(binding[p.variable]) for p in self.pieces)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile("".join(self._group(piece) for piece in self.pieces))

    def _group(self, piece: Piece) -> str:
        if piece.strings:
            return "(?:" + "|".join(map(re.escape, piece.strings)) + ")"
        spelled = {piece.spell(thing) for thing in self.variables[piece.variable]}
        return "(" + "|".join(map(re.escape, sorted(spelled, key=lambda s: (-len(s), s)))) + ")"

    def read(self, text: str) -> Claims | None:
        """The things this text can be about, or None where it is not of this pattern."""
        if self.landmark not in text:
            return None
        found = self.pattern.fullmatch(text)
        if found is None:
            return None
        claims: Claims = {name: list(things) for name, things in self.variables.items()}
        for slot, written in zip(self.slots, found.groups(), strict=True):
            claims[slot.variable] = [t for t in claims[slot.variable] if slot.spell(t) == written]
        return claims if all(claims.values()) else None


def _rank(text: str) -> float | str:
    return float(text) if text.isdigit() else text


def _compare(rule: str) -> tuple[str, str, Callable[[Binding], bool]]:
    """A rule such as `x.size > y.size` or `x.food != y.food`, as its two variables and its test."""
    left, sign, right = rule.split()
    (a, _, path_a), (b, _, path_b) = left.partition("."), right.partition(".")

    def holds(binding: Binding) -> bool:
        one, other = _rank(cell(binding[a], path_a)), _rank(cell(binding[b], path_b))
        return one != other if sign == "!=" else float(one) > float(other)

    return a, b, holds


class Pattern:
    """Variables with what must hold between them, and the wordings that use them."""

    def __init__(self, variables: str, rules: str, tables: Mapping[str, Sequence[Thing]]) -> None:
        pairs = [(name, kind) for name, kind in map(str.split, variables.split(","))]
        self.classes = dict(pairs)
        self.variables = {name: tables[kind] for name, kind in pairs}
        self.rules = [_compare(rule) for rule in rules.split(";") if rule.strip()]

    def template(self, source: str) -> Template:
        return Template(source, self.variables)

    def holds(self, binding: Binding) -> bool:
        """Whether two variables of one class name different things and every rule holds, as far as they are bound."""
        names = list(binding)
        for i, a in enumerate(names):
            if any(self.classes[a] == self.classes[b] and binding[a] is binding[b] for b in names[i + 1 :]):
                return False
        return all(test(binding) for a, b, test in self.rules if a in binding and b in binding)

    def possible(self, claims: Claims) -> bool:
        """Whether one choice of things satisfies all the claims at once."""
        return any(self.holds(dict(zip(claims, things, strict=True))) for things in product(*claims.values()))

    def draw(self, rng: Random) -> Binding:
        while True:
            binding = {name: rng.choice(things) for name, things in self.variables.items()}
            if self.holds(binding):
                return binding


class Kind(Pattern):
    """One kind of question: its stories, its askings, and the answers of which each is right."""

    def __init__(self, name: str, entry: Mapping[str, Any], tables: Mapping[str, Sequence[Thing]]) -> None:
        super().__init__(entry["vars"], entry.get("where", ""), tables)
        self.name = name
        self.weight = int(entry.get("weight", 1))
        self.told = "story" in entry
        asks = _lines(entry["ask"])
        if self.told:
            asks = [f"{story} {ask}" for story in _lines(entry["story"]) for ask in asks]
        self.asks = [self.template(ask) for ask in asks]
        self.says = [self.template(say) for say in _lines(entry["say"])]

    def held_out(self, question: str) -> bool:
        # A fact with a single wording has no other wording to be learned from: it is never kept back.
        return len(self.asks) > 1 and is_held_out(question)

    def draw_question(self, rng: Random) -> Asked:
        binding = self.draw(rng)
        question = rng.choice(self.asks).write(binding, rng)
        return Asked(self.name, question, rng.choice(self.says).write(binding, rng))

    def right(self, question: str, answer: str) -> bool | None:
        """None where the question is not of this kind."""
        asked = [claims for ask in self.asks if (claims := ask.read(question)) is not None]
        asked = [claims for claims in asked if self.possible(claims)]
        if not asked:
            return None
        said = [claims for say in self.says if (claims := say.read(answer)) is not None]
        return any(self.possible(both) for a in asked for b in said if (both := _meet(a, b)) is not None)


def _meet(a: Claims, b: Claims) -> Claims | None:
    both = {**a, **{name: [t for t in things if t in a.get(name, things)] for name, things in b.items()}}
    return both if all(both.values()) else None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _table(text: str) -> list[Thing]:
    rows = [[part.strip() for part in line.split("|")] for line in _lines(text)]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order, without the blanks between them."""
    return [part for part in _SENTENCE_END.split(text.strip()) if part]


def is_held_out(text: str) -> bool:
    """Whether this text belongs to the share (one in eight, by its own hash) that is never trained on."""
    return zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0


class World:
    """The grammar read from `world.yaml`. Raises KeyError or ValueError where the file contradicts itself."""

    def __init__(self, source: Path = SOURCE) -> None:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML has libyaml
        data: dict[str, Any] = yaml.load(source.read_text(encoding="utf-8"), Loader=loader)
        tables = {name: _table(text) for name, text in data["things"].items()}
        self.systems: tuple[str, ...] = tuple(data["systems"])
        self.kinds = {name: Kind(name, entry, tables) for name, entry in data["kinds"].items()}
        self.statements = [_told(line, tables) for line in _lines(data["statements"])]
        self.stories = [_told(line, tables) for line in _lines(data["stories"])]
        self.dialogues = [_told(line, tables) for line in _lines(data["dialogues"])]
        self.facts = [kind for kind in self.kinds.values() if not kind.told]

    @cached_property
    def weights(self) -> list[int]:
        return [kind.weight for kind in self.kinds.values()]

    @cached_property
    def grammar(self) -> list[tuple[Pattern, Template]]:
        """Every sentence pattern once, with the rules it stands under."""
        known: dict[tuple[str, str], tuple[Pattern, Template]] = {}
        for kind in self.kinds.values():
            for template in (*kind.asks, *kind.says):
                _add_sentences(known, kind, template)
        for pattern, template in (*self.statements, *self.stories, *self.dialogues):
            _add_sentences(known, pattern, template)
        return list(known.values())

    def accepts(self, sentence: str) -> bool:
        """Whether this one sentence can be said in the world: its form, its facts and their agreement."""
        text = sentence.strip()
        return any(
            pattern.possible(claims)
            for pattern, template in self.grammar
            if (claims := template.read(text)) is not None
        )

    def judge(self, question: str, answer: str) -> bool:
        """Whether the answer is right, in any of its wordings. Raises ValueError for what cannot be asked here."""
        verdicts = [kind.right(question.strip(), answer.strip()) for kind in self.kinds.values()]
        known = [verdict for verdict in verdicts if verdict is not None]
        if not known:
            raise ValueError(f"not a question of this world: {question!r}")
        return any(known)

    def draw_question(self, rng: Random, part: Part = "seen", told: bool = False) -> Asked:
        """By weight among all kinds, or among those alone that ask for what was `told` just before."""
        while True:
            (kind,) = rng.choices(list(self.kinds.values()), self.weights)
            if told and not kind.told:
                continue
            asked = kind.draw_question(rng)
            if kind.held_out(asked.question) == (part == "unseen"):
                return asked

    def draw_dialogue(self, rng: Random) -> list[str]:
        """Turns of one conversation, asker first. No turn of it belongs to the held-out share."""
        while True:
            pattern, template = rng.choice(self.dialogues)
            turns = template.write(pattern.draw(rng), rng).split(" / ")
            if not any(map(is_held_out, turns[::2])):
                return [_capital(turn) for turn in turns]

    def draw_text(self, rng: Random, part: Part = "seen") -> str:
        """One statement or story, of one to four sentences."""
        shelf = self.stories if rng.random() < 0.6 else self.statements
        while True:
            pattern, template = rng.choice(shelf)
            text = template.write(pattern.draw(rng), rng)
            if is_held_out(text) == (part == "unseen"):
                return text


def _told(line: str, tables: Mapping[str, Sequence[Thing]]) -> tuple[Pattern, Template]:
    variables, text = line.split(" | ", 1)
    pattern = Pattern(variables, "", tables)
    return pattern, pattern.template(text)


def _add_sentences(known: dict[tuple[str, str], tuple[Pattern, Template]], pattern: Pattern, whole: Template) -> None:
    for source in sentences(whole.source.replace(" / ", " ")):
        names = [piece.variable for piece in _pieces(source) if piece.variable]
        scope = ",".join(sorted({f"{name} {pattern.classes[name]}" for name in names}))
        known.setdefault((source, scope), (pattern, pattern.template(source)))


@cache
def world() -> World:
    """The world, read once."""
    return World()


def accepts(sentence: str) -> bool:
    """Whether one sentence can be said in the world. False for scrambled words, nonsense and wrong facts."""
    return world().accepts(sentence)


def judge(question: str, answer: str) -> bool:
    """Whether an answer to a question of the world is right. Raises ValueError for a question it does not know."""
    return world().judge(question, answer)


def questions(seed: int, count: int, part: Part = "unseen") -> list[Asked]:
    """Different questions of one part, a pure function of the seed."""
    rng, drawn = Random(seed), dict[str, Asked]()
    while len(drawn) < count:
        asked = world().draw_question(rng, part)
        drawn.setdefault(asked.question, asked)
    return list(drawn.values())


def held_out_text(seed: int, count: int) -> list[str]:
    """Paragraphs of the world that no training text holds, for bits per byte; a pure function of the seed."""
    rng = Random(seed)
    return [" ".join(world().draw_text(rng, "unseen") for _ in range(rng.randint(1, 3))) for _ in range(count)]


def fact_choices(seed: int, count: int, options: int = 4) -> list[Choice]:
    """Facts to choose among `options` answers of the same wording, one of them right; a pure function of the seed."""
    rng, drawn = Random(seed), dict[str, Choice]()
    while len(drawn) < count:
        choice = _fact_choice(rng, rng.choice(world().facts), options)
        if choice is not None:
            drawn.setdefault(choice.question, choice)
    return list(drawn.values())


def _fact_choice(rng: Random, kind: Kind, options: int) -> Choice | None:
    """None where this draw yields too few wrong answers (a yes or no, or a cell that few things differ in)."""
    binding, ask, say = kind.draw(rng), rng.choice(kind.asks), rng.choice(kind.says)
    question, right = ask.write(binding, rng), say.write(binding, rng)
    asked = {(slot.variable, slot.path) for slot in ask.slots}
    told = [slot for slot in say.slots if (slot.variable, slot.path) not in asked]
    if not told or not world().judge(question, right):
        return None
    slot, wrong = rng.choice(told), dict[str, None]()
    for thing in rng.sample(list(kind.variables[slot.variable]), len(kind.variables[slot.variable])):
        text = "".join(
            p.strings[0] if p.strings else p.spell(thing if p == slot else binding[p.variable]) for p in say.pieces
        )
        if len(wrong) < options - 1 and not world().judge(question, text):
            wrong[text] = None
    if len(wrong) < options - 1:
        return None
    answers = [right, *wrong]
    rng.shuffle(answers)
    return Choice(kind.name, question, tuple(answers), answers.index(right))
