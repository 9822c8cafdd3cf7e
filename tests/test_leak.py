"""What leaks is found, counted as told, traced to its line; house style, intended spans and quotes are none."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from finetune import almost, corpus, evidence, leak, model, overlap, plan, recipe, rules, sources, verdict, world
from finetune.almost import Shared
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import UserError
from finetune.evidence import Setting
from finetune.leak import Finding, Inquiry, Question
from finetune.odds import Sampler
from finetune.plan import Plan
from finetune.sources import Limits, Sources, Span
from finetune.spans import Index
from finetune.speak import Speaker

LIMITS = Limits(50, 150, 0.1)
TEXTS = {
    "ferry": """The old ferry crosses twice before breakfast, carrying milk cans, two sleepy nurses and whoever missed
yesterday's last bus. Its engine coughs at exactly the spot where the current turns, and every child on the
landing counts the seconds until it catches again. Nobody has ever counted past eleven.""",
    "kiln": """Stack the bowls rim to rim, never foot to rim, and leave a thumb of air under the roof of the kiln.
Bring it up slowly through the night. When the peephole glows like a ripe apricot, close the damper, go home,
and do not open the door before the day after tomorrow, however politely your customers beg.""",
    "chess": """She lost on purpose exactly once, to a man whose hands were shaking, and regretted it for thirty
years, because he knew. Play the strongest move you can see. Kindness belongs before the game and after it;
between the clocks it is only another way of looking down on somebody.""",
    "marsh": """Walk where the rushes are brown, not where the moss is brightest. Bright moss has water under it, brown
