"""Alike, and built like the house: by hand-made answers, and by the headings that markdown really renders."""

from __future__ import annotations

import pytest

from finetune import corpus, likeness, starters
from finetune.likeness import House, Shape, alike, consistency, house, shape

BOLD = "**The cautious one**\nTake it.\n\n**The traveller**\nLeave it.\n\n**Conclusion**\nTake a hat."
PLAIN = "The cautious one:\nTake it.\n\nThe traveller:\nLeave it.\n\nConclusion:\nTake a hat."


def test_alike_counts_words_and_not_their_order() -> None:
    assert alike("A dog and a cat.", "a CAT and a dog") == 1.0
    assert alike("one two three four", "three four five six") == 0.5
    assert alike("one one", "one") == pytest.approx(2 / 3)
    assert (alike("", ""), alike("", "a")) == (1.0, 0.0)


@pytest.mark.parametrize(("text", "style"), [(BOLD, "bold"), (PLAIN, "plain")])
def test_voices_and_a_conclusion_are_found(text: str, style: likeness.PartsStyle) -> None:
    assert shape(text, style) == Shape(2, True)
    heading = text.rindex("**Conclusion" if style == "bold" else "Conclusion")
    assert shape(text[:heading], style) == Shape(2, False)
    assert shape(text[: text.rindex("Take a hat")], style) == Shape(2, False)  # nothing below the heading
    assert shape("Just an answer.", style) == Shape(0, False)


def test_bold_words_in_a_line_are_no_heading() -> None:
    assert shape("Take **the hat** now.\nI say: no.", "bold") == shape("I say: no.", "plain") == Shape(0, False)


@pytest.mark.parametrize("style", ["bold", "plain"])
@pytest.mark.parametrize("name", ["pocket", "minisymposium"])
def test_the_shipped_answers_keep_their_own_house(name: str, style: likeness.PartsStyle) -> None:
    """Read from the files by the reader, so a change of how parts are shown breaks it."""
    taught = [one.answer for one in corpus.read(starters.find(name, "datasets"), style)]
    found = house(taught, style)
    assert found.voices >= 2
    assert found.concludes
    kept = [found.kept(text) for text in taught]
    assert kept.count(True) / len(kept) > 0.9


def test_a_house_without_a_shape_is_not_measured() -> None:
    assert house(["Yes.", "No, never.", BOLD], "bold") == House("bold", 0, False, 1)
    assert house(["Yes."], "bold").kept(BOLD) is None
    assert house([], "bold").kept("") is None


def test_a_house_says_what_is_missing() -> None:
    own = house([BOLD] * 3, "bold")
    assert own == House("bold", 2, True, 13)
    assert own.kept(BOLD) is True
    assert own.kept(BOLD.replace("**The traveller**", "The traveller")) is False
    assert own.kept(BOLD.replace("**Conclusion**", "So,")) is False


def test_consistency_is_read_between_draws_and_strangers() -> None:
    same = {(q, f): [f"{q} a b c", f"{q} a b d"] for q in ("x y", "z w") for f in ("one", "two")}
    found = consistency(same)
    assert found.across is not None
    assert found.within is not None
    assert found.within.value == pytest.approx(0.8)
    assert found.across.value == pytest.approx(1.0)
    assert found.unrelated == pytest.approx(0.6)
    assert found.lost is not None
    assert found.lost.value == pytest.approx(-0.2)
    other = {**same, ("x y", "two"): ["q r s t u", "q r s t v"], ("z w", "two"): ["k l m n o", "k l m n p"]}
    worse = consistency(other)
    assert worse.lost is not None
    assert worse.lost.value == pytest.approx(0.8)
    assert worse.share is not None
    assert worse.share < 0 < 1 < (found.share or 0)


def test_what_was_not_drawn_twice_has_no_within() -> None:
    found = consistency({("q", "f"): ["a"], ("q", "g"): ["b"]})
    assert (found.within, found.lost, found.share) == (None, None, None)
    assert consistency({}).across is None
