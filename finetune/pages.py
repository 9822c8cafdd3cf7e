"""Templates to one self-contained page: everything escaped, one script and one style sheet, each allowed by its hash.

Dataset text and a model's answers are hostile input: they enter through autoescape or as JSON that no browser runs. It
knows nothing of runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from finetune.plots import Picture

_FOLDER = Path(__file__).with_name("pages")
_HARMFUL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
NONE = "–"


def render(template: str, about: Mapping[str, Any], pictures: Iterable[Picture] = ()) -> str:
    """A page of a template in pages/. `pictures`: those it shows, for the styles that they need."""
    rules = {name: style for one in pictures for name, style in one.rules.items()}
    style = _text("style.css") + "".join(f".{name}{{{rule}}}" for name, rule in sorted(rules.items()))
    script = _text("page.js")
    given = {"style": Markup(style), "script": Markup(script), "policy": _policy(style, script), **about}
    return _environment().get_template(template).render(given)


def _policy(style: str, script: str) -> str:
    """Nothing from anywhere, but this very script and this very style sheet."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    filters = {
        "plain": plain,
        "number": number,
        "signed": signed,
        "percent": percent,
        "small": small,
        "duration": duration,
    }
    found.filters.update({**filters, "svg": _svg, "code": code, "packed": packed})
    return found


def _shown(value: Any) -> Any:
    """What cannot be seen, or turns the reading direction, is made visible; None is never printed."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return harmless(value)
    return NONE if value is None else value


def harmless(text: str) -> str:
    """Control characters, lone surrogates and direction marks as escapes."""
    return _HARMFUL.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def packed(value: Any) -> Markup:
    """JSON for a `<script type="application/json">`: no sign in it can end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(_HARMFUL.sub(lambda found: f"\\u{ord(found.group()):04x}", text))


def _svg(picture: Picture) -> Markup:
    return Markup(picture.svg)


def code(text: str) -> Markup:
    """Escaped, with what stands between backticks as code."""
    parts = harmless(text).split("`")
    told = (Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))
    return Markup("").join(told)


# numbers


def number(value: float | None, digits: int = 3) -> str:
    """With so many decimals; what was not measured is a dash, never 0."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.{digits}f}".replace("-", "−")


def plain(value: float | None) -> str:
    """Epochs: 12 or 12.5."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.6g}"


def signed(value: float | None, digits: int = 3) -> str:
    """With its sign."""
    return NONE if value is None or not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 0) -> str:
    """A share."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f} %".replace("-", "−")


def small(value: float | None) -> str:
    """Travel and learning rates: 1.2e-05."""
    return NONE if value is None or not math.isfinite(value) else f"{value:.2g}"


def duration(seconds: float | None) -> str:
    """In the unit a person would use."""
    if seconds is None or not math.isfinite(seconds):
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
