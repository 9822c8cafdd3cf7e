"""What of a prompt format can be seen in a text: the marks of its turns, and how its roles stand, whoever has them.

Finds scaffolds in answers, and formats that only look different. Strings in, strings out: it asks no model, and whether
a mark is a fault is for its caller to say.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from finetune.filling import mapped
from finetune.format import Format

_BRACKETED = re.compile(r"(<[^\s<>]+>)+|<<.+>>|\[/?[A-Z_]+\]|<[|｜].+[|｜]>.*", re.DOTALL)
_ROLE = re.compile(r"[^\W_]+(?:['’ ]?[^\W_]+)*")
_SENTENCE = 5  # words from which a format's own system text is a mark


def marks(fmt: Format, bos: str | None = "<s>", eos: str | None = "</s>") -> tuple[str, ...]:
    """Lines of the format's scaffold that hold a letter, stripped: heads of turns, ends, stop strings, system text."""
    own = mapped(fmt, bos, eos)
    frame = (own.user_prefix, own.first_user_prefix or "", own.user_suffix, own.assistant_prefix, own.generation_prompt)
    rest = (own.assistant_suffix, own.system_prefix, own.system_suffix, own.end, *own.stop_strings)
    told = own.default_system if len(own.default_system.split()) >= _SENTENCE else ""
    lines = (line.strip() for text in (*frame, *rest, told) for line in text.split("\n"))
    return tuple(dict.fromkeys(line for line in lines if len(line) > 1 and any(map(str.isalpha, line))))


def turn_stops(fmt: Format, bos: str | None = "<s>", eos: str | None = "</s>") -> tuple[str, ...]:
    """Strings that open the next turn, beside the format's own stop strings: after one, a model speaks for its user."""
    own = mapped(fmt, bos, eos)
    heads = [head for head in (own.user_prefix.strip(), own.generation_prompt.strip()) if len(head) > 1]
    return tuple(dict.fromkeys(head if _BRACKETED.fullmatch(head) else f"\n{head}" for head in heads))


def shape(prefix: str) -> str:
    """How a role stands, with any word for it: `### {}:` of `### Human: `; a line break behind it counts, case not."""
    body = "".join(_ROLE.sub("{}", prefix.strip()).split())
    return body + ("\n" if "\n" in prefix[len(prefix.rstrip()) :] else "")


def head(fmt: Format) -> str:
    """What opens a user's turn, without white space and in one case."""
    return "".join(fmt.user_prefix.split()).casefold()


def near(fmt: Format, trained: Iterable[Format]) -> str | None:
    """The trained format that this one is of the family of, or only looks unlike; None where it is a stranger."""
    own = head(fmt)
    return next((one.name for one in trained if one.family == fmt.family or (own and own == head(one))), None)


@dataclass(frozen=True)
class Detector:
    """Every known mark: found anywhere where it stands in brackets, else where it opens a line."""

    owners: Mapping[str, frozenset[str]]
    pattern: re.Pattern[str]

    @classmethod
    def of(
        cls, formats: Iterable[Format], own: Sequence[str] = (), bos: str | None = "<s>", eos: str | None = "</s>"
    ) -> Detector:
        """All marks of these formats but those that the author's `own` answers hold: they are his words.

        A document's end ends any answer, so it is nobody's mark.
        """
        owners: dict[str, set[str]] = defaultdict(set)
        for fmt in formats:
            for mark in marks(fmt, bos, eos):
                if mark.replace(eos or "", "").replace(bos or "", ""):
                    owners[mark].add(fmt.name)
        said = _pattern(owners)
        known = {found.group(1).strip() for text in own for found in said.finditer(text)}
        kept = {mark: frozenset(names) for mark, names in owners.items() if mark not in known}
        return cls(kept, _pattern(kept))

    def leaks(self, text: str, asked_in: Format | None = None) -> tuple[str, ...]:
        """Marks in an answer that the format it was asked in does not have; each once, in order."""
        own = () if asked_in is None else asked_in.name
        found = dict.fromkeys(hit.group(1).strip() for hit in self.pattern.finditer(text))
        return tuple(mark for mark in found if own not in self.owners[mark])


def _pattern(marks: Iterable[str]) -> re.Pattern[str]:
    """Longer marks first, so that `### Instruction:` is not taken for `###`."""
    ways = [_way(mark) for mark in sorted(marks, key=lambda mark: (-len(mark), mark))]
    return re.compile(f"({'|'.join(ways) or '(?!)'})", re.MULTILINE)


def _way(mark: str) -> str:
    """A bare word is a head only alone on its line."""
    plain = re.escape(mark)
    if _BRACKETED.fullmatch(mark) or len(mark.split()) >= _SENTENCE:
        return plain
    return rf"^[ \t]*{plain}[ \t]*$" if re.fullmatch(r"(?:[^\W_]| )+", mark) else rf"^[ \t]*{plain}"