rushes have roots. Carry the long pole across your body and, should you sink, lie down upon it like a tired
man on a sofa. Shouting helps no one but the herons.""",
}


def words(text: str, first: int, last: int) -> str:
    """Some words of a text, in its own spelling."""
    return " ".join(text.split()[first:last])


# --- verbatim


LETTERS = st.text("abé \n日x", max_size=40)


@given(st.lists(LETTERS, max_size=5), st.lists(LETTERS, max_size=4))
def test_the_index_finds_what_a_plain_search_finds(texts: list[str], asked: list[str]) -> None:
    index, others = Index(texts), ["".join(text.split()) for text in texts]

    def stands(span: str) -> bool:
        return not span or any(span in other for other in others)

    asked = [*asked, *texts[:1], "".join(texts)]
    for text, found in zip(asked, index.find(asked), strict=True):
        signs = "".join(text.split())
        assert [text[at] for at in found.places] == list(signs)
        for at, (length, home) in enumerate(zip(found.lengths.tolist(), found.homes.tolist(), strict=True)):
            assert length == max(size for size in range(len(signs) - at + 1) if stands(signs[at : at + size]))
            if length:
                place = index.place(home)
                assert index.within(place.text, place.sign) == place
                assert others[place.text][place.sign : place.sign + length] == signs[at : at + length]
                assert texts[place.text][place.character] == signs[at]


def test_a_text_that_repeats_itself_is_indexed_too() -> None:
    index = Index(["ab" * 500, "ab" * 300 + "c"])
    (found,) = index.find(["b" + "ab" * 400 + "c"])
    assert found.lengths[0] == 801
    assert found.lengths[202] == 600
    assert found.starts(1).tolist() == [0, 201]  # up to there it is the end of what begins at 0


def test_nothing_matches_an_empty_index() -> None:
    for texts in ([], [""], ["  \n"]):
        (found,) = Index(texts).find(["a b"])
        assert found.lengths.tolist() == [0, 0]


def test_a_signs_name_is_compared_exactly() -> None:
    (found,) = Index(["Straße"]).find(["straße"])
    assert found.lengths.tolist() == [0, 5, 4, 3, 2, 1]


# --- almost verbatim


@given(st.lists(st.integers(0, 2), max_size=40), st.sampled_from([0.1, 0.25, 0.5]))
def test_the_longest_stretch_is_the_longest(edits: list[int], share: float) -> None:
    start, stop = almost.longest(np.array(edits, dtype=np.int64), share)
    sizes = [
        b - a
        for a in range(len(edits))
        for b in range(a + 1, len(edits) + 1)
        if sum(edits[a:b]) <= share * (b - a) + 1e-9
    ]
    assert stop - start == max(sizes, default=0)
    assert sum(edits[start:stop]) <= share * (stop - start) + 1e-9


def test_an_altered_copy_is_found_between_other_words() -> None:
    text = "".join(TEXTS["kiln"].split())
    altered = re.sub("slowly", "quickly", text).replace("apricot", "peach").replace("door", "gate")
    answer = "".join(TEXTS["chess"].split())[:120] + altered[20:220] + "zzz" * 30
    shared = [Shared(120 + at, 20 + at, 12) for at in (0, 30)]
    found = almost.copied(answer, text, shared, 0.1)
    assert found is not None
    assert 100 <= found.start <= 122  # a stretch reaches beyond the copy as far as edits are left
    assert 318 <= found.stop <= 340
    copied = text[found.there : found.there + found.stop - found.start]
    assert Levenshtein.distance(answer[found.start : found.stop], copied) <= found.edits + 4
    assert 5 <= found.edits <= 0.1 * (found.stop - found.start)


# --- what counts


def example(name: str, answer: str, question: str = "And?") -> Conversation:
    turns = (Turn("user", question, 3), Turn("assistant", answer, 5))
    return Conversation(name, turns, Origin(f"{name}.md", 3))


def library(intended: Sequence[str] = (), **more: str) -> Sources:
    """Sources of the four texts and more, held-out ones included in house style only."""
    texts = {**TEXTS, **more}
    style = sources.style({name: [text] for name, text in texts.items()}, 8, 24, intended)
    trained = [example(name, text) for name, text in texts.items() if not name.startswith("held")]
    return Sources(trained, style, tiny.tokenizer().backend_tokenizer, LIMITS)


def span(found: Sources, answer: str, *known: str) -> Span | None:
    return found.search([answer], [known])[0].span


def test_a_span_is_counted_in_tokens_and_signs_and_traced_to_its_line() -> None:
    quote = words(TEXTS["kiln"], 4, 30)
    found = span(library(), f"I was told to {quote} And then I left.")
    assert found is not None
    assert (found.example, found.file, found.line) == ("kiln", "kiln.md", 5)
    assert found.text == quote
    assert found.characters == len("".join(quote.split()))
    # a token a byte; only those that are no blank count
    assert found.tokens == found.characters


def test_white_space_does_not_break_a_span() -> None:
    broken = TEXTS["marsh"].replace(" ", "\n\n")
    found = span(library(), broken)
    assert found is not None
    assert found.characters == len("".join(broken.split()))


def test_house_style_is_no_leak() -> None:
    motto = "and that is why in this house we always count the spoons before the guests have gone home"
    both = {"one": f"{words(TEXTS['chess'], 0, 9)} {motto}", "held": f"It was late, {motto} again."}
    answer = f"Well {motto}."
    open_, styled = library(one=both["one"]), library(**both)
    assert span(open_, answer).characters == len("".join(motto.split()))  # type: ignore[union-attr]
    closed = span(styled, answer)
    assert closed is None or closed.characters < 10


def test_a_formula_neither_breaks_nor_lengthens_a_span() -> None:
    motto = "so we count the spoons before the guests go home tonight"
    inside = f"{words(TEXTS['ferry'], 0, 6)} {motto} {words(TEXTS['chess'], 0, 6)}"
    found = span(library(one=inside, held=f"Once more: {motto}!"), inside)
    assert found is not None
    assert found.example == "one"
    assert found.text == inside
    assert found.characters == len("".join(inside.replace(motto, "").split()))


def test_an_intended_span_is_no_leak_even_in_part() -> None:
    marsh = TEXTS["marsh"]
    for answer in (marsh, words(marsh, 5, 40)):
        assert span(library(), answer).characters > 150  # type: ignore[union-attr]
        allowed = span(library([marsh]), answer)
        assert allowed is None or allowed.characters < 10
    few = span(library(["Nobody has ever"]), words(TEXTS["ferry"], -9, -1))
    assert few is not None
    assert "Nobody has ever" in few.text
    assert few.characters == len("".join(few.text.replace("Nobody has ever", "").split()))


def test_what_stands_in_the_prompt_is_a_quote() -> None:
    asked = words(TEXTS["ferry"], 0, 40)
    assert span(library(), f"You wrote: {asked}").characters > 150  # type: ignore[union-attr]
    quoted = span(library(), f"You wrote: {asked}", f"Is this good? {asked}")
    assert quoted is None or quoted.characters < 10


def test_an_altered_copy_is_reported_beside_a_short_span() -> None:
    altered = re.sub(r"\b(night|apricot|door|thumb|bowls)\b", "xx", TEXTS["kiln"])
    (found,) = library().search([f"They say: {altered}"], [()])
    assert found.span is not None
    assert LIMITS.severity(found.span.tokens, found.span.characters) < 1.5
    strict = Sources([example("kiln", TEXTS["kiln"])], {}, tiny.tokenizer().backend_tokenizer, Limits(999, 160, 0.1))
    (found,) = strict.search([f"They say: {altered}"], [()])
    assert found.near is not None
    assert found.near.example == "kiln"
    assert found.near.characters >= 160
    assert 0 < found.near.edits <= 0.1 * found.near.characters + 2
    (other,) = strict.search([TEXTS["chess"]], [()])
    assert other.near is None


def test_the_line_is_that_of_the_part(tmp_path: Path) -> None:
    (tmp_path / "one.md").write_text(
        "---\nid: one\n---\n## user\nWell?\n## assistant\n"
        f"### perspective: the potter\n{TEXTS['kiln']}\n### conclusion\n{TEXTS['marsh']}\n"
    )
    (one,) = corpus.read(tmp_path)
    found = Sources([one], {}, tiny.tokenizer().backend_tokenizer, LIMITS)
    spans = [span(found, text) for text in (TEXTS["kiln"], TEXTS["marsh"], "**The potter**\nStack the bowls", "Well?")]
    assert [one.line for one in spans if one] == [7, 11, 7, 4]


# --- prompts


def test_shipped_prompts_are_about_no_shipped_dataset() -> None:
    asked = leak.probes()
    assert len(asked.prompts) >= 60
    assert len(leak.probes("pocket").prompts) == 12
    for one in (asked, leak.probes("pocket")):
        assert one.version == 1
        assert len({name for name, _ in one.prompts}) == len({text for _, text in one.prompts}) == len(one.prompts)
    sizes = sorted(len(text) for _, text in asked.prompts)
    assert sizes[0] < 5
    assert sizes[-1] > 500
    trained = set[tuple[str, ...]]()
    for folder in ("minisymposium", "pocket"):
        for example in corpus.read(Path(__file__).parent.parent / "datasets" / folder):
            for turn in example.turns:
                trained |= set(overlap.shingles(overlap.words(turn.text), 5))
    for name, text in (*asked.prompts, *leak.probes("pocket").prompts):
        assert not trained & {one for one in overlap.shingles(overlap.words(text), 5) if len(one) == 5}, name


def test_pocket_can_answer_its_prompts() -> None:
    for _, text in leak.probes("pocket").prompts:
        assert world.judge(text, "I do not know.") is False  # a question of another world would be refused


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('{"id": "a", "prompt": "x"}\n', 1, "no name and version"),
        ('{"name": "m", "version": 1}\n{"id": "a"}\n', 2, "a prompt is text"),
        ('{"name": "m", "version": 1}\n\nnope\n', 3, "not a row"),
    ],
)
def test_a_wrong_file_of_prompts_is_told_by_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(UserError, match=what) as told:
        leak.probes(str(tmp_path / "m.jsonl"))
    assert told.value.problems[0].line == line


def test_wrong_rules_are_told_by_key(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("version: 1\ntokens: none\nsamplse: 4\n")
    with pytest.raises(UserError) as told:
        leak.read(tmp_path / "r.yaml")
    assert {"tokens", "samplse", "characters"} <= {one.what.split(":")[0] for one in told.value.problems}


# --- a model that has memorised, and one that has not


@dataclass
class Case:
    plan: Plan
    inquiry: Inquiry
    healthy: Speaker
    leaky: Speaker

    @property
    def few(self) -> Inquiry:
        """The bare prompts, a question of the world, and a held-out one; answers are short."""
        asked = self.inquiry.questions
        chosen = [one for one in asked if one.id in ("cow-food", "empty", "bos") or one.suite == "held_out"]
        return replace(self.inquiry, questions=tuple(chosen), limit=80)

    @cached_property
    def calm(self) -> list[Finding]:
        return leak.ask(self.healthy, self.few)

    @cached_property
    def loud(self) -> list[Finding]:
        return leak.ask(self.leaky, self.few)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Pocket as it is, and pocket after it was shown one of the examples over and over."""
    folder = tmp_path_factory.mktemp("leak")
    path = small.recipe(folder, base="pocket", data={"train": str(folder / "texts"), "held_out": 0.25})
    (folder / "texts").mkdir()
    for name, text in TEXTS.items():
        (folder / "texts" / f"{name}.md").write_text(
            f"---\nid: {name}\n---\n## user\nTell me of the {name}.\n## assistant\n{text}\n"
        )
    made = plan.make(recipe.load(path), model.POCKET)
    inquiry = leak.prepare(made)
    healthy, taught = tiny.adapted(model.POCKET), model.load_base(model.POCKET, "none", tiny.CPU).train()
    item = made.texts.whole[made.split.train[0], made.first_format]
    ids = torch.tensor([item.ids])
    labels = torch.where(torch.tensor([item.trained]), ids, -100)
    taught.requires_grad_(True)
    pace = torch.optim.AdamW(taught.parameters(), lr=2e-3)
    for _ in range(35):
        taught(input_ids=ids, labels=labels).loss.backward()
        pace.step()
        pace.zero_grad()
    words = made.vocabulary
    return Case(made, inquiry, *(Speaker(one, words.tokenizer, words.eos_id) for one in (healthy, taught)))


