"""Recipe, dataset, formats and tokens put together: everything a night needs to know before a model is loaded.

All that is wrong is told at once. No torch; the network only when asked to fetch a dataset. It measures nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from finetune import allowed, burden, corpus, lineup, lint, prompts
from finetune.allowed import Span
from finetune.batches import Epochs, Group, Item, Packing, goldfish, packing
from finetune.conversation import Conversation
from finetune.corpus import Split
from finetune.errors import Problem, UserError, refuse
from finetune.estimate import Length, Looks, plan_looks, steps_per_epoch, travel
from finetune.format import Format
from finetune.masks import Vocabulary
from finetune.recipe import Recipe
from finetune.replay import one_kind, replayed, unwritten
from finetune.wardrobe import Wardrobe, dressed


@dataclass(frozen=True)
class Texts:
    """Every text of a run as token ids, by (example, format). `twins` ask the same in other words; never trained.

    Held-out examples are there in every format, trained ones in trained formats, twins in the first.
    """

    wardrobe: Wardrobe
    whole: Mapping[tuple[str, str], Item]  # what is trained, before goldfish takes tokens out of the loss
    held_out: Mapping[tuple[str, str], Item]
    twins: Mapping[tuple[str, str], Item]
    replay: tuple[Item, ...] = ()

    @property
    def trained(self) -> Mapping[tuple[str, str], Item]:
        """What is trained in the listed formats."""
        return self.wardrobe.items

    @cached_property
    def longest(self) -> int:
        """Tokens that no text of the training exceeds."""
        return max([self.wardrobe.longest(), *(len(item.ids) for item in (*self.trained.values(), *self.replay))])


@dataclass(frozen=True)
class Plan:
    """A night before it begins."""

    recipe: Recipe
    conversations: Mapping[str, Conversation]
    split: Split
    vocabulary: Vocabulary
    formats: Mapping[str, Format]
    texts: Texts
    epochs: Epochs
    length: Length
    packing: Packing
    looks: Looks
    intended: tuple[str, ...] = ()  # spans that may be recited

    @property
    def travel(self) -> float:
        """Sum of the learning rate over all steps."""
        return travel(self.recipe.optimizer.learning_rate, self.recipe.optimizer.schedule, self.length)

    @property
    def first_format(self) -> str:
        """The format in which light looks are taken."""
        return next(iter(self.formats))

    def longest(self) -> int:
        """Tokens of the longest text that is trained on."""
        return self.texts.longest

    def largest(self) -> int:
        """Tokens that no micro-batch exceeds."""
        return self.packing.most(self.longest(), self.recipe.batch_size)

    def micro_batches(self, epoch: int) -> list[list[int]]:
        """Tokens of every micro-batch of every step of an epoch, counted from 0."""
        return self.packing.steps(self.epochs.order(epoch), self.recipe.batch_size)

    def fingerprint(self) -> str:
        """sha256 over every token and mask that is trained or measured, in listed formats."""
        digest = hashlib.sha256()
        for group in (self.texts.trained, self.texts.held_out, self.texts.twins):
            for key, item in sorted(group.items()):
                digest.update(repr((key, item.ids, item.trained)).encode())
        digest.update(repr(self.texts.replay).encode())
        digest.update("".join(self.intended).encode())
        return digest.hexdigest()

    def answer_limit(self) -> int:
        """Tokens a sampled answer may have: a quarter more than the longest that is taught, at most 512."""
        return min(512, 1 + max(5 * item.supervised // 4 for item in self.texts.trained.values()))

    def most_alarmed(self) -> int:
        """Trained examples that a look reads because they echo: as many as are held out, or all where none is."""
        return len(self.split.held_out) or len(self.split.train)

    def groups(self, full: bool) -> list[Group]:
        """What a look measures: held-out in one format; a full one also train, twins, and held-out in every format."""
        first = self.first_format
        wanted = [("held_out", first, self.texts.held_out)]
        if full or not self.texts.held_out:
            wanted += [("train", first, self.texts.whole)]
        if full:
            wanted += [("twin", first, self.texts.twins)]
            wanted += [("held_out", name, self.texts.held_out) for name in self.formats if name != first]
        return [group for split, name, items in wanted if (group := self._group(split, name, items))]

    def _group(self, split: str, name: str, items: Mapping[tuple[str, str], Item]) -> Group | None:
        chosen = tuple(item for (_, format), item in items.items() if format == name)
        size = sum(len(text.encode()) for item in chosen for text in _answers([self.conversations[item.example]]))
        return Group(split, name, chosen, size) if chosen else None


@dataclass(frozen=True)
class Source:
    """Which examples. `split`: the recorded one, else drawn; `everything`: hold nothing out; `online`: may fetch."""

    split: Split | None = None
    everything: bool = False
    online: bool = False


@dataclass(frozen=True)
class Material:
    """All that could be read, and all that is wrong with it. Only without problems can a plan be made of it."""

    recipe: Recipe
    vocabulary: Vocabulary
    formats: Mapping[str, Format]
    conversations: Mapping[str, Conversation]
    split: Split
    texts: Texts
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    intended: tuple[Span, ...] = ()


def make(
    recipe: Recipe, base: Path | Vocabulary, split: Split | None = None, everything: bool = False, online: bool = False
) -> Plan:
    """Plan a run on the base in folder `base`, or on its vocabulary. The rest is a `Source`.

    Errors: UserError with every problem of dataset and formats; those that blame a setting carry its `key`.
    """
    vocabulary = base if isinstance(base, Vocabulary) else Vocabulary.load(base)
    material = gather(recipe, vocabulary, Source(split, everything, online))
    if material.problems:
        raise UserError(list(material.problems))
    return schedule(material)


def gather(recipe: Recipe, vocabulary: Vocabulary, source: Source | None) -> Material:
    """Read formats and examples, and go on past every fault. `source` None: leave the dataset alone."""
    problems: list[Problem] = []
    formats = _formats(recipe, problems)
    conversations, split = _examples(recipe, source, problems) if source else ({}, _no_split(recipe))
    texts = _texts(recipe, conversations, split, formats, vocabulary, problems)
    problems += [*_format_problems(recipe, formats, vocabulary), *one_kind(recipe)]
    refused, warnings = _lint(recipe, conversations, split, formats, vocabulary)
    intended = _intended(recipe, problems)
    warnings += unwritten(recipe)
    warnings += lineup.remarks(*({name: formats[name] for name in some if name in formats} for some in _sides(recipe)))
    warnings += allowed.strangers(intended, _answers(conversations.values())) if conversations else ()
    told = dict.fromkeys([*problems, *refused])
    return Material(recipe, vocabulary, formats, conversations, split, texts, tuple(told), tuple(warnings), intended)


def _intended(recipe: Recipe, problems: list[Problem]) -> tuple[Span, ...]:
    try:
        return () if recipe.data.intended is None else allowed.read(recipe.data.intended)
    except UserError as error:
        problems += _blamed(error, "data", "intended")
        return ()


def _answers(examples: Iterable[Conversation]) -> Iterator[str]:
    return (turn.text for one in examples for turn in one.turns if turn.role == "assistant" and turn.loss)


def examples(recipe: Recipe) -> tuple[list[Conversation], frozenset[str]]:
    """All examples in the order they were read, and the ids of those held out. UserError with every fault of them."""
    problems: list[Problem] = []
    found, split = _examples(recipe, Source(), problems)
    if problems:
        raise UserError(problems)
    return list(found.values()), frozenset(split.held_out)


def schedule(material: Material) -> Plan:
    """The order of texts, the length of the run, and when it is looked at. Only of material without problems."""
    recipe, split, texts = material.recipe, material.split, material.texts
    epochs = Epochs(
        texts.wardrobe.item,
        split.train,
        texts.wardrobe.worn,
        recipe.seed,
        recipe.shuffle,
        recipe.batch_size,
        texts.replay,
        recipe.data.replay.share if recipe.data.replay else 0.0,
    )
    per_epoch = steps_per_epoch(epochs.size, recipe.batch_size)
    length = Length(per_epoch, per_epoch * recipe.epochs, recipe.optimizer.warmup_steps)
    conversations, formats, vocabulary = material.conversations, material.formats, material.vocabulary
    none, spans = Looks((), (), ""), tuple(span.text for span in material.intended)
    packs = packing(recipe.machine.micro_batch)
    plan = Plan(recipe, conversations, split, vocabulary, formats, texts, epochs, length, packs, none, spans)
    return replace(plan, looks=plan_looks(recipe.epochs, recipe.watch.every, recipe.watch.budget, burden.cost(plan)))


def _formats(recipe: Recipe, problems: list[Problem]) -> dict[str, Format]:
    """Trained formats first, then the held-out ones, each under the name it has in the recipe; those that load."""
    found = {}
    for side, names in (("train", recipe.formats.train), ("held_out", recipe.formats.held_out)):
        for number, name in enumerate(names):
            try:
                found[name] = prompts.load([name])[0]
            except UserError as error:
                problems += _blamed(error, "formats", side, number)
    return found


def _blamed(error: UserError, *key: str | int) -> list[Problem]:
    """Its problems; those that name no file blame a key of the recipe."""
    return [one if one.file is not None or one.key else replace(one, key=key) for one in error.problems]


def _no_split(recipe: Recipe) -> Split:
    return Split((), (), {}, recipe.seed)


def _examples(recipe: Recipe, source: Source, problems: list[Problem]) -> tuple[dict[str, Conversation], Split]:
    """All examples by id, and which are trained."""
    sides: list[list[Conversation]] = []
    for key, path in (("train", recipe.data.train), ("held_out", _held_out_path(recipe))):
        try:
            sides.append(_read(path, recipe, source.online) if path else [])
        except UserError as error:
            problems += _blamed(error, "data", key)
    if len(sides) < 2:
        return {}, _no_split(recipe)
    examples, kept = sides
    by_id = {one.id: one for one in (*examples, *kept)}
    try:
        if source.everything:
            return by_id, corpus.split_given([*examples, *kept], [], recipe.seed)
        split = source.split or _draw(recipe, examples, kept)
    except UserError as error:
        problems += _blamed(error, "data", "held_out")
        return by_id, _no_split(recipe)
    if gone := [name for name in (*split.train, *split.held_out) if name not in by_id]:
        what = f"The dataset changed since this run began: {gone[0]} is no longer there."
        problems.append(Problem(what, "Restore it to go on, or start anew with --fresh.", key=("data", "train")))
        return by_id, _no_split(recipe)
    return by_id, split


def _held_out_path(recipe: Recipe) -> str | None:
    share = recipe.data.held_out
    return share if isinstance(share, str) and share != "auto" else None


def _draw(recipe: Recipe, examples: Sequence[Conversation], kept: Sequence[Conversation]) -> Split:
    share = recipe.data.held_out
    if kept or share == 0:
        return corpus.split_given(examples, kept, recipe.seed)
    return corpus.split(examples, share if isinstance(share, float) else "auto", recipe.seed)


def _read(path: str, recipe: Recipe, online: bool) -> list[Conversation]:
    if Path(path).exists():
        return corpus.read(path, recipe.data.parts)
    if not online:
        what = f"data.train: {path} is not on this machine, and only `sft train` asks the Hub."
        raise refuse(what, "Start it, or name a folder or file.")
    from datasets import load_dataset

    try:
        rows = load_dataset(path, split="train")
    except Exception as fault:  # the library raises a dozen kinds, its own and its clients'
        what = f"data.train: {path} could not be fetched ({type(fault).__name__})."
        raise refuse(what, "Check the name and the connection, or name a folder or file.") from fault
    return corpus.rows_to_conversations(enumerate(rows, start=1), path)


def _texts(
    recipe: Recipe,
    conversations: Mapping[str, Conversation],
    split: Split,
    formats: Mapping[str, Format],
    vocabulary: Vocabulary,
    problems: list[Problem],
) -> Texts:
    trained = {name: formats[name] for name in recipe.formats.train if name in formats}

    def items(ids: Iterable[str], wearing: Mapping[str, Format], twin: bool = False) -> dict[tuple[str, str], Item]:
        found = {}
        for one in (conversations[name] for name in ids):
            shown = one.asked(split.twins[one.id]) if twin else one
            for name, format in wearing.items():
                try:
                    found[one.id, name] = dressed(shown, name, format, vocabulary)
                except UserError as error:  # the base's template cannot carry this example
                    problems.extend(error.problems)
        return found

    examples, whole = {name: conversations[name] for name in split.train}, items(split.train, trained)
    wardrobe = _wardrobe(recipe, formats, examples, whole, vocabulary)
    texts = Texts(
        wardrobe,
        whole,
        items(split.held_out, formats),
        items([name for name in split.twins if name in conversations], dict([*formats.items()][:1]), twin=True),
        tuple(replayed(recipe.data.replay, recipe.data.max_tokens, vocabulary, problems)),
    )
    problems += _too_long(texts, conversations, recipe.data.max_tokens)
    problems += wardrobe.problems(recipe.epochs)
    return texts


def _wardrobe(
    recipe: Recipe,
    formats: Mapping[str, Format],
    examples: Mapping[str, Conversation],
    items: Mapping[tuple[str, str], Item],
    vocabulary: Vocabulary,
) -> Wardrobe:
    thin, limit = recipe.regularise.goldfish, recipe.data.max_tokens
    worn = {key: goldfish(item, thin) for key, item in items.items()} if thin else items
    return Wardrobe(recipe.formats, formats, examples, worn, vocabulary, recipe.seed, thin, limit)


def _too_long(texts: Texts, conversations: Mapping[str, Conversation], limit: int) -> Iterator[Problem]:
    """Examples longer than the limit, by name, each once, in the format where it is longest."""
    longest: dict[str, Item] = {}
    for item in (*texts.trained.values(), *texts.held_out.values()):
        if len(item.ids) > len(longest.get(item.example, Item("", "", (), ())).ids):
            longest[item.example] = item
    for name, item in longest.items():
        if len(item.ids) > limit:
            origin, what = conversations[name].origin, f"{name} has {len(item.ids)} tokens in {item.format}, "
            remedy = "Shorten it, or raise data.max_tokens."
            yield Problem(what + f"more than data.max_tokens {limit}.", remedy, origin.file, origin.line)


def _format_problems(recipe: Recipe, formats: Mapping[str, Format], vocabulary: Vocabulary) -> Iterator[Problem]:
    trained, held_out = ([formats[name] for name in names if name in formats] for names in _sides(recipe))
    for side, names in zip(("train", "held_out"), _sides(recipe), strict=True):
        for number, name in enumerate(names):
            for problem in prompts.prove(formats[name], vocabulary) if name in formats else ():
                yield replace(problem, file=None, line=None, key=("formats", side, number))
    try:
        clashes = prompts.clashes(trained, held_out, vocabulary)
    except UserError as error:  # the base's template does not carry the small conversation they are compared by
        clashes = error.problems
    yield from (replace(problem, file=None, line=None, key=("formats", "held_out")) for problem in clashes)


def _sides(recipe: Recipe) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return recipe.formats.train, recipe.formats.held_out


def _lint(
    recipe: Recipe, examples: Mapping[str, Conversation], split: Split, formats: Mapping[str, Format], base: Vocabulary
) -> tuple[list[Problem], list[Problem]]:
    """What lint refuses (copies, both sides, answers a client would cut off), and what it warns of."""
    if not examples:
        return [], []
    trained = [formats[name] for name in recipe.formats.train if name in formats]
    found = lint.findings(examples.values(), trained, base, split.held_out if split.train else None)
    refused = [one.problem for one in found if one.kind == "refuse"]
    return refused, [one.problem for one in found if one.kind == "warn"]
