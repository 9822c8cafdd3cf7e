"""Which scripts a text is written in, and which tokens of a vocabulary can only spell one that should not be there.

Unicode decides, by Script_Extensions: digits, emoji and most signs belong to no script, `。` to the East Asian ones. No
model is asked, nothing is judged. Scripts go by their four letters: Latn, Cyrl, Hani, Hira, Grek.
"""

from __future__ import annotations

import codecs
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby

from fontTools import unicodedata as unicode
from tokenizers import Tokenizer

_NONE = frozenset({"Zyyy", "Zinh", "Zzzz"})  # common, inherited, unknown
_SYMBOLS = frozenset({"Grek"})  # π and Δ stand alone in any script's formulas
_EMOJI = range(0x1F000, 0x1FB00)
_MOSTLY = 0.9  # of the characters that a cut one may still become; some signs of no script lie in every block
_TAIL = bytes(range(0x80, 0xC0))


@cache
def of(sign: str) -> frozenset[str]:
    """The scripts that use a character; empty for what belongs to none."""
    return frozenset(unicode.script_extension(sign)) - _NONE


def counts(text: str) -> Counter[str]:
    """Characters by script; one that several use counts for each, one that none owns for none."""
    found: Counter[str] = Counter()
    for sign, count in Counter(text).items():
        found.update(dict.fromkeys(of(sign), count))
    return found


def used(texts: Iterable[str]) -> frozenset[str]:
    """Every script with at least one character in these texts."""
    return frozenset(name for sign in set().union(*texts) for name in of(sign))


def foreign(text: str, allowed: frozenset[str]) -> Counter[str]:
    """Characters of scripts that are not allowed, by script. A Greek letter that stands alone is a sign, not Greek."""
    found: Counter[str] = Counter()
    for names, run in groupby(text, of):
        size = sum(1 for _ in run)
        if names and not names & allowed and not (size == 1 and names <= _SYMBOLS):
            found["Hani" if "Hani" in names else min(names)] += size
    return found


# tokens


def spelled(tokenizer: Tokenizer) -> list[bytes | None]:
    """The bytes of every token, by id; None for special tokens and ids that stand for nothing.

    Byte-level vocabularies write bytes as letters, others write words with `▁` for a space and lone bytes as `<0xE4>`.
    """
    state = json.loads(tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([state["decoder"], state["pre_tokenizer"]])
    special = {one["id"] for one in state["added_tokens"] if one["special"]}
    added = {one["id"] for one in state["added_tokens"]}
    tokens: list[bytes | None] = [None] * (1 + max(tokenizer.get_vocab().values(), default=-1))
    for text, number in tokenizer.get_vocab().items():
        if number not in special:
            tokens[number] = text.encode() if number in added else _bytes(text, byte_level)
    return tokens


def only_foreign(tokens: Sequence[bytes | None], allowed: frozenset[str]) -> list[bool]:
    """Whether a token holds, or can only begin, a character of a script that is not allowed.

    Bytes at a token's front that end a character begun before it are not looked at: its first byte was. A character
    cut off at the end counts where no character it may become is of an allowed script or an emoji, and nine in ten of
    them belong to scripts at all: 0xE4 begins Han only, 0xE1 may begin Vietnamese Latin, 0xF0 an emoji. A token that is
    one Greek letter, or may begin one, is a sign.
    """
    return [token is not None and _token_is_foreign(token, allowed) for token in tokens]


def _bytes(text: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(_letters()[sign] for sign in text if sign in _letters())
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


@cache
def _letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary [GPT-2, encoder.py]."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _token_is_foreign(token: bytes, allowed: frozenset[str]) -> bool:
    reader = codecs.getincrementaldecoder("utf-8")("ignore")
    text = reader.decode(token.lstrip(_TAIL))
    cut, _ = reader.getstate()
    return bool(foreign(text, allowed)) or (bool(cut) and _begins_foreign(cut, allowed))


@cache
def _begins_foreign(cut: bytes, allowed: frozenset[str]) -> bool:
    """Of every assigned character that these first bytes may become."""
    places = _reach(cut)
    if any(place in places for place in (_EMOJI[0], _EMOJI[-1])) or (places[0] in _EMOJI):
        return False
    of_each = [of(chr(place)) for place in places if unicodedata.category(chr(place)) not in ("Cn", "Co", "Cs")]
    owned = [names for names in of_each if names]
    if any(names & allowed or names <= _SYMBOLS for names in owned):
        return False
    return bool(of_each) and len(owned) >= _MOSTLY * len(of_each)


def _reach(cut: bytes) -> range:
    """The code points whose UTF-8 begins with these bytes."""
    length = 2 if cut[0] < 0xE0 else 3 if cut[0] < 0xF0 else 4
    bits = cut[0] & (0x7F >> length)
    for byte in cut[1:]:
        bits = bits << 6 | (byte & 0x3F)
    open_bits = 6 * (length - len(cut))
    least = {2: 0x80, 3: 0x800, 4: 0x10000}[length]
    return range(max(bits << open_bits, least), min((bits + 1) << open_bits, 0x110000))


def told(found: Counter[str]) -> Iterator[str]:
    """«Hani 12», the most first."""
    yield from (f"{unicode.script_name(name, default=name)} {count}" for name, count in found.most_common())
