"""The strings of a format around the turns of a conversation: which stretch is scaffold, which a writer's words.

Strings in, segments out; pure. It knows no base but by two words, its BOS and EOS, finds no format and runs no template
(see prompts).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from finetune.conversation import Conversation, Origin, Turn
from finetune.format import Format, Segment

PROBE = Conversation(
    "probe",
    (
        Turn("user", "Is it raining?"),
        Turn("assistant", "A little."),
        Turn("user", "And now?"),
        Turn("assistant", "No."),
    ),
    Origin("probe"),
)

# Only these mean «the document ends (begins)» and become the base's own; a turn's end mark stays as written.
_DOCUMENT_ENDS = ("</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>")
_DOCUMENT_STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")
_DOCUMENT = re.compile("|".join(map(re.escape, _DOCUMENT_ENDS + _DOCUMENT_STARTS)))


@lru_cache(maxsize=256)
def mapped(fmt: Format, bos: str | None, eos: str | None) -> Format:
    """The format with its document tokens in the base's words: an EOS the base lacks stays, a BOS goes."""

    def own(found: re.Match[str]) -> str:
        return bos or "" if found.group() in _DOCUMENT_STARTS else eos or found.group()

    frame = [one.name for one in fields(Format) if one.name.endswith(("_prefix", "_suffix", "_prompt", "end"))]
    changed: dict[str, Any] = {key: _DOCUMENT.sub(own, getattr(fmt, key) or "") for key in frame}
    if fmt.first_user_prefix is None:
        changed["first_user_prefix"] = None
    return replace(fmt, **changed, stop_strings=tuple(_DOCUMENT.sub(own, stop) for stop in fmt.stop_strings))


def filled(turns: Sequence[Turn], fmt: Format, eos: str | None) -> list[Segment]:
    """A conversation in a format of strings. An empty system text means none, not the default one."""
    told = [_text(turn.text, fmt) for turn in turns if turn.role == "system"] or [Segment(fmt.default_system)]
    shown = told[0].text and fmt.system_mode != "none"
    opening = [Segment(fmt.system_prefix), told[0], Segment(fmt.system_suffix)] if shown else []
    talk = [turn for turn in turns if turn.role != "system"]
    rows = [*opening] if fmt.system_mode == "before" else []
    for at, turn in enumerate(talk):
        if turn.role == "assistant":
            rows += _answer(turn, fmt, eos, last=at == len(talk) - 1)
        else:
            inside = opening if at == 0 and fmt.system_mode == "inside_first_user" else []
            rows += [Segment(_prefix(fmt, at)), *inside, _text(turn.text, fmt), Segment(fmt.user_suffix)]
    if talk and talk[-1].role == "user":
        rows.append(Segment(fmt.generation_prompt))
    return [row for row in rows if row.text or row.role in ("lead", "answer", "end")]


def _prefix(fmt: Format, at: int) -> str:
    """What opens a user turn; where answers have no mark, its first character already stands in the answer's ending."""
    if at == 0:
        return fmt.user_prefix if fmt.first_user_prefix is None else fmt.first_user_prefix
    return fmt.user_prefix if fmt.end else fmt.user_prefix[1:]


def _answer(turn: Turn, fmt: Format, eos: str | None, last: bool) -> list[Segment]:
    """The scaffold before an answer, its three segments, the scaffold after."""
    before, mark, after = fmt.assistant_suffix.partition(fmt.end) if fmt.end else ("", "", "")
    ending = before + mark
    if not fmt.end:
        # The loss covers each token that *begins* in a trained stretch: one character stands for a first token.
        ending = eos or "" if last else fmt.assistant_suffix + fmt.user_prefix[:1]
    return [
        Segment(fmt.generation_prompt),
        Segment(fmt.assistant_prefix[len(fmt.generation_prompt) :], "lead", turn.loss),
        Segment(_text(turn.text, fmt).text, "answer", turn.loss),
        Segment(ending, "end", turn.loss),
        Segment("" if last else after),
    ]


def _text(text: str, fmt: Format) -> Segment:
    return Segment(re.sub(r"\n(?=[^\n])", "\n" + fmt.indent, text) if fmt.indent else text, "text")
