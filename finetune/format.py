"""What a prompt format is: strings around the turns. Knows no tokenizer, renders nothing (see prompts)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SystemMode = Literal["before", "inside_first_user", "none"]


@dataclass(frozen=True)
class Format:
    """One prompt format as published by its source, byte for byte.

    `assistant_suffix` ends an answer in the history; `generation_prompt` is what a client sends last. `end` is the mark
    the model must emit to end its answer ("" where the format has none: the tokenizer's EOS is used).
    """

    name: str
    family: str
    user_prefix: str
    user_suffix: str
    assistant_prefix: str
    assistant_suffix: str
    generation_prompt: str
    system_mode: SystemMode = "before"
    system_prefix: str = ""
    system_suffix: str = ""
    default_system: str = ""
    first_user_prefix: str | None = None
    bos: str = ""
    end: str = ""
    stop_strings: tuple[str, ...] = ()
    source: tuple[str, ...] = ()
    notes: str = ""
    aliases: tuple[str, ...] = field(default=())
