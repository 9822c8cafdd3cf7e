"""What is known by heart: the map against real decoding, numbers against sums done by hand and against plain loops."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import memorised
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import PROMPT, Learner

from finetune import byheart, echo, formula, heard, passage, prompts, regroup, runlength, starters
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import UserError
from finetune.heard import Reading
from finetune.looks import Place
from finetune.masks import Vocabulary, encode
from finetune.odds import Sampler
from finetune.passage import Passage
from finetune.speak import Speaker

LIMITS = byheart.limits()
BIT = log(2)  # nats
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SAMPLERS = [
    Sampler(),
    Sampler(temperature=0.7),
    Sampler(top_k=3),
    Sampler(top_p=0.8),
    Sampler(min_p=0.1),
    Sampler(1.3, 8, 0.9, 0.05),
]


def plain(
    length: int, parts: Sequence[int] = (), masked: Sequence[int] = (), words: Sequence[tuple[int, int, int]] = ()
) -> Passage:
    """A passage of so many tokens; `masked` ones are in a formula."""
    counted = ~np.isin(np.arange(length), masked)
    spans = np.array(words, dtype=np.int64).reshape(-1, 3)
    labels = np.array(parts or [0] * length, dtype=np.int64)
    signs = np.full(length, 2)
    ids, read = (0,) * (length + 1), (False, *(True,) * length)
    return Passage(
        "e",
        "train",
        "f",
        ids,
        read,
        labels,
        counted,
        signs,
        spans,
        0.0,
        10,
        (0,),
        "answer",
        np.zeros(length, dtype=bool),
    )


def said(hits: str, bits: float = 1.0, margin: float = 5.0) -> Reading:
    """Hits as ones and zeros; every token `bits` less likely than certain."""
    flags = np.array([one == "1" for one in hits])
    return Reading(np.full(len(hits), -bits * BIT), flags, np.where(flags, margin, -margin))


# --- runs and windows --------------------------------------------------------------------------------------------


def test_a_run_counts_the_hits_ahead_and_ends_with_its_answer() -> None:
    hits, parts = np.array([1, 1, 0, 1, 1, 1], dtype=bool), np.array([0, 0, 0, 0, 1, 1])
    assert runlength.lengths(hits, parts).tolist() == [2, 1, 0, 1, 2, 1]


def test_a_window_sums_its_tokens_and_nothing_else() -> None:
    parts, values = np.array([0, 0, 0, 1, 1]), np.array([-1.0, -2.0, -4.0, -np.inf, -8.0])
    windows = runlength.of_tokens(parts, 2)
    assert windows.starts.tolist() == [0, 1, 3]
    assert runlength.totals(values, windows).tolist() == [-3.0, -6.0, -np.inf]
    assert runlength.least(values, windows).tolist() == [-2.0, -4.0, -np.inf]


def test_no_tokens_have_no_windows() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert (
        not len(runlength.of_tokens(none, 3))
        + len(runlength.of_parts(none, 1))
        + len(runlength.lengths(none > 0, none))
    )
    assert not len(runlength.least(np.zeros(0), runlength.of_weight(none, none, 1)))


ROWS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3), st.floats(-30, 0)), max_size=40)


@given(ROWS, st.integers(1, 6), st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_arrays_say_what_plain_loops_say(rows: list[tuple[bool, bool, int, float]], size: int, least: int) -> None:
    hits, breaks, weights, values = (np.array(one) for one in zip(*rows, strict=True)) if rows else (np.zeros(0),) * 4
    hits, weights, parts = hits.astype(bool), weights.astype(np.int64), np.cumsum(breaks).astype(np.int64)
    total = len(rows)

    def run(start: int) -> int:
        stop = start
        while stop < total and hits[stop] and parts[stop] == parts[start]:
            stop += 1
        return stop - start

    def holds(start: int, stop: int) -> bool:
        return stop <= total and all(parts[t] == parts[start] for t in range(start, stop))

    assert runlength.lengths(hits, parts).tolist() == [run(t) for t in range(total)]
    windows = runlength.of_tokens(parts, size)
    spans = [(t, t + size) for t in range(total) if holds(t, t + size)]
    assert list(zip(windows.starts, windows.stops, strict=True)) == spans
    assert runlength.all_of(hits, windows).tolist() == [all(hits[a:b]) for a, b in spans]
    assert runlength.totals(values, windows) == pytest.approx([sum(values[a:b]) for a, b in spans])
    assert runlength.least(values, windows).tolist() == [min(values[a:b]) for a, b in spans]
    heavy = runlength.of_weight(parts, weights, least)
    ends = [(a, next((b for b in range(a, total + 1) if sum(weights[a:b]) >= least), total + 1)) for a in range(total)]
    assert list(zip(heavy.starts, heavy.stops, strict=True)) == [(a, b) for a, b in ends if holds(a, b)]


# --- words and formulas ------------------------------------------------------------------------------------------


def test_words_know_their_characters() -> None:
    words, places = formula.placed("Don\u2019t, \u732b\u3068!")
    assert words == ["don't", "\u732b", "\u3068"]
    assert places.tolist() == [[0, 5], [7, 8], [8, 9]]


def masked(answers: dict[str, list[str]], **settings: Any) -> dict[str, list[list[int]]]:
    found = formula.masks(answers, **settings)
    return {name: [np.flatnonzero(one).tolist() for one in some] for name, some in found.items()}


def test_eight_shared_words_are_a_formula_and_seven_are_not() -> None:
    shared = " ".join(WORDS[:8])
    assert masked({"a": [f"x {shared} y"], "b": [f"{shared} z"]}) == {"a": [list(range(1, 9))], "b": [list(range(8))]}
    seven = " ".join(WORDS[:7])
    assert masked({"a": [f"x {seven} y"], "b": [f"{seven} z"]}) == {"a": [[]], "b": [[]]}


def test_a_span_repeated_inside_one_example_is_no_formula() -> None:
    twice = " ".join(WORDS[:8])
    assert masked({"a": [f"{twice} x {twice}", twice], "b": ["other"]}) == {"a": [[], []], "b": [[]]}


def test_a_duplicate_is_no_formula() -> None:
    long = " ".join(f"w{n}" for n in range(25))
    assert masked({"a": [f"{long} x"], "b": [f"{long} y"]}) == {"a": [[]], "b": [[]]}
    short = " ".join(f"w{n}" for n in range(24))
    assert masked({"a": [f"{short} x"], "b": [f"{short} y"]})["a"] == [list(range(24))]


def test_intended_spans_may_be_short_and_stand_in_one_example() -> None:
    assert masked({"a": ["It is, I think, so. It is"]}, intended=["it is", "nowhere", ""]) == {"a": [[0, 1, 5, 6]]}


def test_no_span_goes_from_one_answer_into_the_next() -> None:
    halves = [" ".join(WORDS[:4]), " ".join(WORDS[4:8])]
    assert masked({"a": halves, "b": [" ".join(WORDS[:8])]}) == {"a": [[], []], "b": [[]]}


def naive_masks(answers: dict[str, list[list[str]]], shortest: int, longest: int) -> dict[str, list[list[bool]]]:
    def spots(size: int) -> Iterator[tuple[str, int, int]]:
        homes: dict[tuple[str, ...], set[str]] = {}
        every = [(n, i, a, tuple(w[a : a + size])) for n, some in answers.items() for i, w in enumerate(some)
                 for a in range(len(w) - size + 1)]  # fmt: skip
        for name, _, _, span in every:
            homes.setdefault(span, set()).add(name)
        for name, i, a, span in every:
            if len(homes[span]) > 1:
                yield from ((name, i, t) for t in range(a, a + size))

    formulas, copies = set(spots(shortest)), set(spots(longest + 1))
    return {
        name: [[(name, i, t) in formulas - copies for t in range(len(words))] for i, words in enumerate(some)]
        for name, some in answers.items()
    }


TEXTS = st.lists(st.lists(st.lists(st.sampled_from("abc"), max_size=12), min_size=1, max_size=2), max_size=5)


@given(TEXTS, st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_formulas_are_what_plain_loops_find(texts: list[list[list[str]]], shortest: int, more: int) -> None:
    answers = {f"e{n}": some for n, some in enumerate(texts)}
    joined = {name: [" ".join(words) for words in some] for name, some in answers.items()}
    found = formula.masks(joined, shortest, shortest + more)
    assert {name: [one.tolist() for one in some] for name, some in found.items()} == naive_masks(
        answers, shortest, shortest + more
    )


def test_formulas_take_time_by_the_text_and_not_by_pairs_of_examples() -> None:
    draw = random.Random(0)
    stock = [f"word{n}" for n in range(3000)]
    house = " ".join(draw.choices(stock, k=12))
    answers = {f"e{n}": [" ".join(draw.choices(stock, k=300)) + f" {house}"] for n in range(400)}

    def seconds(count: int) -> float:
        some = dict(list(answers.items())[:count])
        began = time.process_time()
        found = formula.masks(some)
        assert all(mask.sum() >= 12 for masks in found.values() for mask in masks)
        return time.process_time() - began

    least = {count: min(seconds(count) for _ in range(5)) for count in (100, 400)}
    assert least[400] < 8 * least[100]  # four times the text; by pairs it would be sixteen


# --- one example in one format -----------------------------------------------------------------------------------

VOCABULARY = Vocabulary.of(tiny.tokenizer().backend_tokenizer, "<s>", "</s>")


def example(*turns: str, name: str = "e", silent: Sequence[int] = ()) -> Conversation:
    roles = ("user", "assistant")
    made = [Turn(roles[n % 2], text, loss=n not in silent) for n, text in enumerate(turns)]
    return Conversation(name, tuple(made), Origin("here"))


def in_chatml(one: Conversation, formulas: Any = None, split: Any = "train") -> Passage:
    rendered = prompts.render(one, prompts.load(["chatml"])[0], VOCABULARY)
    return passage.passage(one.id, split, rendered, encode(rendered, VOCABULARY), formulas)


def test_an_end_mark_is_read_and_not_counted() -> None:
    one = in_chatml(example("Hm?", "Ab cd."))
    mark = len("<|im_end|>")
    assert sum(one.read) == 6 + mark  # a byte a token
    assert one.counted.tolist() == [True] * 6 + [False] * mark
    assert one.signs.tolist() == [1, 1, 0, 1, 1, 1] + [0] * mark
    assert one.words.tolist() == [[0, 2, 0], [3, 5, 0]]
    assert (one.size, one.answer, one.template_share) == (6, "Ab cd.", 0.0)
    assert bytes(one.asked[1:]).decode("latin-1") != ""
    assert one.ids[: len(one.asked)] == one.asked
    assert one.read.index(True) == len(one.asked)


def test_a_formula_masks_its_words_and_what_stands_between_them() -> None:
    one = in_chatml(example("Hm?", "Ab cd, ef!"), [np.array([True, True, False])])
    assert one.counted[:10].tolist() == [False] * 5 + [True] * 5  # the comma stands beside an unmasked word
    assert one.words.tolist() == [[7, 9, 0]]
    assert one.template_share == 0.5


def test_a_sign_of_several_tokens_is_one_character_and_one_word() -> None:
    one = in_chatml(example("Hm?", "\u732b a"))
    assert one.signs[:5].tolist() == [1, 0, 0, 0, 1]
    assert one.words.tolist() == [[0, 3, 0], [4, 5, 0]]


def test_only_answers_in_the_loss_are_read_and_no_window_leaves_its_answer() -> None:
    many = " ".join(WORDS)
    one = in_chatml(example("a", many, "b", "no", "c", many, silent=[3]))
    assert set(one.parts.tolist()) == {0, 1}
    assert len(one.word_windows(8)) == 2 * (12 - 7)
    assert one.answer == many
    assert in_chatml(example("a", many, "b", "no", silent=[3])).answer == ""


def test_a_mask_of_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="2 words for an answer of 3"):
        in_chatml(example("Hm?", "Ab cd ef"), [np.array([True, True])])


def test_edits_are_levenshtein_distances() -> None:
    assert passage.edits("kitten", "sitting") == 3 / 7
    assert passage.edits("", "") == 0.0
    assert passage.edits("", "ab") == passage.edits("ab", "") == 1.0


@given(st.text("ab\u732b", max_size=70), st.text("ab\u732b", max_size=70))
@settings(max_examples=60, deadline=None)
def test_edits_are_what_the_table_says(one: str, other: str) -> None:
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row = row, [i]
        for j, b in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b)))
    assert passage.edits(one, other) == pytest.approx(row[-1] / max(len(one), len(other), 1))


# --- one reading -------------------------------------------------------------------------------------------------

EIGHT = [(2 * n, 2 * n + 1, 0) for n in range(9)]  # nine words of one token, with a token between them


def test_a_window_needs_ten_bits_and_half_a_bit_a_token_and_a_base_that_fails() -> None:
    # a window of 8 words is 15 tokens here: 10 bits are wanted, 0.6 bits a token give 9 and 0.7 give 10.5
    one, hit = plain(17, words=EIGHT), "1" * 17
    base = said("0" * 17, bits=5.0)
    assert byheart.judge(one, said(hit, 4.4), base, LIMITS).words == (0, 2)
    assert byheart.judge(one, said(hit, 4.3), base, LIMITS).words == (2, 2)
    assert byheart.judge(one, said(hit, 4.3), said(hit, 5.0), LIMITS).words == (0, 2)
    assert byheart.judge(one, said("0" + hit[1:], 4.3), base, LIMITS).words == (1, 2)
    # a window of 50 tokens wants 25 bits: 0.48 bits a token give 24, 0.52 give 26
    far, base = plain(50), said("0" * 50, bits=5.0)
    assert byheart.judge(far, said("1" * 50, 4.52), base, LIMITS).long is False
    assert byheart.judge(far, said("1" * 50, 4.48), base, LIMITS).long is True


def test_a_masked_token_neither_breaks_nor_lengthens_a_run() -> None:
    hits = "1" * 20 + "0" * 5 + "1" * 12
    found = byheart.judge(plain(37, masked=range(20, 25)), said(hits), said("0" * 37, 9.0), LIMITS)
    assert (found.run_max, found.run_start, found.whole) == (32, 0, True)
    assert found.excess_bits == pytest.approx(32 * 8.0)
    assert byheart.judge(plain(37), said(hits), said("0" * 37, 9.0), LIMITS).run_max == 20
    short = byheart.judge(plain(36, masked=range(20, 25)), said(hits[:-1]), said("0" * 36, 9.0), LIMITS)
    assert short.whole is None  # 31 counted tokens are not eligible


def test_a_run_starts_where_it_is_read() -> None:
    found = byheart.judge(plain(6, masked=[0, 3]), said("101011"), None, LIMITS)
    assert (found.run_max, found.run_start) == (3, 2)  # tokens 2, 4 and 5: the masked third does not break it
    assert byheart.judge(plain(2), said("00"), None, LIMITS).run_start is None


def test_fifty_tokens_or_150_characters_make_an_example_eligible() -> None:
    base = said("0" * 80, bits=9.0)
    assert byheart.judge(plain(49), said("1" * 49), said("0" * 49, 9.0), LIMITS).long is None
    assert byheart.judge(plain(50), said("1" * 50), said("0" * 50, 9.0), LIMITS).long is True
    wide = replace(plain(40), signs=np.full(40, 4))  # 38 tokens of 4 characters are 152
    assert byheart.judge(wide, said("1" * 38 + "00"), said("0" * 40, 9.0), LIMITS).long is True
    assert byheart.judge(wide, said("1" * 37 + "000"), said("0" * 40, 9.0), LIMITS).long is False
    assert byheart.judge(plain(80), said("1" * 49 + "0" + "1" * 30), base, LIMITS).long is False
    assert byheart.judge(plain(80, [0] * 40 + [1] * 40), said("1" * 80), base, LIMITS).long is None


def test_one_answer_echoed_whole_is_an_echo() -> None:
    parts = [0] * 40 + [1] * 40
    found = byheart.judge(plain(80, parts), said("10" * 20 + "1" * 40), said("0" * 80, 9.0), LIMITS)
    assert (found.whole, found.run_max, found.run_start) == (True, 40, 40)


def test_without_a_base_nothing_is_in_excess_and_nothing_is_zero() -> None:
    found = byheart.judge(plain(60, words=EIGHT), said("1" * 60), None, LIMITS, 0.1)
    assert (found.words, found.long, found.whole, found.excess_bits, found.fragile) == (None,) * 5
    assert (found.run_max, found.nll) == (60, pytest.approx(BIT))


def test_the_likeliest_window_of_fifty() -> None:
    log_p = np.log(np.array([0.1] * 10 + [0.5] * 50))
    reading = replace(said("1" * 60), log_p=log_p)
    assert byheart.log10_pz(plain(60), reading, 50) == pytest.approx(50 * np.log10(0.5))
    assert byheart.log10_pz(plain(49), said("1" * 49), 50) is None
    never = replace(reading, log_q=np.where(np.arange(60) == 30, -np.inf, log_p))
    assert byheart.log10_pz(plain(60), never, 50) == -np.inf


def test_an_echo_is_fragile_where_noise_could_undo_it_and_a_miss_where_noise_could_make_one() -> None:
    base, hit = said("0" * 60, bits=9.0), said("1" * 60)
    assert hit.margins is not None
    near = replace(hit, margins=np.where(np.arange(60) == 30, 0.15, hit.margins))
    firm = byheart.judge(plain(60), hit, base, LIMITS, noise=0.1)
    weak = byheart.judge(plain(60), near, base, LIMITS, noise=0.1)  # twice the noise is 0.2
    assert (firm.margin, firm.fragile, weak.margin, weak.fragile) == (5.0, False, 0.15, True)
    assert byheart.judge(plain(60), near, base, LIMITS, noise=0.05).fragile is False
    missed = replace(said("1" * 30 + "0" + "1" * 29), margins=np.where(np.arange(60) == 30, -0.15, hit.margins))
    assert byheart.judge(plain(60), missed, base, LIMITS, noise=0.1).fragile is True
    assert byheart.judge(plain(60), missed, base, LIMITS, noise=0.05).fragile is False


def naive_judge(one: Passage, reading: Reading, base: Reading, size: int, limits: byheart.Limits) -> tuple[Any, ...]:
    """Everything again, one token after the other."""
    rows = [t for t in range(len(one.counted)) if one.counted[t]]

    def echoed(tokens: list[int]) -> bool:
        bits = sum((reading.log_p[t] - base.log_p[t]) / BIT for t in tokens)
        enough = bits >= max(limits.bits, limits.bits_per_token * len(tokens))
        return enough and all(reading.hits[t] for t in tokens) and not all(base.hits[t] for t in tokens)

    answers = [[t for t in rows if one.parts[t] == part] for part in sorted(set(one.parts))]
    whole = [echoed(tokens) for tokens in answers if len(tokens) >= limits.whole]
    long = []
    for tokens in answers:
        long += [echoed(tokens[a : a + size]) for a in range(len(tokens) - size + 1)]
        for a in range(len(tokens)):
            stops = (b for b in range(a, len(tokens) + 1) if one.signs[tokens[a:b]].sum() >= limits.characters)
            long += [echoed(tokens[a:stop]) for stop in [next(stops, None)] if stop is not None]
    windows = []
    for a in range(len(one.words) - limits.words + 1):
        (first, _, part), (_, after, other) = one.words[a], one.words[a + limits.words - 1]
        if part == other:
            windows.append(echoed([t for t in rows if first <= t < after]))
    return (sum(windows), len(windows)), any(long) if long else None, any(whole) if whole else None


@given(st.integers(0, 2**32), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_judging_is_what_plain_loops_judge(seed: int, length: int) -> None:
    draw = random.Random(seed)
    limits = replace(LIMITS, words=3, tokens=8, characters=20, whole=6)
    parts = np.cumsum([draw.random() < 0.05 for _ in range(length)]).astype(np.int64)
    words = [(t, t + 1 + (draw.random() < 0.3), int(parts[t])) for t in range(0, length - 2, 2)]
    words = [one for one in words if parts[one[1] - 1] == one[2] and draw.random() < 0.9]
    inside = {t for first, after, _ in words for t in range(first, after)}
    hidden = [t for t in range(length) if t not in inside and draw.random() < 0.3]
    signs = np.array([draw.randrange(5) for _ in range(length)], dtype=np.int64)
    one = replace(plain(length, parts.tolist(), hidden, words), signs=signs)
    reading, base = (
        Reading(
            np.array([-draw.expovariate(rate) for _ in range(length)]),
            np.array([draw.random() < hit for _ in range(length)], dtype=bool),
        )
        for rate, hit in ((2.0, 0.95), (0.6, 0.6))
    )
    found = byheart.judge(one, reading, base, limits)
    assert (found.words, found.long, found.whole) == naive_judge(one, reading, base, 8, limits)


# --- a split -----------------------------------------------------------------------------------------------------


def found(name: str = "e", split: Any = "train", **values: Any) -> byheart.Found:
    one = byheart.judge(replace(plain(2), example=name, split=split), said("11"), None, LIMITS)
    return replace(one, **values)


def test_a_summary_counts_with_its_n_and_nothing_is_not_zero() -> None:
    some = [
        found("a", words=byheart.Share(3, 4), long=True, whole=True, log10_pz=-2.0, fragile=False),
        found("b", words=byheart.Share(0, 6), long=False, whole=None, log10_pz=-8.0, fragile=True),
        found("c", "held_out"),
    ]
    held, train = echo.summary(some)
    assert (train.split, train.examples, train.r8x, train.l50, train.whole) == ("train", 2, (3, 10), (1, 2), (1, 1))
    assert (train.log10_pz50, train.pz50_of, train.fragile, train.r8x.value) == ((-5.0, -2.0), 2, (1, 2), 0.3)
    assert (held.r8x.value, held.whole, held.log10_pz50, held.pz50_of) == (None, (0, 0), None, 0)


def test_an_alarm_names_a_trained_example_and_how_far_it_goes() -> None:
    some = [found("a", words=byheart.Share(3, 4), long=True), found("b", words=byheart.Share(0, 4), whole=True)]
    assert echo.alarms([*some, found("c", "held_out", long=True)]) == {("a", "words"), ("a", "long"), ("b", "whole")}


def test_train_is_held_against_held_out_exactly() -> None:
    # 3 of 4 against 0 of 2: all three yeses fall among the four with chance C(3,3) C(3,1) / C(6,4) = 3/15
    train = [found(f"t{n}", whole=n < 3) for n in range(4)] + [found("short")]
    held = [found(f"h{n}", "held_out", whole=False) for n in range(2)]
    above = echo.against(train, held).whole
    assert above is not None
    assert (above.difference, above.p, above.method, above.n) == (0.75, pytest.approx(0.2), "exact", (4, 2))
    assert echo.against(train, held).l50 is None


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_regrouping_is_what_going_through_all_groups_gives(yes: list[bool], cut: int) -> None:
    cut = min(cut, len(yes) - 1)
    rows = np.array([[2 * one, 2] for one in yes], dtype=np.int64)  # two of two: not a plain yes, so it is enumerated
    plain_rows = np.array([[one, 1] for one in yes], dtype=np.int64)
    every = [sum(yes[i] for i in some) for some in combinations(range(len(yes)), cut)]
    p = sum(one >= sum(yes[:cut]) for one in every) / len(every)
    for table in (rows, plain_rows):
        above = regroup.above(table[:cut], table[cut:])
        assert above is not None
        assert above.method == "exact"
        assert above.p == pytest.approx(p)


def test_many_groups_are_drawn_and_the_draws_are_seeded() -> None:
    draw = np.random.default_rng(0)
    rows = np.stack((draw.integers(0, 5, 60), np.full(60, 5)), axis=1)
    one, again, other = (regroup.above(rows[:40], rows[40:], seed) for seed in (1, 1, 2))
    assert one is not None
    assert other is not None
    assert one.method == "drawn"
    assert one == again
    assert one.p == pytest.approx(other.p, abs=0.03)
    assert abs(one.difference - (rows[:40, 0].sum() / 200 - rows[40:, 0].sum() / 100)) < 1e-12


def test_chances_of_drawing_a_text() -> None:
    assert regroup.extracted(-2.0, 100) == pytest.approx(1 - 0.99**100)
    assert regroup.draws_for(-2.0, 0.5) == pytest.approx(68.97, abs=0.01)  # ln 2 / -ln 0.99
    assert regroup.extracted(-400.0, 10) == 0.0
    assert regroup.draws_for(float("-inf")) == float("inf")
    assert regroup.extracted(0.0, 1) == regroup.draws_for(0.0) == 1.0


def test_rows_have_the_keys_of_the_contract() -> None:
    place = Place("full", 7, 3.5, 1e-4)
    (row,) = echo.rows([found("a", whole=True)], place, "full")
    keys = "epoch step travel id split format nll tokens bytes hits run_max run_start echo_whole excess_bits"
    more = "log10_pz50 fragile masked_share map"
    assert {*keys.split(), *more.split()} <= set(row)
    assert (row["id"], row["split"], row["format"], row["map"], row["echo_whole"]) == ("a", "train", "f", "full", True)
    assert json.dumps(row)


def test_limits_are_shipped_and_every_fault_is_told(tmp_path: Path) -> None:
    assert starters.find("echo", "suites").is_file()
    assert (LIMITS.words, LIMITS.tokens, LIMITS.whole, LIMITS.bits_per_token) == (8, 50, 32, 0.5)
    text = starters.find("echo", "suites").read_text()
    bad = tmp_path / "echo.yaml"
    bad.write_text(
        text.replace("version: 1", "version: 2")
        .replace("words: 8 ", "wrods: 8 ")
        .replace("tokens: 50 ", "tokens: 5.5 ")
    )
    with pytest.raises(UserError) as told:
        byheart.limits(bad)
    whats = [problem.what for problem in told.value.problems]
    assert len(whats) == 4
    assert all(any(name in what for what in whats) for name in ("version 2", "wrods", "words", "tokens"))


# --- real models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learner]:
    folder = tmp_path_factory.mktemp("memorised")
    return {kind: memorised.learner(folder, kind, seed=seed) for seed, kind in enumerate(tiny.KINDS)}


def test_the_map_is_what_greedy_decoding_with_a_cache_gives(learners: dict[str, Learner]) -> None:
    """For every cut of every text: the run ahead is the number of its own tokens that are really emitted."""
    cuts = close = echoed = 0
    for made in learners.values():
        scores = made.speaker.score(made.texts, made.masks, margins=True)
        alone = [made.speaker.score([one], [made.masks[0]], margins=True)[0] for one in made.texts]
        noise = max(float((a.margins - b.margins).abs().max()) for a, b in zip(scores, alone, strict=True))
        for row, start, emitted in memorised.emitted(made):
            hits, margins = scores[row].hits.numpy()[start - PROMPT :], scores[row].margins[start - PROMPT :]
            run = int(runlength.lengths(hits, np.zeros(len(hits), dtype=np.int64))[0])
            cuts, echoed = cuts + 1, echoed + (run >= 8)
            if margins[: run + 1].abs().min() <= LIMITS.noise_factor * noise:
                close += 1
                continue
            assert run == emitted, (row, start)
    assert cuts >= 1000
    assert cuts // 4 < echoed < cuts * 3 // 4
    assert close < cuts / 100


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_log_q_is_what_generate_draws_from(learners: dict[str, Learner], sampler: Sampler) -> None:
    made = learners["llama"]
    text, mask = made.texts[-1], made.masks[-1]
    found = made.speaker.score([text], [mask], samplers=[Sampler(), sampler])[0]
    assert found.log_q is not None
    for t in range(PROMPT, len(text), 9):
        asked = {name: value for name, value in vars(sampler).items() if value is not None}
        out = made.net.generate(
            input_ids=torch.tensor([text[:t]]),
            attention_mask=torch.ones((1, t), dtype=torch.long),
            **{"top_k": 0, **asked},
            do_sample=True,
            max_new_tokens=1,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        expected = torch.log_softmax(out.scores[0][0], -1)[text[t]]
        assert float(found.log_q[1, t - PROMPT]) == pytest.approx(float(expected), abs=1e-3)
    assert torch.equal(found.log_q[0], found.log_p)


@pytest.mark.parametrize("sampler", [SAMPLERS[0], SAMPLERS[-1]], ids=str)
def test_p_z_is_the_chance_of_real_draws(learners: dict[str, Learner], sampler: Sampler) -> None:
    made = learners["qwen2"]
    for row, start, p in memorised.likely(made, sampler, 6)[::9][:2]:
        count = memorised.drawn(made.net, made.texts[row][:start], made.texts[row][start : start + 6], sampler, 2000)
        assert memorised.two_sided(count, 2000, p) > 1e-5, (row, start, p, count)


def test_margins_tell_the_hit_and_nothing_unasked_is_computed(learners: dict[str, Learner]) -> None:
    made = learners["mistral"]
    asked = made.speaker.score(made.texts, made.masks, margins=True)
    for one, text in zip(asked, made.texts, strict=True):
        assert one.margins is not None
        assert ((one.margins > 0) == one.hits).all()
        logits = tiny.logits(made.net, text)[PROMPT - 1 : -1]
        best = logits.topk(2).values
        assert torch.allclose(one.margins[one.hits], (best[:, 0] - best[:, 1])[one.hits], atol=1e-3)
    silent = made.speaker.score(made.texts, made.masks)[0]
    assert (silent.margins, silent.log_q) == (None, None)


# --- a look ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Speaker, list[Passage]]:
    """A base with an adapter that says something, and two examples with a twin."""
    net = tiny.stirred(tiny.adapted(tiny.base(tmp_path_factory.mktemp("echo") / "base")))
    speaker = Speaker(net, tiny.tokenizer().backend_tokenizer, 257)
    asked = (
        ("Hm?", " ".join(WORDS), "a", "train"),
        ("So?", "Yes.", "b", "held_out"),
        ("Eh?", " ".join(WORDS), "a", "twin"),
    )
    return speaker, [in_chatml(example(q, a, name=name), split=split) for q, a, name, split in asked]


def test_a_look_reads_the_base_once_and_judges_every_passage(
    adapted: tuple[Speaker, list[Passage]], tmp_path: Path
) -> None:
    speaker, passages = adapted
    base = heard.read(speaker, passages, base=True)
    heard.save(tmp_path / "tokens" / "step-0000000.safetensors", base)
    kept = heard.load(tmp_path / "tokens" / "step-0000000.safetensors")
    assert list(kept) == [one.key for one in passages]
    assert all((kept[key].log_p == base[key].log_p).all() and (kept[key].hits == base[key].hits).all() for key in base)
    noise = heard.noise(speaker, passages)
    assert 0 <= noise < 1e-2
    look = echo.measure(speaker, passages, kept, LIMITS, noise, Sampler(top_k=5))
    first = look.found[0]
    assert first.tokens == sum(passages[0].read)
    plain_score = speaker.score([passages[0].ids], [passages[0].read])[0]
    assert first.nll == pytest.approx(plain_score.nll / first.tokens, rel=1e-5)
    gain = (look.readings[first.key].log_p - base[first.key].log_p)[passages[0].counted].sum() / BIT
    assert first.excess_bits == pytest.approx(gain)
    assert abs(gain) > 0.1
    assert {one.split for one in echo.summary(look.found)} == {"train", "held_out", "twin"}
    assert len(list(echo.rows(look.found, Place("light", 1, 1.0, 0.1), "light"))) == 3


def test_nothing_kept_is_nothing_read_again(tmp_path: Path) -> None:
    heard.save(tmp_path / "none.safetensors", {})
    assert heard.load(tmp_path / "none.safetensors") == {}


def test_almost_verbatim_counts_as_whole() -> None:
    one, base = plain(40), {plain(40).key: said("0" * 40, 9.0)}
    reading = said("1" * 39 + "0")
    look = echo.Measured((byheart.judge(one, reading, base[one.key], LIMITS),), {one.key: reading})
    text = replace(one, answer="0123456789" * 4)

    def told(greedy: str) -> byheart.Found:
        return echo.nearly(look, [text], base, {one.key: greedy}, LIMITS).found[0]

    assert look.found[0].whole is False
    assert told("0123456789" * 3 + "012345    ") is not look.found[0]
    assert (told(text.answer[:36] + "xxxx").whole, told(text.answer[:36] + "xxxx").nearly) == (True, True)
    assert told(text.answer[:35] + "xxxxx").whole is False
    assert echo.nearly(look, [text], base, {}, LIMITS).found == look.found
    dull = {one.key: said("0" * 40, 1.2)}  # 0.2 bits a token are 8 bits: the base knew it nearly as well
    assert echo.nearly(look, [text], dull, {one.key: text.answer}, LIMITS).found[0].whole is False
