"""Does this text name a place on disk or one on the Hub, and if nothing is there, what lies nearby?

It opens no file and no network: a Hub id is taken at its word.
"""

from __future__ import annotations

import os
import re
from difflib import get_close_matches

HUB_ID = r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*"
_ENDINGS = (".jsonl", ".json", ".md", ".txt", ".yaml")


def is_path(text: str, folder: str, kind: str) -> bool:
    """Whether `text`, written in `folder`, is a path. `kind`: path, dataset or base; the last two may be Hub ids."""
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