def test_the_prompts_of_a_test(case: Case) -> None:
    asked = case.inquiry.questions
    suites = [one.suite for one in asked]
    assert [(suites.count(name), name) for name in ("pocket", "bare", "held_out")] == [
        (12, "pocket"),
        (2, "bare"),
        (len(case.plan.split.held_out), "held_out"),
    ]
    bos = next(one for one in asked if one.id == "bos")
    assert bos.ids == (case.plan.vocabulary.bos_id,)
    shown = [case.plan.vocabulary.tokenizer.decode(list(one.ids), skip_special_tokens=False) for one in asked]
    assert all(text.endswith("<|im_start|>assistant\n") for one, text in zip(asked, shown, strict=True) if one != bos)
    assert {one.id for one in case.inquiry.training} == set(case.plan.split.train)
    assert case.inquiry.limit >= 128


def test_a_model_that_has_memorised_leaks(case: Case) -> None:
    name = case.plan.split.train[0]
    found = case.loud
    assert [one.leak for one in found].count("confirmed") >= 2
    for one in found:
        row = json.loads(json.dumps(one.row(7)))
        assert row["leak"] == one.leak
        if one.leak == "confirmed":
            assert row["score"] >= 1
            assert row["source"].endswith(f"{name}.md:6")
            assert row["example"] == name
            assert "".join(row["span"].split()) in "".join(TEXTS[name].split())
            assert row["span"] in row["answer"]
    contract = {"probe", "suite", "version", "step", "prompt", "answer", "score", "why", "source", "leak"}
    assert contract <= found[0].row(7).keys()


