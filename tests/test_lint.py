"""What lint alarms at and what it leaves alone: for every finding one case of each, and nothing ever crashes it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import corpus, lint, manner, overlap, private, prompts
from finetune.conversation import Conversation, Origin, Part, Turn
from finetune.format import Marks

ROOT = Path(__file__).parent.parent
FORMATS = prompts.load(["chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role"])
VOWELS = ["ka", "lo", "mi", "tu", "re", "sa", "no", "vi", "du", "pe", "zo", "ha"]


def prose(seed: int, count: int = 60) -> str:
    """Made-up words in no language, hardly any three of them twice."""
    lot = Random(seed)
    return " ".join("".join(lot.choices(VOWELS, k=lot.randint(1, 4))) for _ in range(count)) + "."


def example(name: str, answer: str, question: str = "", twin: str | None = None, *before: Turn) -> Conversation:
    seed = sum(map(ord, name))
    turns = (*before, Turn("user", question or prose(seed + 9000, 12), 1), Turn("assistant", answer, 3))
    return Conversation(name, turns, Origin(f"{name}.md", 1), twin=twin)


def parts(name: str, *pieces: tuple[str, str, str]) -> Conversation:
    """An answer in parts, given as (kind, title, text)."""
    written = tuple(Part(kind, text, title, 3 + i) for i, (kind, title, text) in enumerate(pieces))  # type: ignore[arg-type]
    text = "\n\n".join(f"**{part.title}**\n{part.text}" for part in written)
    turns = (Turn("user", prose(sum(map(ord, name)), 12), 1), Turn("assistant", text, 2, parts=written))
    return Conversation(name, turns, Origin(f"{name}.md", 1))


def others(count: int = 9) -> list[Conversation]:
    return [example(f"other-{i}", prose(100 + i)) for i in range(count)]


def rules(*examples: Conversation, held_out: tuple[str, ...] | None = None) -> set[tuple[str, str]]:
    """(kind, rule) of everything found, among other examples that are sound."""
    found = lint.findings([*others(), *examples], FORMATS, Marks(), held_out)
    assert all(one.problem.what and one.problem.remedy for one in found)
    assert all(one.problem.file == f"{one.example}.md" and one.problem.line for one in found if one.example)
    return {(one.kind, one.rule) for one in found}


def changed(text: str, every: int) -> str:
    """The text with every n-th word replaced."""
    return " ".join("xx" if i % every == every - 1 else word for i, word in enumerate(text.split()))


def test_sound_examples_give_no_finding() -> None:
    assert rules() == set()
    assert rules(held_out=tuple(f"other-{i}" for i in range(3))) == {("warn", "few-examples")}


# --- examples against each other


@pytest.mark.parametrize(("every", "rule"), [(30, "refuse"), (9, "warn"), (3, None)])
def test_near_copies_refuse_half_copies_warn_and_same_subject_does_neither(every: int, rule: str | None) -> None:
    one = example("one", prose(1, 90), prose(2, 20))
    other = example("other", changed(prose(1, 90), every), changed(prose(2, 20), every))
    found = {kind for kind, name in rules(one, other) if name == "near-copy"}
    assert found == ({rule} if rule else set())


def test_another_answer_to_the_same_question_is_no_copy() -> None:
    assert rules(example("one", prose(1, 30), prose(2, 90)), example("two", prose(3, 30), prose(2, 90))) == set()


def test_a_common_instruction_makes_no_copies() -> None:
    instruction = "Say in one word whether the following review of a restaurant is kind or not, and nothing else: "
    reviews = [example(f"r{i}", ["It is kind.", "It is not."][i % 2], instruction + prose(i, 5)) for i in range(30)]
    assert not [one for one in lint.findings(reviews, held_out=("r1", "r2")) if one.kind == "refuse"]


def test_a_trained_question_may_not_be_held_out_in_nearly_the_same_words() -> None:
    question = "Should I tell my neighbour that his apple tree is dropping its fruit into my garden every autumn"
    one = example("one", prose(1), question + "?")
    other = example("two", prose(2), question + " now?")
    assert ("refuse", "both-sides") in rules(one, other, held_out=("two",))
    assert ("refuse", "both-sides") not in rules(one, other, held_out=("one", "two"))
    assert rules(one, other) == set()


def test_a_twin_may_not_ask_what_the_other_side_asks() -> None:
    twin = "His apples fall into my garden every autumn and he does not know, shall I say something about it"
    one = example("one", prose(1), twin=twin + "?")
    assert ("refuse", "both-sides") in rules(one, example("two", prose(2), twin + " today?"), held_out=("two",))
    assert ("refuse", "both-sides") not in rules(one, example("two", prose(2)), held_out=("two",))


def test_an_answer_may_not_stand_on_both_sides() -> None:
    one, other = example("one", prose(1, 20), prose(2, 40)), example("two", prose(1, 20), prose(3, 40))
    assert ("refuse", "both-sides") in rules(one, other, held_out=("one",))
    assert ("refuse", "both-sides") not in rules(one, other)


def test_a_copy_is_told_once() -> None:
    both = [example("one", prose(1, 90), prose(2, 20)), example("two", prose(1, 90), prose(2, 20) + " Why?")]
    found = lint.refusals([*others(), *both], held_out=("two",))
    assert [one.rule for one in found] == ["near-copy"]
    assert "one.md:1" in str(found[0])


def test_long_shared_spans_warn_where_they_stand_and_short_ones_do_not() -> None:
    def pair(words: int) -> list[Conversation]:
        span = prose(7, words)
        return [example(name, f"{prose(i)} {span} {prose(i + 50)}") for i, name in ((1, "a"), (2, "b"))]

    (found,) = lint.findings([*others(), *pair(26)])
    assert (found.kind, found.rule, found.example) == ("warn", "shared-span", "b")
    assert "26 words in a row" in str(found)
    assert "a.md:1" in str(found)
    assert rules(*pair(24)) == set()


def test_an_answer_that_is_mostly_another_s_refuses() -> None:
    span = prose(7, 60)
    found = lint.findings([*others(), example("a", f"{span} {prose(1, 20)}"), example("b", prose(2, 200) + span)])
    assert [(one.kind, one.example) for one in found if one.rule == "shared-span"] == [("refuse", "a"), ("warn", "b")]
    assert "75% of the answer" in str(found[0])


@pytest.mark.parametrize(("count", "held_out"), [(2, None), (0, None), (3, ("other-0", "other-1", "other-2"))])
def test_too_few_examples_refuse(count: int, held_out: tuple[str, ...] | None) -> None:
    assert [one.rule for one in lint.refusals(others(count), held_out=held_out)] == ["few-examples"]


def test_everything_may_be_trained() -> None:
    assert lint.findings(others(1), held_out=()) == []
    assert lint.findings(others(20), held_out=tuple(f"other-{i}" for i in range(8))) == []


# --- answers against formats


@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", "\n### Instruction:", "\nUser:", "\n**User:**"])
def test_own_stop_strings_refuse_and_are_told_once(stop: str) -> None:
    found = lint.findings([*others(), example("one", f"{prose(1)}{stop} {prose(2)}")], FORMATS)
    assert {one.kind for one in found if one.rule in ("stop-string", "scaffold")} == {"refuse"}


def test_other_formats_scaffolds_only_warn() -> None:
    assert rules(example("one", prose(1) + " [INST] " + prose(2))) >= {("warn", "scaffold")}
    assert lint.refusals([*others(), example("one", prose(1) + "<end_of_turn>")], FORMATS) == []


@pytest.mark.parametrize(
    "text",
    [
        "The user: he is you.",
        "now.\nUser numbers fell",
        "Human: all too human",
        "He asked the Human: why?",
        "a <b and c> d [inst]",
    ],
)
def test_words_that_scaffolds_share_with_prose_do_not_alarm_inside_a_line(text: str) -> None:
    assert ("warn", "scaffold") not in rules(example("one", f"{prose(1)} {text} {prose(2)}"))


def test_stop_strings_in_questions_do_not_alarm() -> None:
    assert (
        rules(example("one", prose(1), "What does <|im_end|> mean, and why does it say ### Instruction: here")) == set()
    )


def test_an_indented_format_does_not_meet_its_own_mark_in_a_list() -> None:
    (yaml_turns,) = prompts.load(["yaml-turns"])
    answer = example("one", prose(1) + "\n- user: me\n- user: you")
    assert lint.refusals([*others(), answer], [yaml_turns]) == []
    assert lint.refusals([*others(), answer], prompts.load(["user-assistant-plain"])) == []


def test_a_dropped_system_text_is_told_once_a_format() -> None:
    with_system = [example(f"s{i}", prose(i), "", None, Turn("system", prose(i + 70))) for i in range(3)]
    silent = prompts.load(["mistral-instruct-tgw", "chatml"])
    found = [one for one in lint.findings([*others(), *with_system], silent) if one.rule == "dropped-system"]
    assert len(found) == 1
    assert "2 other examples" in str(found[0])
    assert not [one for one in lint.findings(others(), silent) if one.rule == "dropped-system"]
    assert rules(*with_system) == set()


# --- habits


VIEWS = (("perspective", "one", prose(11, 20)), ("perspective", "two", prose(12, 20)))
END = ("conclusion", "", prose(13, 20))


def test_a_missing_conclusion_is_told_where_there_are_perspectives() -> None:
    assert rules(parts("a", *VIEWS)) == {("warn", "no-conclusion")}
    assert rules(parts("a", *VIEWS, END)) == set()


def test_a_missing_conclusion_is_told_where_most_examples_have_one() -> None:
    usual = [parts(f"u{i}", ("text", "", prose(i)), ("conclusion", "", prose(i + 40))) for i in range(9)]
    found = lint.findings([*usual, example("plain", prose(99))])
    assert [(one.rule, one.example) for one in found] == [("no-conclusion", "plain")]


def test_perspectives_that_are_one_or_alike_or_lopsided_warn() -> None:
    copy = ("perspective", "three", changed(VIEWS[0][2], 12))
    assert rules(parts("a", VIEWS[0], END)) == {("warn", "one-perspective")}
    assert rules(parts("a", *VIEWS, copy, END)) == {("warn", "similar-perspectives")}
    assert rules(parts("a", *VIEWS, ("perspective", "three", prose(14, 200)), END)) == {
        ("warn", "unequal-perspectives")
    }
    assert rules(parts("a", *VIEWS, ("perspective", "three", prose(14, 90)), END)) == set()


def test_an_opening_of_many_answers_is_told_once_with_its_share() -> None:
    found = lint.findings([*others(6), *(example(f"h{i}", f"That depends on {prose(i + 500)}") for i in range(4))])
    assert [one.rule for one in found] == ["same-opening"]
    assert "4 of 10 answers (40%) begin with «that depends on»" in str(found[0])
    assert rules(*(example(f"h{i}", f"That depends on {prose(i + 500)}") for i in range(3))) == set()


@pytest.mark.parametrize(
    "phrase",
    [
        "Great question!",
        "It’s important to note that",
        "As an AI language model",
        "I hope this helps.",
        "We delve into",
    ],
)
def test_stock_phrases_warn(phrase: str) -> None:
    assert rules(example("one", f"{phrase} {prose(1)}")) == {("warn", "stock-phrase")}


@pytest.mark.parametrize("phrase", ["Sure enough", "Of course not", "Her conclusion in full", "An island in delveton"])
def test_plain_words_are_no_stock_phrases(phrase: str) -> None:
    assert manner.stock(f"{phrase} {prose(1)}", overlap.words(f"{phrase} {prose(1)}")) == []


def test_stock_openings_count_only_as_openings() -> None:
    assert rules(example("one", f"Certainly! {prose(1)}")) == {("warn", "stock-phrase")}
    assert rules(example("one", f"{prose(1)} Certainly! {prose(2)}")) == set()


ENGLISH = "It is not that the house was old, but you have to know that this is the way it was with the people of it. "
GERMAN = (
    "Das Haus ist nicht alt, aber ich weiß, dass es auch den anderen zu kalt ist, und die Tür ist auf, und der Hof. "
)


def test_an_answer_in_another_script_or_language_warns() -> None:
    english = [example(f"e{i}", ENGLISH + prose(i, 20)) for i in range(9)]
    for text in (GERMAN, "Это не дом, а просто большая комната без окон и дверей."):
        found = lint.findings([*english, example("odd", text)])
        assert [(one.rule, one.example) for one in found if one.rule == "foreign"] == [("foreign", "odd")]


def test_a_foreign_word_or_a_mixed_dataset_does_not_alarm() -> None:
    english = [example(f"e{i}", ENGLISH + prose(i, 20) + " λόγος, 道") for i in range(6)]
    german = [example(f"g{i}", GERMAN + prose(i + 30, 20)) for i in range(6)]
    assert not [one for one in lint.findings([*english, *german]) if one.rule == "foreign"]


@pytest.mark.parametrize(
    "end", ["```python\nx = 1", "<|eom_id|>", "Dear [Your Name] here", "caf\ufffd and", "and so he said,"]
)
def test_debris_of_a_generation_warns(end: str) -> None:
    assert rules(example("one", f"{prose(1)}\n{end}")) == {("warn", "debris")}


@pytest.mark.parametrize(
    "end", ["```python\nx = y[0]\n```", "a < b | c > d", "He said: [sic]", "the letter ð…", "(so)"]
)
def test_finished_text_is_no_debris(end: str) -> None:
    assert rules(example("one", f"{prose(1)}\n{end}")) == set()


def test_an_answer_far_shorter_than_the_rest_warns() -> None:
    assert rules(example("one", "Yes.")) == {("warn", "short-answer")}
    brief = [example(f"b{i}", prose(i, 2 + i % 3)) for i in range(12)]
    assert not [one for one in lint.findings(brief) if one.rule == "short-answer"]


# --- private things

# Written in two halves, so that no scanner of this repository takes them for real.
SECRETS = [
    "AKIA" + "Q7XR2MPLT5WVZ3KD",
    "ghp_" + "a8Kd03hGf7Lq2Zx9Vb4Nm1Cw6Er5Ty0UiPo3",
    "hf_" + "aBcDxYzRtQwLmKpVnJhGfTrEwSdFgHjKlP",
    "sk-" + "proj-9fK2mXq7LwB4tYz1RvD8sHc3NpJ6gAe5",
    "xoxb-" + "2938475610-8273645019-kJhGfDsAqWeRtYu",
    "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIE",
    "postgres://bob:" + "hunter2secret@db.internal.net/app",
    "password = '" + "q9Xw-7Lk2Vz0Rt4B'",
    "the API key is " + "8f3a9c1e7b2d4f60a5c8e91b3d7f2046",
]
NO_SECRETS = [
    "AKIAIOSFODNN7EXAMPLE",
    "sk-xxxxxxxxxxxxxxxxxxxxxxxx",
    "the token counterrevolutionaries was split in three",
    "password: correct-horse-battery-staple",
    "https://user:password@host/path",
    "a secret: 3.14159265358979",
    "the key 2024-05-06T12:30:00 sorts first",
    "commit 8f3a9c1e7b2d4f60a5c8e91b3d7f2046 broke it",
]
PHONES = ["+49 170 8256317", "(212) 736-5000", "212-736-5000", "030/8256317", "06 24 57 89 31", "call 736 50 08"]
NO_PHONES = [
    "from 1914 to 1918, 1939-1945",
    "ISBN 978-3-16-148410-0, or 0-306-40615-2",
    "2 + 3.141592653 = 5.141592653",
    "+3.141592653",
    "1 000 000 000 + 10 000 000 000",
    "on 2024-05-06 and 06.05.2024 at 12:30",
    "0.123456789 and 0,123456789",
    "192.168.100.200",
    "+1 202-555-0142",
    "arXiv 2401.01234567, doi 10.1000/1234567",
    "3,458,912,774 seconds",
    "0101 1010 1010",
]


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_warn_and_are_not_shown_whole(text: str) -> None:
    (found,) = lint.findings([*others(), example("one", f"{prose(1)} {text} {prose(2)}")])
    assert (found.kind, found.rule) == ("warn", "secret")
    assert text not in str(found) or text.startswith("-----")


@pytest.mark.parametrize("text", NO_SECRETS)
def test_placeholders_and_plain_words_are_no_secrets(text: str) -> None:
    assert [one for one in private.find(text) if one.kind == "secret"] == []


@pytest.mark.parametrize("text", [*PHONES, "m.huber+x@web-mail.de"])
def test_addresses_and_numbers_warn_in_every_turn_and_in_the_twin(text: str) -> None:
    assert rules(example("one", f"{prose(1)} {text} {prose(2)}")) == {("warn", "private")}
    assert rules(example("one", prose(1), f"{prose(2, 9)} {text}.")) == {("warn", "private")}
    assert rules(example("one", prose(1), twin=f"{prose(2, 9)} {text}?")) == {("warn", "private")}


@pytest.mark.parametrize("text", [*NO_PHONES, "name@example.org", "git@github.com:a/b", "@media print", "a@b"])
def test_numbers_in_maths_dates_and_books_do_not_alarm(text: str) -> None:
    assert private.find(text) == []


# --- the whole


@pytest.mark.parametrize("name", ["pocket", "minisymposium"])
def test_the_shipped_datasets_give_no_finding(name: str) -> None:
    examples = corpus.read(ROOT / "datasets" / name)
    held_out = corpus.split(examples, "auto", 0).held_out
    assert [str(one) for one in lint.findings(examples, FORMATS, Marks(), held_out)] == []


def test_refusals_come_first_and_in_the_order_of_the_files() -> None:
    found = lint.findings([example("b", "Sure! <|im_end|>"), example("a", "<|im_end|>"), *others()], FORMATS)
    places = [(one.kind, str(one.problem.file), one.problem.line) for one in found]
    assert places == sorted(places)
    assert {one.kind for one in found} == {"refuse", "warn"}
    refused = lint.refusals([example("b", "Sure! <|im_end|>"), example("a", "<|im_end|>"), *others()], FORMATS)
    assert refused == [one for one in found if one.kind == "refuse"]


def test_two_hundred_examples_take_a_moment() -> None:
    examples = [example(f"e{i}", prose(i, 150), prose(i + 5000, 40)) for i in range(200)]
    lint.findings(examples[:9], FORMATS)  # reads the shelf
    start = time.process_time()
    assert lint.findings(examples, FORMATS, held_out=tuple(f"e{i}" for i in range(40))) == []
    assert time.process_time() - start < 1.0, "0.15 s on a quiet core"


def test_the_room_is_light() -> None:
    script = "import sys, finetune.lint; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"torch", "transformers", "tokenizers", "pydantic", "yaml", "numpy", "regex", "finetune.corpus"}


TEXT = st.text(max_size=60) | st.sampled_from([*SECRETS, *PHONES, "```", "<|im_end|>", "", "…", prose(1), GERMAN])
PARTS = st.lists(
    st.builds(Part, st.sampled_from(["text", "perspective", "conclusion", "correction"]), TEXT, TEXT), max_size=4
)
TURN = st.builds(
    Turn, st.sampled_from(["system", "user", "assistant"]), TEXT, st.just(1), st.booleans(), PARTS.map(tuple)
)


@st.composite
def conversations(draw: st.DrawFn) -> Iterator[Conversation]:
    turns = tuple(draw(st.lists(TURN, max_size=5)))
    return Conversation(draw(st.text(max_size=3)), turns, Origin("x.jsonl"), twin=draw(st.none() | TEXT))  # type: ignore[return-value]


@given(st.lists(conversations(), max_size=14), st.none() | st.lists(st.text(max_size=3), max_size=4))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_no_conversation_crashes_it(examples: list[Conversation], held_out: list[str] | None) -> None:
    for one in lint.findings(examples, FORMATS, Marks(), held_out):
        assert str(one)


# --- what texts share, against the plain definition

WORDS = st.lists(st.lists(st.sampled_from("abcd"), max_size=14), max_size=6)


@given(WORDS, st.integers(1, 4))
def test_repeated_marks_exactly_the_words_another_list_holds(lists: list[list[str]], least: int) -> None:
    runs = [{tuple(one[i : i + least]) for i in range(len(one) - least + 1)} for one in lists]
    for number, spans in enumerate(overlap.repeated(lists, least)):
        one, elsewhere = lists[number], set().union(*(runs[:number] + runs[number + 1 :]), set())
        starts = [i for i in range(len(one) - least + 1) if tuple(one[i : i + least]) in elsewhere]
        assert {at for span in spans for at in range(span.start, span.stop)} == {
            i + k for i in starts for k in range(least)
        }
        assert all(tuple(one[span.start : span.start + least]) in runs[span.other] for span in spans)
        assert all(span.other != number for span in spans)


@given(st.lists(st.frozensets(st.integers(0, 9)), max_size=8), st.sampled_from([0.1, 0.4, 0.5, 0.7, 1.0]))
def test_alike_finds_every_pair_that_is(sets: list[frozenset[int]], least: float) -> None:
    pairs = [(i, j, overlap.jaccard(sets[i], sets[j])) for j in range(len(sets)) for i in range(j)]
    assert sorted(overlap.alike(sets, least)) == sorted(pair for pair in pairs if pair[2] >= least)


@given(st.lists(st.frozensets(st.integers(0, 5)), max_size=9))
def test_own_leaves_out_exactly_what_over_half_hold(sets: list[frozenset[int]]) -> None:
    usual = {item for item in range(6) if sum(item in one for one in sets) > len(sets) / 2}
    assert overlap.own(sets) == [one - usual for one in sets]


@pytest.mark.parametrize(
    ("text", "count"),
    [("Don’t stop, now!", 3), ("不要停", 3), ("हिन्दी में", 2), ("a_b 3.14", 3), ("… — !", 0), ("Ｆｕｌｌ", 1)],
)
def test_words_are_counted_in_every_script(text: str, count: int) -> None:
    assert len(overlap.words(text)) == count
