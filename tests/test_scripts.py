"""Scripts are Unicode's; a cut character counts only where it can become nothing else."""

from __future__ import annotations

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models

from finetune import model, scripts

LATIN = frozenset({"Latn"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Straße, naïve café, Việt Nam!", {}),
        ("3 + 4 = 7 … «so» – 👍 → ∑", {}),
        ("the cat 猫 sat", {"Hani": 1}),
        ("猫。", {"Hani": 2}),
        ("Привет, friend", {"Cyrl": 6}),
        ("the area is π r², up by Δ", {}),
        ("λόγος", {"Grek": 5}),
    ],
)
def test_foreign_characters_are_found_and_signs_are_not(text: str, found: dict[str, int]) -> None:
    assert scripts.foreign(text, LATIN) == found


def test_a_script_of_the_data_is_not_foreign() -> None:
    allowed = scripts.used(["Say да.", "No 猫 here"])
    assert {"Latn", "Cyrl", "Hani"} <= allowed
    assert not scripts.foreign("нет 犬", allowed)
    assert scripts.foreign("нет ひ", allowed) == {"Hira": 1}


@pytest.mark.parametrize(
    ("cut", "counted"),
    [
        ("e4", True),  # Han
        ("e4b8", True),
        ("d0", True),  # Cyrillic
        ("eab0", True),  # Hangul
        ("e1", False),  # Georgian, or Vietnamese Latin
        ("c3", False),  # é
        ("e2", False),  # quotes and dashes
        ("f0", False),  # rare Han, or emoji
        ("f09f", False),  # emoji
        ("ce", False),  # one Greek letter
        ("ad", False),  # the end of something begun before
        ("b8ad", False),
        ("b8ade59bbd", True),  # such an end, then a whole Han character
        ("61e4", True),
    ],
)
def test_a_cut_character_counts_only_where_it_must_become_foreign(cut: str, counted: bool) -> None:
    assert scripts.only_foreign([bytes.fromhex(cut)], LATIN) == [counted]
    assert scripts.only_foreign([bytes.fromhex(cut)], LATIN | {"Hani", "Cyrl", "Hang"}) == [False]


@pytest.mark.parametrize("text", ["Straße 猫 👍 да", "a\n\tb"])
def test_tokens_spell_the_bytes_of_the_text(text: str) -> None:
    for tokenizer in (tiny.tokenizer().backend_tokenizer, Tokenizer.from_file(str(model.POCKET / "tokenizer.json"))):
        tokens = scripts.spelled(tokenizer)
        some = [tokens[one] for one in tokenizer.encode(text, add_special_tokens=False).ids]
        assert b"".join(one or b"" for one in some) == text.encode()


def test_marks_and_lone_bytes_of_the_other_kind_of_vocabulary_are_read() -> None:
    words = Tokenizer(models.BPE({"<s>": 0, "▁cat": 1, "<0xE4>": 2, "猫": 3, "▁": 4}, [], byte_fallback=True))
    words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    words.add_special_tokens(["<s>"])
    tokens = scripts.spelled(words)
    assert tokens == [None, b" cat", b"\xe4", "猫".encode(), b" "]
    assert scripts.only_foreign(tokens, LATIN) == [False, False, True, True, False]
