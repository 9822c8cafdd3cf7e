"""The shelf of format files: which there are, and how one is read, the user's own included.

Every fault of a file is told with its line and a remedy. Nothing is rendered here, and no format is guessed from a
name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from finetune import yamlfile
from finetune.errors import UserError
from finetune.format import Format

SHELF = Path(__file__).parent / "formats"


def shipped() -> tuple[str, ...]:
    """The names of all formats on the shelf, in alphabetical order. `native` is not among them."""
    return tuple(sorted(path.stem for path in SHELF.glob("*.yaml")))


@lru_cache(maxsize=1)
def aliases() -> dict[str, str]:
    """Other names of shipped formats, in lower case, and the shipped name."""
    return {alias.casefold(): name for name in shipped() for alias in read(SHELF / f"{name}.yaml").aliases}


@lru_cache(maxsize=256)
def read(path: Path) -> Format:
    """One format file. UserError with a line and a remedy for every fault."""
    document = yamlfile.read(path)
    try:
        fmt = Format(**_Shape.model_validate(document.data).model_dump())
    except ValidationError as error:
        told = [(_key(one), *_fault(one)) for one in error.errors()]
    else:
        told = list(nonsense(fmt))
    for key, what, remedy in told:
        document.refuse((key,), what, remedy)
    if document.problems:
        raise UserError(document.problems)
    return fmt


def _shape() -> type[BaseModel]:
    """The model of a format file is the dataclass itself: one list of keys."""
    kinds = get_type_hints(Format)
    keys: dict[str, Any] = {
        one.name: (kinds[one.name], ... if one.default is MISSING else one.default) for one in fields(Format)
    }
    return create_model("FormatFile", __config__=ConfigDict(extra="forbid"), **keys)


_Shape = _shape()


def _key(error: ErrorDetails) -> str:
    return str(error["loc"][0]) if error["loc"] else ""


def _fault(error: ErrorDetails) -> tuple[str, str]:
    key, known = _key(error), list(_Shape.model_fields)
    if error["type"] == "extra_forbidden":
        near = get_close_matches(key, known, 1, 0.6)
        remedy = f"Did you mean {near[0]}?" if near else f"A format has: {', '.join(known)}."
        return f"{key} is not part of a format.", remedy
    if error["type"] == "missing":
        return f"{key} is missing.", 'Write it as a quoted string; "" where the format has nothing there.'
    return f"{key} is {json.dumps(error['input'], default=str)[:60]}: {error['msg'].lower()}.", "Put text in quotes."


def nonsense(fmt: Format) -> Iterator[tuple[str, str, str]]:
    """(key, what, remedy) where the strings contradict each other."""
    if not fmt.assistant_prefix.startswith(fmt.generation_prompt):
        what = f"generation_prompt {fmt.generation_prompt!r} does not begin assistant_prefix."
        yield "generation_prompt", what, "History shows what was sent: let assistant_prefix begin with it."
    if fmt.end not in fmt.assistant_suffix:
        what = f"end {fmt.end!r} is not in assistant_suffix."
        yield "end", what, 'Write the mark as it stands there, or "" to end answers with the base\'s EOS.'
    if not fmt.name or set("/~:") & set(fmt.name):  # `:` and `~` name what the grammar makes
        yield "name", f"{fmt.name!r} is no name for a format.", "Use letters, digits and dashes."
