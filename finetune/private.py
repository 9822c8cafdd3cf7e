"""What should not leave the house: keys and tokens, e-mail addresses, phone numbers in a text.

Knows shapes, not people: names, street addresses and passwords in plain words go unseen. Reaches no network.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

Kind = Literal["secret", "e-mail", "phone"]


class Private(NamedTuple):
    """One find. `start`: in characters. `shown`: enough to find it again, of a secret never the whole."""

    kind: Kind
    what: str
    start: int
    shown: str


# Shapes as their makers publish them (prefix and length), the same that GitHub secret scanning and gitleaks look for.
_SHAPES = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{30,})",
    "a GitLab token": r"\bglpat-[\w-]{20,}",
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_-]{20,}",
    "a Google API key": r"\bAIza[\w-]{35}",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a Slack webhook": r"hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{16,}",
    "a Stripe key": r"\b[sr]k_(?:live|test)_[A-Za-z0-9]{16,}",
    "an npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "a PyPI token": r"\bpypi-[\w-]{50,}",
    "a SendGrid key": r"\bSG\.[\w-]{22}\.[\w-]{43}",
    "a Telegram bot token": r"\b\d{8,10}:AA[\w-]{33}",
    "a JSON web token": r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}",
    "a private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{1,100}:[^\s/@]{3,100}@",
}
# Patterns are compiled at first use: importing this room should cost nothing.
_SECRET = "|".join(f"({shape})" for shape in _SHAPES.values())
_NAMED = (
    r"(?i)((?:api|access|secret|private|auth)[ _-]?key|secret|token|passw(?:or)?d|passphrase|credential|bearer)"
    r"[^\n]{0,24}?(?<![\w/+.-])((?=\S*\d)[\w/+.!$%&*-]{12,200}={0,2})"
)
_EMAIL = r"(?i)\b(?<![.+-])[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.)+[a-z]{2,24}\b(?!:)"
_NOBODY = re.compile(r"@(?:.*\.)?(?:example(?:\.[a-z]{2,3})?|test|invalid|localhost|local)$", re.I)  # RFC 2606, 6762

_DIGIT = re.compile(r"\d")
_BEFORE = r"(?<![\w.,=/+-])"
_AFTER = r"(?![\w=/%+-]|[.,]\d)"
_PHONE = (
    _BEFORE
    + r"(?:\+[1-9]\d{0,2}(?:[ ./-]?\(?\d{1,5}\)?){2,6}"  # +49 170 1234567
    + r"|(?:\(\d{3}\) ?|\d{3}-)\d{3}-\d{4}"  # (212) 555-7788
    + r"|0\d{2,4} ?[/-] ?\d{5,8}|0\d{2,4} \d{3,4} \d{3,4}|0\d{3,4} \d{6,7}|0[1-9](?:[ .]\d\d){4})"  # 030/1234567
    + _AFTER
)
_SPOKEN = (
    r"(?i)\b(?:tel|phone|telephone|mobile|cell|fax|call|ring|dial|whatsapp|handy|telefon)\b[^\d\n+]{0,12}"
    r"(\+?\(?\d[\d ()/.-]{5,16}\d)" + _AFTER
)
_DATE_OR_DECIMAL = re.compile(r"\d{4}([./-])\d\d?\1\d\d?|\d\d?([./-])\d\d?\2\d{4}|\+?\d+\.\d+")
# Numbers kept for fiction: NANP 555-01xx, and Ofcom's drama numbers.
_FICTION = re.compile(r"555-?01\d\d$|^(?:0|44)(?:207946|1632960|7700900)")


def find(text: str) -> list[Private]:
    """Everything private in a text, in order; a stretch is told once."""
    found: list[Private] = []
    taken: list[tuple[int, int]] = []
    for one, end in (*_secrets(text), *_addresses(text), *_numbers(text)):
        if not any(one.start < stop and start < end for start, stop in taken):
            taken.append((one.start, end))
            found.append(one)
    return sorted(found, key=lambda one: one.start)


Found = Iterator[tuple[Private, int]]  # a find, and the character after its last


def _secrets(text: str) -> Found:
    if not _may_hold_one(text):
        return
    for match in re.finditer(_SECRET, text):
        what = list(_SHAPES)[(match.lastindex or 1) - 1]
        if "private key" in what or not _made_up(match.group()):
            yield Private("secret", what, match.start(), _veiled(match.group())), match.end()
    for match in re.finditer(_NAMED, text):
        if _random(match[2]):
            what = f"a random string after «{match[1]}»"
            yield Private("secret", what, match.start(2), _veiled(match[2])), match.end(2)


def _may_hold_one(text: str) -> bool:
    """Quick: every secret here is a long word with a digit, a very long one, or a block; most prose has none."""
    long = [word for word in text.split() if len(word) >= 12]
    odd = any(len(word) >= 30 or "://" in word or _DIGIT.search(word) for word in long)
    return odd or "-----BEGIN" in text


def _addresses(text: str) -> Found:
    for match in re.finditer(_EMAIL, text) if "@" in text else ():
        if not _NOBODY.search(match.group()):
            yield Private("e-mail", "an e-mail address", match.start(), match.group()), match.end()


def _numbers(text: str) -> Found:
    if len(_DIGIT.findall(text)) < 7:
        return
    matches = [(one.group(), one.start(), one.end()) for one in re.finditer(_PHONE, text)]
    matches += [(one[1], one.start(1), one.end(1)) for one in re.finditer(_SPOKEN, text)]
    for shown, start, end in matches:
        if _a_phone(shown):
            yield Private("phone", "a phone number", start, shown.strip()), end


def _a_phone(shown: str) -> bool:
    """7 to 15 digits [ITU E.164], not all alike, neither a date, a decimal, nor a number kept for fiction."""
    digits = re.sub(r"\D", "", shown)
    least = 9 if shown.startswith("+") else 7
    plain = _DATE_OR_DECIMAL.fullmatch(shown.strip())
    return least <= len(digits) <= 15 and len(set(digits)) >= 4 and not plain and not _FICTION.search(digits)


def _made_up(secret: str) -> bool:
    """A placeholder of a manual: `AKIAIOSFODNN7EXAMPLE`, `sk-xxxxxxxx`, `https://user:password@host`."""
    told = re.search(r"example|x{5}|your|placeholder|\.{3}|user(?:name)?:|<|\{|\$", secret, re.I)
    return bool(told) or ("@" not in secret and _entropy(secret[4:]) < 3.0)


def _random(value: str) -> bool:
    """Letters and digits without the order of words: over 3.3 bits a character, at least two changes of kind."""
    kinds = [("d" if sign.isdigit() else "U" if sign.isupper() else "l") for sign in value if sign.isalnum()]
    changes = sum(a != b for a, b in pairwise(kinds))
    mixed = "d" in kinds and ("l" in kinds or "U" in kinds)
    return mixed and changes >= 4 and _entropy(value) > 3.3 and not _made_up(value)


def _entropy(text: str) -> float:
    """Bits per character of a text's own letter counts."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values()) if text else 0.0


def _veiled(secret: str) -> str:
    return secret if secret.startswith("-----") else secret[:6] + "…"
