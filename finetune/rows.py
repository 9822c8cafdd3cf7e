"""The row forms of an example: messages, ShareGPT, Alpaca, prompt and completion; and JSON text to rows.

Gives plain turns or says what is wrong. Opens no file, checks no order of turns, guesses no column.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Literal, NamedTuple

RowRole = Literal["system", "user", "assistant"]

_ROLES: dict[str, RowRole] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython", "tool_calls")
_KNOWN = ("id", "tags", "twin", "system")
_SHAPES = "`messages`, `conversations`, `instruction` with `output`, or `prompt` with `completion`"
_SWITCHES = ("loss", "train", "weight")


class Said(NamedTuple):
    """One message. `loss` is False where a switch on it keeps it out of the loss."""

    role: RowRole
    text: str
    loss: bool = True


class Row(NamedTuple):
    """One example as a row. `extra` holds the scalar columns this form does not know."""

    said: tuple[Said, ...]
    id: str | None
    tags: tuple[str, ...]
    twin: str | None
    extra: dict[str, str]


class Wrong(ValueError):
    """What is wrong with a row, and what to do: (what, remedy) pairs."""

    def __init__(self, *faults: tuple[str, str]) -> None:
        super().__init__("; ".join(what for what, _ in faults))
        self.faults = list(faults)


class Text(NamedTuple):
    """A row of a file before it is understood: its line from 1 and its JSON value, or what was wrong."""

    line: int
    value: object
    wrong: str = ""


def lines(text: str) -> Iterator[Text]:
    """Rows of a .jsonl text; empty lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _parsed(number, line)


def array(text: str) -> Iterator[Text]:
    """Rows of a .json text: an array of rows, or one row. Each with the line it begins on."""
    at = _past_space(text, 0)
    if not text.startswith("[", at):
        yield _parsed(1, text)
        return
    decoder = json.JSONDecoder(object_pairs_hook=_no_twice)
    at, line, counted = _past_space(text, at + 1), 1, 0
    while not text.startswith("]", at):
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield Text(_line_of(error, line), None, _why(error))
            return
        yield Text(line, value)
        at = _past_space(text, at)
        if text.startswith(",", at):
            at = _past_space(text, at + 1)
        elif not text.startswith("]", at):
            yield Text(line, None, "a comma or `]` is missing after this row")
            return
    if _past_space(text, at + 1) < len(text):
        yield Text(line, None, "there is more after the closing `]`")


def read(row: object) -> Row:
    """One row of any of the four shapes. Raises Wrong with everything that is wrong with it."""
    if not isinstance(row, dict):
        raise Wrong(("a row that is not an object.", "Write {...} with " + _SHAPES + "."))
    faults: list[tuple[str, str]] = []
    said, used = _said(row, faults)
    _whole_row_off(row, faults)
    system = _string(row, "system", faults)
    if system and any(message.role == "system" for message in said):
        faults.append(("a `system` column and a system message.", "Keep one of the two."))
    elif system:
        said = [Said("system", system), *said]
    known = {*_KNOWN, *used}
    _near_misses(row, known, faults)
    found = Row(tuple(said), _id(row, faults), _tags(row, faults), _string(row, "twin", faults), _extra(row, known))
    if faults:
        raise Wrong(*faults)
    return found


def _said(row: dict[str, object], faults: list[tuple[str, str]]) -> tuple[list[Said], tuple[str, ...]]:
    """The messages of a row, and the columns they came from."""
    for column in ("messages", "conversations"):
        if row.get(column) is not None:
            return _messages(row[column], column, faults), (column,)
    if row.get("instruction") is not None:
        return _alpaca(row, faults), ("instruction", "input", "output", "history")
    if row.get("prompt") is not None or row.get("completion") is not None:
        return _completion(row, faults), ("prompt", "completion")
    there = ", ".join(f"`{str(key)[:40]}`" for key in list(row)[:8]) or "nothing"
    faults.append((f"no example in this row, only {there}.", f"Name its columns {_SHAPES}."))
    return [], ()


def _alpaca(row: dict[str, object], faults: list[tuple[str, str]]) -> list[Said]:
    if row.get("history"):
        faults.append(("`history` is not read.", "Write the earlier turns as `messages`."))
    asked = [_string(row, "instruction", faults), _string(row, "input", faults)]
    return [
        Said("user", "\n\n".join(text for text in asked if text)),
        Said("assistant", _string(row, "output", faults, needed=True) or ""),
    ]


