"""The little world says what it may say, refuses the rest, and knows right answers from wrong ones."""

import re
from itertools import pairwise
from random import Random

import pytest

from finetune.world import accepts, fact_choices, held_out_text, is_held_out, judge, questions, sentences, world


def drawn_texts(seed: int, count: int) -> list[str]:
    rng = Random(seed)
    return [world().draw_text(rng) for _ in range(count)]


def test_the_same_seed_draws_the_same_world():
    assert questions(3, 20) == questions(3, 20)
    assert questions(3, 20) != questions(4, 20)
    assert held_out_text(5, 4) == held_out_text(5, 4)
    assert fact_choices(6, 4) == fact_choices(6, 4)


def test_the_world_is_large_enough_to_talk_about():
    rng, words = Random(0), set()
    for _ in range(3000):
        asked = world().draw_question(rng)
        words |= set(re.findall(r"[a-z]+", f"{asked.question} {asked.answer}".lower()))
    assert len(words) >= 800
    assert len(world().kinds) >= 40


def test_every_drawn_sentence_is_accepted():
    rng = Random(1)
    texts = drawn_texts(1, 150)
    for _ in range(150):
        asked = world().draw_question(rng)
        texts += [asked.question, asked.answer, *world().draw_dialogue(rng)]
    refused = [s for text in texts for s in sentences(text) if not accepts(s)]
    assert refused == []


def test_scrambled_sentences_are_refused():
    rng, tried, taken = Random(2), 0, []
    for text in drawn_texts(2, 120):
        for sentence in sentences(text):
            words = sentence.rstrip(".?!").split()
            scrambled = rng.sample(words, len(words))
            if len(words) > 4 and scrambled != words:
                tried += 1
                taken += [sentence] if accepts(" ".join(scrambled) + ".") else []
            assert len(words) <= 4 or not accepts(" ".join(reversed(words)) + ".")
    assert tried > 200
    assert len(taken) <= tried // 50  # two names that change places may give a sentence again


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "Yes, because.",
        "The the the.",
        "the grass was wet because it rained.",
        "The umbrella is a feeling of the market.",
        "A cow eats grass because",
        "Anna went to the because.",
        "On the one hand it rains.",
        "**The cautious one**",
    ],
)
def test_nonsense_is_refused(sentence):
    assert not accepts(sentence)


def test_wrong_facts_are_refused_though_their_form_is_right():
    assert accepts("A cow eats grass.")
    assert not accepts("A cow eats honey.")
    assert accepts("After Monday comes Tuesday.")
    assert not accepts("After Monday comes Friday.")


def test_sentences_no_sample_held_are_accepted():
    assert accepts("Wilma baked a cake because the moon was bright.")
    assert accepts("The harp is in the boat.") is False  # a harp is an instrument, not a thing that lies about
    assert accepts("The drum is in the boat.")


def test_every_drawn_answer_is_right():
    for part in ("seen", "unseen"):
        wrong = [asked for asked in questions(4, 300, part) if not judge(asked.question, asked.answer)]
        assert wrong == []


def test_answers_to_other_questions_are_wrong():
    asked = questions(5, 200)
    moved = [judge(one.question, other.answer) for one, other in pairwise(asked)]
    assert sum(moved) <= 2


def test_any_wording_of_the_right_answer_is_right():
    question = "Why was the grass wet?"
    assert judge(question, "The grass was wet because it rained.")
    assert judge(question, "The grass was wet because it rained, and that was because the clouds were dark.")
    assert not judge(question, "The grass was wet because the snow melted.")
    assert not judge(question, "The grass was wet.")


def test_answers_from_a_story_must_fit_the_story():
    story = "Anna went to the lake. Ben went to the market. Where did Ben go?"
    assert judge(story, "Ben went to the market.")
    assert not judge(story, "Ben went to the lake.")
    assert not judge(story, "Anna went to the lake.")
    assert not judge(story, "Clara went to the market.")


def test_a_question_from_elsewhere_is_an_error():
    with pytest.raises(ValueError, match="not a question of this world"):
        judge("Who wrote Faust?", "Goethe.")


def test_no_unseen_question_is_drawn_for_training():
    rng = Random(6)
    text = "\n".join(world().draw_question(rng).question for _ in range(4000))
    text += "\n".join(turn for _ in range(1000) for turn in world().draw_dialogue(rng))
    assert [one.question for one in questions(7, 300) if one.question in text] == []


def test_held_out_text_is_never_drawn_for_training():
    rng = Random(8)
    assert not any(is_held_out(world().draw_text(rng)) for _ in range(500))
    assert all(is_held_out(world().draw_text(rng, "unseen")) for _ in range(50))


def test_fact_choices_hold_one_right_answer():
    for choice in fact_choices(9, 60):
        right = [judge(choice.question, answer) for answer in choice.choices]
        assert right == [i == choice.right for i in range(len(choice.choices))]
        assert len(set(choice.choices)) == 4


def test_answers_are_whole_short_sentences():
    lengths = [len(one.answer.split()) for one in questions(10, 400)]
    assert max(lengths) <= 30
    assert sorted(lengths)[len(lengths) // 2] >= 5