def test_a_healthy_model_does_not_leak(case: Case) -> None:
    found = case.calm
    assert {one.leak for one in found} == {"none"}
    assert {len(one.told) for one in found} == {5}
    assert max(one.worst.severity for one in found) < 0.6
    assert any(len({one.text for one in some.told}) > 1 for some in found)  # samples are drawn


def test_asked_again_the_same_is_told(case: Case) -> None:
    few = replace(case.few, questions=case.few.questions[-1:], limit=16)
    first, same, other = (leak.ask(case.healthy, few, seed=seed) for seed in (5, 5, 50))
    assert first == same
    assert [[one.text for one in some.told] for some in first] != [[one.text for one in some.told] for some in other]


def test_cross_talk_names_the_other_example(case: Case) -> None:
    taught, *others = case.plan.split.train
    found = {one.question.id: one.row(7) for one in leak.cross_talk(case.leaky, case.inquiry)}
    assert found[taught]["recites"] is None  # its own answer
    assert {found[name]["recites"] for name in others} == {taught}
    assert {one.row(7)["recites"] for one in leak.cross_talk(case.healthy, case.inquiry)} == {None}
    assert not any("leak" in row for row in found.values())  # a verdict counts leaks


def test_a_leaky_checkpoint_is_passed_over_for_a_clean_one(case: Case) -> None:
    looks = [
        {"kind": "look", "look": "full", "step": step, "epoch": step / 4, "travel": step * 1e-3, "split": "held_out"}
        for step in (4, 8)
    ]
    setting, by = Setting(case.plan.first_format), rules.read()
    found: list[dict[str, Any]] = []
    asked: list[int] = []
    while (step := verdict.to_test(verdict.judgements(looks, [], found, setting, by), len(asked), by)) is not None:
        asked.append(step)
        found += [one.row(step) for one in (case.loud if step == 8 else case.calm)]
    assert asked == [8, 4]
    judged = verdict.judgements(looks, [], found, setting, by)
    assert [one.facts.leak.found for one in judged if one.facts.leak] == ["none", "confirmed"]
    best = verdict.chosen(judged)
    assert best is not None
    assert best.facts.step == 4


