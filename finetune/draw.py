"""Drawing by lot: who asks the same thing, and who is drawn. Knows ids and texts only; holds no random state."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Mapping


def normal(text: str) -> str:
    """Letters, digits and signs only, one case, single spaces; as written where nothing would be left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in folded).split()
    return " ".join(words) or folded.strip()


def alike(asked: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Ids in groups that share a text, also by way of a third; ids and groups in order of id."""
    leader: dict[str, str] = {}

    def find(key: str) -> str:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    for name, texts in asked.items():
        for text in texts:
            leader[find("text " + text)] = find("name " + name)
    groups: dict[str, list[str]] = {}
    for name in sorted(asked):
        groups.setdefault(find("name " + name), []).append(name)
    return list(groups.values())


def draw(groups: Iterable[list[str]], goal: int, seed: int) -> set[str]:
    """Whole groups, at most `goal` ids. By hash: another order draws the same, one id more moves few others."""
    taken: set[str] = set()
    for group in sorted(groups, key=lambda group: _lot(min(group), seed)):
        if len(taken) + len(group) <= goal:
            taken.update(group)
    return taken


def _lot(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{name}".encode()).digest()
