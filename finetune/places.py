"""Does a text name a place on disk, one on the Hub, or something else; and if nothing is there, what lies nearby?

Only fields marked with `Means(..., place)` are touched. No file is opened and no network asked: a Hub id is believed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic.fields import FieldInfo

from finetune.fields import Means, cut, dotted, shown
from finetune.yamlfile import Document, Key, at

HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
_ENDINGS = (".jsonl", ".json", ".md", ".txt", ".yaml")


def settle(draft: Document, leaves: Mapping[str, FieldInfo]) -> None:
    """Make every path absolute, from the folder it was written in; note a problem for those that lead nowhere."""
    for name, field in leaves.items():
        mark = next((one for one in field.metadata if isinstance(one, Means) and one.place), None)
        key = tuple(name.split("."))
        value = at(draft.data, key)
        if mark and isinstance(value, tuple):
            there = tuple(_settled(draft, (*key, number), one, mark) for number, one in enumerate(value))
            at(draft.data, key[:-1])[key[-1]] = there
        elif mark and isinstance(value, str):
            at(draft.data, key[:-1])[key[-1]] = _settled(draft, key, value, mark)


def _settled(draft: Document, key: Key, value: Any, mark: Means) -> Any:
    folder = draft.origin(key).folder
    if not isinstance(value, str) or value in mark.but or not is_path(value, folder, mark.place):
        return value
    path = absolute(value, folder)
    if not value.strip():
        draft.refuse(key, f"{dotted(key)} is empty.", f"Write {mark.words}.")
    elif not os.path.exists(path):
        draft.refuse(key, f"{dotted(key)} is {cut(shown(value))}, where there is nothing.", nearby(path))
    return path


def is_path(text: str, folder: str, kind: str) -> bool:
    """Whether `text`, written in `folder`, is a path: no Hub id (kinds base, dataset), no bare name (kind format)."""
    if kind == "format":
        return text.lower().endswith(".yaml")
    if kind == "path" or text.startswith((".", "/", "~")) or text.lower().endswith(_ENDINGS):
        return True
    if not re.fullmatch(HUB_ID, text) or os.path.exists(os.path.join(folder, text)):
        return True
    # `datasets/pokcet` beside a folder `datasets` is a slip of the pen: say so instead of asking the Hub
    return kind == "dataset" and os.path.isdir(os.path.join(folder, text.partition("/")[0]))


def absolute(text: str, folder: str) -> str:
    """The path without `~`, `.` and `..`; links are left as they are."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(text)))


def nearby(path: str) -> str:
    """A sentence on what there is where `path` was looked for: first the nearest names, else a few of them."""
    folder, name = os.path.split(path)
    while not os.path.isdir(folder):
        folder, name = os.path.split(folder)
    try:
        names = sorted(one for one in os.listdir(folder) if not one.startswith("."))
    except OSError:
        return f"{folder} cannot be read."
    if close := get_close_matches(name, names, 3, 0.6):
        return f"Did you mean {' or '.join(os.path.join(folder, one) for one in close)}?"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"In {folder} there is {', '.join(names[:5])}{more}." if names else f"{folder} is empty."
