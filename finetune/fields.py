"""Put a pydantic model into words: its keys, types, bounds and meanings, and what a validation fault means to a writer.

It knows no setting and reads no file: whoever owns a model asks it here, so that help and errors cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Key = tuple[str | int, ...]
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
}

_SIGNS = ((Ge, ">=", "ge"), (Gt, ">", "gt"), (Le, "<=", "le"), (Lt, "<", "lt"))


@dataclass(frozen=True)
class Means:
    """How to say what a text field holds, and whether it points somewhere. `but` are words, not places."""

    words: str
    place: Literal["", "path", "dataset", "base", "format"] = ""
    but: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One line of help. `default` is written as in YAML; None where the writer must decide."""

    key: str
    type: str
    default: str | None
    bounds: str
    meaning: str


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key that holds a value, in the order of the model; a section that may be null is itself one."""
    for name, field in model.model_fields.items():
        inner = section(field.annotation)
        if inner is None or NoneType in get_args(field.annotation):
            yield prefix + name, field
        if inner is not None:
            yield from leaves(inner, f"{prefix}{name}.")


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every dotted key that holds settings of its own."""
    for name, field in model.model_fields.items():
        if (inner := section(field.annotation)) is not None:
            yield prefix + name, inner
            yield from sections(inner, f"{prefix}{name}.")


def section(kind: Any) -> type[BaseModel] | None:
    """The model behind `Model` or `Model | None`."""
    kinds = [one for one in get_args(kind) or (kind,) if one is not NoneType]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None


def settings(model: type[BaseModel]) -> list[Setting]:
    """The help of every setting, made from the model itself."""
    return [_setting(key, field) for key, field in leaves(model)]


def _setting(key: str, field: FieldInfo) -> Setting:
    default = None if field.is_required() else shown(field.get_default(call_default_factory=True))
    kind = words(field.annotation, field.metadata, bounded=False)
    return Setting(
        key,
        kind,
        default,
        "; ".join(dict.fromkeys(_all_limits(field.annotation, field.metadata))),
        field.description or "",
    )


def words(kind: Any, metadata: Sequence[Any] = (), bounded: bool = True) -> str:
    """A type in plain English, with its bounds in brackets unless they are told apart."""
    limits = f" ({', '.join(_limits(metadata))})" if bounded and _limits(metadata) else ""
    if mark := next((mark for mark in metadata if isinstance(mark, Means)), None):
        return mark.words + limits
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return words(args[0], _flat(args[1:]), bounded)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(words(one, (), bounded) for one in sorted(args, key=lambda one: one is not NoneType))
    if origin is tuple:
        inner = [words(one, (), bounded) for one in args if one is not Ellipsis]
        return f"a list of {inner[0]}{limits}" if Ellipsis in args else f"[{', '.join(inner)}]"
    if section(kind):
        pairs = (f"{name}: {words(one.annotation, one.metadata, bounded)}" for name, one in kind.model_fields.items())
        return "{" + ", ".join(pairs) + "}"
    return _NAMES[kind] + limits


def _flat(metadata: Sequence[Any]) -> list[Any]:
    return [mark for one in metadata for mark in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _limits(metadata: Sequence[Any]) -> list[str]:
    told = [f"{sign} {getattr(one, name)}" for one in metadata for kind, sign, name in _SIGNS if type(one) is kind]
    return told + [f"at least {one.min_length}" for one in metadata if isinstance(one, MinLen)]


def _all_limits(kind: Any, metadata: Sequence[Any]) -> Iterator[str]:
    if limits := _limits(metadata):
        yield ", ".join(limits)
    for one in get_args(kind) if get_origin(kind) is not Literal else ():
        if get_origin(one) is Annotated:
            yield from _all_limits(get_args(one)[0], _flat(get_args(one)[1:]))
        elif inner := section(one):
            yield from (text for field in inner.model_fields.values() for text in _all_limits(None, field.metadata))


def shown(value: Any) -> str:
    """A value as one would write it in YAML, in brackets and short."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, str):
        text = value if value.isprintable() and value.strip() == value and value else json.dumps(value)
    elif isinstance(value, Mapping):
        text = "{" + ", ".join(f"{name}: {shown(one)}" for name, one in value.items()) + "}"
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(shown, value)) + "]"
    else:
        text = number(value) if isinstance(value, float) else json.dumps(value)
    return text


def number(value: float) -> str:
    """A float as the shipped recipes write it: `1.0e-7`, `0.05`, `10.0`."""
    digits, e, power = repr(value).partition("e")
    return f"{digits if '.' in digits else digits + '.0'}e{int(power)}" if e else digits


class Shape:
    """The keys of one model, looked up by faults: which part of a pydantic location is ours, and what is near it."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.leaves = dict(leaves(model))
        self.sections = dict(sections(model))
        self.known = list(dict.fromkeys([*self.leaves, *self.sections]))

    def path(self, loc: Sequence[str | int]) -> Key:
        """The key path in the file; what pydantic adds for the members of a union is left out."""
        path: list[str | int] = []
        for part in loc:
            if (key := dotted(path)) in self.leaves and key not in self.sections:
                return (*path, part) if isinstance(part, int) else tuple(path)
            path.append(part)
        return tuple(path)

    def fault(self, error: ErrorDetails, value: Any) -> tuple[str, str]:
        """(what is wrong, what to do) for one fault of validation; `value` is what the file says there."""
        path = self.path(error["loc"])
        key = dotted(path)
        if error["type"] == "told":
            return f"{key} {error['msg']}", error["ctx"]["remedy"]
        if error["type"] == "extra_forbidden" and path == error["loc"]:  # else: one of the members of a union
            return f"{key} is not a setting.", self.near(key)
        field = self.leaves.get(dotted([part for part in path if isinstance(part, str)]))
        if field is None or dotted(path) in self.sections:
            what = (
                f"{key} is missing." if error["type"] == "missing" else f"{key} is {cut(shown(value))}, not settings."
            )
            return what, f"Write below it: {', '.join(self.sections[key].model_fields)}."
        kind = words(field.annotation, field.metadata).replace(" | ", " or ")
        if error["type"] == "missing":
            return f"{key} is missing.", f"Write {kind}."
        quotes = " In quotes, if text is meant." if "text" in kind and not isinstance(value, (str, tuple, dict)) else ""
        return f"{key} is {cut(shown(value))}.", f"Write {kind}.{quotes}"

    def near(self, key: str) -> str:
        """Where the writer probably meant to go: the nearest key, or the same name in another section."""
        name = key.rpartition(".")[2]
        if key in self.known:  # a dotted name written as one key
            return f"Write {name} indented below `{key.rpartition('.')[0]}:`."
        moved = [one for one in self.known if one.rpartition(".")[2] == name]
        if not (close := moved or get_close_matches(key, self.known, 1, 0.6)):
            tails = {one.rpartition(".")[2]: one for one in reversed(self.known)}
            close = [tails[one] for one in get_close_matches(name, tails, 1, 0.7)]
        return f"Did you mean {close[0]}?" if close else "`sft explain` lists every setting."


def dotted(path: Sequence[str | int]) -> str:
    """`("formats", "train", 1)` as `formats.train[1]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def cut(text: str, most: int = 60) -> str:
    """At most so many characters, for a line of the terminal."""
    return text if len(text) <= most else text[: most - 3] + "..."
