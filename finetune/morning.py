"""The verbs of the morning after: one short function each, put behind the door by `cli`.

Each reads the words, calls a room and prints. No torch before a verb needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VERBS: tuple[tuple[Callable[..., Any], str], ...] = ()  # (verb, example)
