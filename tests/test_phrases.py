"""Loops are found and choruses are not; rates count what stands there."""

from __future__ import annotations

import pytest

from finetune import phrases


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("I see. " * 9, "i see"),
        ("Well, " + "the end of the " * 5, "end of the the"),
        ("no " * 10, "no"),
        ("One thing leads to another thing. " * 3, "one thing leads to another thing"),
        ("It rains!!!!!!!!!!!!!!!!!!!!", "!"),
    ],
)
def test_a_loop_is_found(text: str, unit: str) -> None:
    found = phrases.loop(text)
    assert found is not None
    assert sorted(found.split()) == sorted(unit.split())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Knock, knock, knock. Who is there?",
        "Row, row, row your boat, gently down the stream; merrily, merrily, merrily, merrily, life is but a dream.",
        "The hen eats corn. The cow eats grass. The cat eats fish.",
        "Title\n----------------------------------------\nText",
    ],
)
def test_what_people_repeat_is_no_loop(text: str) -> None:
    assert phrases.loop(text) is None


def test_stock_phrases_are_counted_each_time_they_stand_there() -> None:
    assert phrases.stock("Certainly! It is important to note this. And it is important to note that.") == 3
    assert phrases.stock("I am certainly late.") == 0


def test_rates_are_per_thousand_words_and_nothing_is_not_zero() -> None:
    found = phrases.manner_of(["Certainly! " + "word " * 99, "a b c d"])
    assert found.words == 104
    assert found.stock == pytest.approx(1000 / 104)
    assert (found.looped, found.median_words) == (1, 52)
    empty = phrases.manner_of([])
    assert (empty.stock, empty.distinct_2, empty.median_words, empty.looped) == (None, None, None, 0)


def test_pairs_of_words_are_compared_over_equal_lengths() -> None:
    long, short = ["a b a b c d"], ["a b a"]
    assert phrases.pairs(long) == 5
    assert phrases.manner_of(long).distinct_2 == pytest.approx(4 / 5)
    assert phrases.manner_of(long, phrases.pairs(short)).distinct_2 == phrases.manner_of(short).distinct_2 == 1.0