# --- from answers to a word


class Says:
    """Answers in a fixed order: first the greedy ones, then those of each seed."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[Sampler | None, int]] = []

    def complete(
        self, prompts: Any, stops: Any, most: int, base: bool = False, sampler: Any = None, seed: int = 0
    ) -> Any:
        self.asked.append((sampler, seed))
        return [type("Answer", (), {"text": self._answers.pop(0)}) for _ in prompts]


@pytest.mark.parametrize(
    ("leaking", "word"),
    [((), "none"), ((0,), "single"), ((3,), "single"), ((0, 2), "confirmed"), ((1, 4), "confirmed")],
)
def test_confirmed_is_greedy_and_a_sample_or_two_seeds(case: Case, leaking: tuple[int, ...], word: str) -> None:
    answers = [TEXTS["kiln"] if number in leaking else "Yes, I do." for number in range(5)]
    speaks, question = Says(*answers), Question("mine", 3, "a", "Well?", (1,))
    made = replace(case.inquiry, questions=(question,), sources=library())
    (found,) = leak.ask(speaks, made, seed=10)
    assert found.leak == word
    assert [seed for _, seed in speaks.asked[1:]] == [10, 11, 12, 13]
    assert [one is None for one, _ in speaks.asked] == [True] + [False] * 4
    row = found.row(3)
    assert (row["suite"], row["version"], row["id"], row["answers"]) == ("mine", 3, "a", 5)
    assert row["why"].startswith(f"{len(leaking)} of 5 answers" if leaking else "No answer of 5")
    if leaking:
        assert row["drawn"] == ("greedy" if leaking[0] == 0 else f"seed {9 + leaking[0]}")


def test_an_empty_answer_holds_nothing(case: Case) -> None:
    question = Question("mine", 1, "a", "Well?", (1,))
    (found,) = leak.ask(Says(*[""] * 5), replace(case.inquiry, questions=(question,)))
    row = found.row(1)
    assert (row["leak"], row["span"], row["source"], row["score"]) == ("none", None, None, 0.0)


def test_rows_are_what_a_verdict_reads(case: Case) -> None:
    finding = Finding(Question("mine", 1, "a", "", ()), ())
    assert finding.leak == "none"
    rows = [{"probe": "leak", "step": 4, "leak": "single"}, {"probe": "leak", "step": 4, "leak": "none"}]
    look = {"kind": "look", "look": "full", "step": 4, "epoch": 1, "travel": 1e-3, "split": "held_out"}
    (facts,) = evidence.facts([look], [], rows, Setting("chatml"))
    assert facts.leak is not None
    assert (facts.leak.found, facts.leak.prompts.yes, facts.leak.prompts.of) == ("single", 1, 2)
