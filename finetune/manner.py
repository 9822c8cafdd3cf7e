"""How a text is written: stock phrases, opening words, script, language, debris of a generation. Words only, no model.

Finds; says neither how much is too much nor what to do (see lint).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache

from finetune.overlap import words

# What untouched chat models say far more often than people who write by hand. Plain words in lower case.
STOCK = (
    "as an ai language model",
    "as an ai assistant",
    "as a large language model",
    "as of my last update",
    "my knowledge cutoff",
    "i don't have personal opinions",
    "i'm here to help",
    "happy to help",
    "great question",
    "i understand your concern",
    "i hope this helps",
    "hope this helps",
    "let me know if you",
    "feel free to",
    "if you have any further questions",
    "it is important to note",
    "it's important to note",
    "it's important to remember",
    "it is worth noting",
    "it's worth noting",
    "it's crucial to",
    "it is essential to",
    "in conclusion",
    "to summarize",
    "ultimately, the decision",
    "in today's fast paced world",
    "in today's digital age",
    "in the realm of",
    "one size fits all",
    "delve",
    "delves",
    "delving",
    "tapestry",
    "a testament to",
    "game changer",
    "navigate the complexities",
    "navigating the complexities",
    "unlock the potential",
    "embark on a journey",
    "foster a sense of",
    "plays a crucial role",
    "plays a vital role",
    "let's break it down",
    "let's dive in",
    "here's a breakdown",
    "i apologize for the confusion",
    "you're absolutely right",
)
# Harmless inside a text; as its first words they are a habit of chat models.
STOCK_OPENINGS = (
    "absolutely",
    "certainly",
    "of course",
    "sure",
    "good question",
    "that's a great",
    "overall",
    "i'm sorry",
)

_LANGUAGES = {
    "English": "the and of to is that it you for was with not are this but have",
    "German": "der die und das ist nicht ein ich sie es zu mit den auch auf dass",
    "French": "le la les et est une des pas que vous je dans pour qui sur du",
    "Spanish": "el los las que y es una por con para no se del como pero lo",
    "Italian": "il di che è un non per una sono del con come gli anche ma della",
    "Portuguese": "o que e não um uma para com os do da em se mas é por",
    "Dutch": "de het een en van ik niet dat is je op te zijn met voor maar",
    "Swedish": "och att det är en som på inte jag för med av har ett den men",
    "Polish": "i w nie na się że to jest z do jak ale po co tak już",
}
_FUNCTION_WORDS = {name: frozenset(line.split()) for name, line in _LANGUAGES.items()}

_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.M)
_DEBRIS = {
    r"<[|｜][A-Za-z][^\s<>]{0,40}[|｜]>": "a special token",
    r"\[/?INST\]|</?s>(?![\w>])": "a special token",
    r"\[(?:[Yy]our|[Ii]nsert) [^\]\n]{1,40}\]": "a blank to be filled in",
    "\ufffd": "a character that was lost when the text was decoded",
}


def stock(text: str, some: Sequence[str]) -> list[str]:
    """The stock phrases of a text, given with its words, each once, in the order of the lists."""
    flat = f" {' '.join(some)} "
    return [phrase for phrase, key in _keys() if key in flat] + [
        phrase for phrase in STOCK_OPENINGS if flat.startswith(_flat(phrase)) and _set_apart(text, phrase)
    ]


def opening(text: str, size: int = 3) -> str:
    """The first words of a text; "" where it has fewer."""
    first = words(text[:200])[:size]
    return " ".join(first) if len(first) == size else ""


def scripts(text: str) -> Counter[str]:
    """Letters by script, as Unicode names them: LATIN, CYRILLIC, ...; Han and kana together."""
    found: Counter[str] = Counter()
    for sign, count in Counter(text).items():
        if name := _script(sign):
            found[name] += count
    return found


def language(some: Sequence[str]) -> str | None:
    """The language that 20 words or more are surely in, by its function words; None where unsure."""
    counts = Counter(some)
    total = counts.total()
    scores = {name: sum(counts[word] for word in known) for name, known in _FUNCTION_WORDS.items()}
    (best, most), (_, second) = sorted(scores.items(), key=lambda pair: -pair[1])[:2]
    return best if total >= 20 and most >= 0.12 * total and most >= 2 * second else None


def debris(text: str) -> Iterator[tuple[str, str]]:
    """(what it is, the text of it): what a generation leaves behind. The text is of an answer's last part or of all."""
    for pattern, what in _DEBRIS.items():
        for mark in dict.fromkeys(re.findall(pattern, text)):
            yield what, mark
    if len(_FENCE.findall(text)) % 2:
        yield "a code fence that is never closed", "```"
    if text.rstrip().endswith((",", ";", "(")):
        yield "an end in the middle of a sentence", text.rstrip()[-20:]


def _flat(text: str) -> str:
    return f" {' '.join(words(text))} "


@cache
def _keys() -> tuple[tuple[str, str], ...]:
    return tuple((phrase, _flat(phrase)) for phrase in STOCK)


def _set_apart(text: str, phrase: str) -> bool:
    """Followed by a sign, as in «Sure! Here»; «Sure enough» is a sentence. A phrase of three words needs none."""
    after = text.lstrip()[len(phrase) :][:1]
    return phrase.count(" ") >= 2 or after in (",", "!", ".", ":", "…")


@cache
def _script(sign: str) -> str:
    """The script of a letter; "" for all else, mathematical letters among it."""
    name = unicodedata.name(sign, "").split(" ")[0] if sign.isalpha() else ""
    return {"HIRAGANA": "CJK", "KATAKANA": "CJK", "MATHEMATICAL": "", "MODIFIER": "", "FULLWIDTH": "LATIN"}.get(
        name, name
    )