def _completion(row: dict[str, object], faults: list[tuple[str, str]]) -> list[Said]:
    """As in TRL, nothing of the prompt is in the loss."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list):
        said = [message._replace(loss=False) for message in _messages(prompt, "prompt", faults)]
    else:
        said = [Said("user", _string(row, "prompt", faults, needed=True) or "")]
    if isinstance(completion, list):
        return said + _messages(completion, "completion", faults)
    return [*said, Said("assistant", _string(row, "completion", faults, needed=True) or "")]


def _whole_row_off(row: dict[str, object], faults: list[tuple[str, str]]) -> None:
    for name in _SWITCHES:
        if isinstance(row.get(name), (bool, int, float)) and not row[name]:
            faults.append((f"`{name}` keeps the whole row out of the loss.", "Remove the row, or the switch."))


def _messages(value: object, column: str, faults: list[tuple[str, str]]) -> list[Said]:
    if not isinstance(value, list) or not value:
        faults.append((f"`{column}` is not a list of messages.", 'Write [{"role": "user", "content": ...}, ...].'))
        return []
    found = [_message(item, f"message {number} of `{column}`", faults) for number, item in enumerate(value, 1)]
    return [message for message in found if message is not None]


def _message(item: object, where: str, faults: list[tuple[str, str]]) -> Said | None:
    if not isinstance(item, dict):
        faults.append((f"{where} is not an object.", 'Write {"role": ..., "content": ...}.'))
        return None
    role = _role(item.get("role", item.get("from")), where, faults)
    if any(item.get(key) for key in ("tool_calls", "function_call")):
        faults.append((f"{where} calls a tool.", "Tool calls cannot be trained here: remove the row."))
        return None
    text = _content(item.get("content", item.get("value")), where, faults)
    switches = [_switch(item, name, where, faults) for name in _SWITCHES if name in item]
    return None if role is None or text is None else Said(role, text, all(switches))


def _role(value: object, where: str, faults: list[tuple[str, str]]) -> RowRole | None:
    name = value.strip().lower() if isinstance(value, str) else ""
    if name in _ROLES:
        return _ROLES[name]
    if name in _TOOL_ROLES:
        faults.append((f"{where} has the role `{name}`.", "Tool roles cannot be trained here: remove the row."))
        return None
    near = difflib.get_close_matches(name[:40], _ROLES, n=1)
    remedy = f"Did you mean `{near[0]}`?" if near else "Roles are system, user and assistant (or human and gpt)."
    faults.append((f"{where} has the role {_short(value)}." if value else f"{where} has no role.", remedy))
    return None


def _content(value: object, where: str, faults: list[tuple[str, str]]) -> str | None:
    """Text, or the text parts of a list joined as chat templates join them: with nothing between."""
    if isinstance(value, str):
        return _clean(value)
    if not isinstance(value, list) or not value:
        faults.append((f"{where} has no text.", 'Write "content": "...".'))
        return None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) == len(value):
        return _clean("".join(found))
    faults.append(
        (f"{where} holds a part that is not text.", 'Only {"type": "text", "text": ...} can be trained here.')
    )
    return None


def _switch(item: dict[str, object], name: str, where: str, faults: list[tuple[str, str]]) -> bool:
    """False where `loss`, `train` or `weight` keeps a message out of the loss; null is no switch."""
    value = item[name]
    if value is None or (isinstance(value, (bool, int, float)) and value in (0, 1)):
        return value is None or bool(value)
    faults.append((f"{where}: {name} is {_short(value)}.", "Write true or false; shares are not supported."))
    return True


def _id(row: dict[str, object], faults: list[tuple[str, str]]) -> str | None:
    value = row.get("id")
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _string(row, "id", faults)


def _tags(row: dict[str, object], faults: list[tuple[str, str]]) -> tuple[str, ...]:
    value = row.get("tags")
    value = [value] if isinstance(value, str) else value or []
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(tag.strip() for tag in value if tag.strip())
    faults.append((f"`tags` is {_short(value)}.", 'Write a list of words: ["advice"].'))
    return ()


def _string(row: dict[str, object], name: str, faults: list[tuple[str, str]], needed: bool = False) -> str | None:
    """The text of a column, None where it is absent, null or empty; an empty needed one is found with the turns."""
    value = row.get(name)
    if isinstance(value, str):
        return _clean(value) or None
    if value is not None:
        faults.append((f"`{name}` is {_short(value)}.", "Write a string."))
    elif needed:
        faults.append((f"no `{name}` in this row.", f"A row is {_SHAPES}."))
    return None


def _near_misses(row: dict[str, object], known: set[str], faults: list[tuple[str, str]]) -> None:
    """A misspelt `twin`, `tags` or `system` would be lost in silence among the extra columns."""
    for key in row:
        near = difflib.get_close_matches(str(key)[:40].lower(), ("tags", "twin", "system"), n=1, cutoff=0.8)
        if key not in known and near and near[0] not in row:
            faults.append((f"`{key}` is not a column of this form.", f"Did you mean `{near[0]}`?"))


def _extra(row: dict[str, object], known: set[str]) -> dict[str, str]:
    return {str(k): str(v) for k, v in row.items() if k not in known and isinstance(v, (str, int, float))}


def _clean(text: str) -> str:
    """Newlines as `\\n`, no space at either end: prompt formats bring their own."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


def _short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _parsed(number: int, line: str) -> Text:
    try:
        return Text(number, json.loads(line, object_pairs_hook=_no_twice))
    except (ValueError, RecursionError) as error:
        return Text(_line_of(error, 1) + number - 1, None, _why(error))


def _line_of(error: ValueError | RecursionError, otherwise: int) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else otherwise


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _no_twice(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key `{twice[:40]}` stands twice")
    return found


def _past_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at
