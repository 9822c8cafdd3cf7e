"""Rendered text to token ids, with a mask of what is trained: exactly the ids a client's prompt gets, then the answer.

Text is cut at the vocabulary's real special tokens and where the last answer begins, nowhere else, and only the very
first piece gets the word mark some tokenizers put before a text. No torch, no transformers; nothing is truncated,
padded or packed, and no special token is recognised in a writer's words.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finetune.errors import refuse
from finetune.format import Rendered, Stretch

# Some vocabularies flag their turn marks as ordinary added tokens; no writer's text may become one either.
_LOOKS_SPECIAL = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)


@dataclass(frozen=True)
class Mark:
    """A special token of a vocabulary; `left` and `right`: it swallows the white space on that side."""

    id: int
    left: bool = False
    right: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """What a base's tokenizer offers. Picklable; satisfies `format.Special`.

    `tokenizer` is the base's, without truncation, padding, post-processor or word mark; `lead` says when a text's first
    piece gets one: never (""), `always`, or `unless_space`.
    """

    tokenizer: Tokenizer
    bos: str | None
    eos: str | None
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    lead: str = ""
    marks: Mapping[str, Mark] = field(default_factory=dict)

    @property
    def bos_id(self) -> int | None:
        """What begins every text, if the base has it."""
        return None if self.bos is None else self.marks[self.bos].id

    @property
    def eos_id(self) -> int | None:
        """What ends a document, if the base has it."""
        return None if self.eos is None else self.marks[self.eos].id

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | dict[str, Any],
        bos: str | None = None,
        eos: str | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> Vocabulary:
        """From a tokenizer or its JSON state. A `bos` or `eos` that the vocabulary lacks counts as none."""
        state = tokenizer if isinstance(tokenizer, dict) else json.loads(tokenizer.to_str())
        lead = _strip(state)
        plain = Tokenizer.from_str(json.dumps(state))
        named = {**(special_tokens or {}), **{k: v for k, v in (("bos_token", bos), ("eos_token", eos)) if v}}
        marks = {
            one["content"]: Mark(one["id"], one["lstrip"], one["rstrip"])
            for one in state["added_tokens"]
            if one["special"]
        }
        for text in named.values():
            if text not in marks and (known := plain.token_to_id(text)) is not None:
                marks[text] = Mark(known)
        bos, eos = (text if text in marks else None for text in (bos, eos))
        return cls(plain, bos, eos, chat_template, named, lead, marks)

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """From a folder's tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise _no_tokenizer(folder)
        config = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
        named = {key: text for key in config if key.endswith("_token") and (text := _said(config[key]))}
        state = _json(path)
        bos = named.get("bos_token")
        spoken = bos if bos and _begins(state, bos, named.get("eos_token"), config.get("add_bos_token")) else None
        try:
            return cls.of(state, spoken, named.get("eos_token"), _template(folder, config), named)
        except Exception as error:  # the tokenizers library raises nothing narrower
            raise refuse(f"this is not a tokenizer: {error}.", "Fetch the base again.", path) from None


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it. All three tuples have one entry a token, BOS included.

    `trained`: in the loss, as a label. `places`: characters of the rendered text, (0, 0) for BOS. `prompt`: tokens
    before the last answer. `answers`: in tokens, `[start, end)` the lead and the words, `[end, stop)` what ends it.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    places: tuple[tuple[int, int], ...]
    prompt: int
    answers: tuple[Stretch, ...]

    @property
    def supervised(self) -> int:
        """How many tokens are in the loss."""
        return sum(self.trained)


def encode(rendered: Rendered, vocabulary: Vocabulary) -> Tokens:
    """The ids of a rendered text, one BOS first if the base has one: the format's own where it writes that itself."""
    text, cut = rendered.text, rendered.prompt
    marks = list(_marks(rendered, vocabulary))
    begun = bool(marks) and marks[0][:2] == (vocabulary.bos_id, 0)
    rows = [] if vocabulary.bos_id is None or begun else [(vocabulary.bos_id, 0, 0)]
    opening = len(rows)
    rows += _piecewise(text, 0, cut, marks, vocabulary)
    prompt = len(rows)
    rows += _piecewise(text, cut, len(text), marks, vocabulary)
    places = tuple((start, stop) for _, start, stop in rows)
    found = tuple(_in_tokens(one, places, opening) for one in rendered.answers)
    trained = [False] * len(rows)
    for one in found:
        if one.trained:
            trained[one.start : one.stop] = [True] * (one.stop - one.start)
    return Tokens(tuple(row[0] for row in rows), tuple(trained), places, prompt, found)


Row = tuple[int, int, int]  # id, first character, character after the last


def _in_tokens(one: Stretch, places: tuple[tuple[int, int], ...], opening: int) -> Stretch:
    """A token belongs to an answer if it begins there, to its ending if it holds the first character of that."""
    start = bisect_left(places, one.start, lo=opening, key=lambda place: place[0])
    stop = bisect_left(places, one.stop, lo=opening, key=lambda place: place[0])
    end = next((i for i in range(start, stop) if places[i][1] > one.end), stop)
    return Stretch(start, end, stop, one.trained)


def _marks(rendered: Rendered, vocabulary: Vocabulary) -> Iterator[Row]:
    """Where the scaffold names a special token of the vocabulary; writers' words are not looked at."""
    names = sorted(vocabulary.marks, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) if names else "(?!)")
    at, scaffold = 0, ""
    for segment in (*rendered.segments, None):
        if segment is not None and not segment.is_content:
            scaffold += segment.text
            continue
        for found in pattern.finditer(scaffold):
            yield vocabulary.marks[found.group()].id, at + found.start(), at + found.end()
        at += len(scaffold) + (len(segment.text) if segment else 0)
        scaffold = ""


def _piecewise(text: str, start: int, stop: int, marks: list[Row], vocabulary: Vocabulary) -> list[Row]:
    """The tokens of `text[start:stop]`: what lies between two special tokens is tokenized as one string."""
    rows: list[Row] = []
    at = start
    for id, first, after in (row for row in marks if start <= row[1] < stop):
        mark = vocabulary.marks[text[first:after]]
        left = len(text[at:first].rstrip()) + at if mark.left else first
        rows += _one_string(text, at, left, vocabulary)
        at = stop - len(text[after:stop].lstrip()) if mark.right else after
        rows.append((id, left, at))
    return rows + _one_string(text, at, stop, vocabulary)


def _one_string(text: str, start: int, stop: int, vocabulary: Vocabulary) -> list[Row]:
    piece = text[start:stop]
    if not piece:
        return []
    marked = start == 0 and (vocabulary.lead == "always" or (vocabulary.lead == "unless_space" and piece[0] != " "))
    vocabulary.tokenizer.encode_special_tokens = (
        True  # special tokens as plain text; lost when pickled, so set each time
    )
    found = vocabulary.tokenizer.encode(" " + piece if marked else piece, add_special_tokens=False)
    shift = start - marked
    rows = [(id, a + shift, b + shift) for id, (a, b) in zip(found.ids, found.offsets, strict=True)]
    return [(id, max(a, start), b) for id, a, b in rows] if marked else rows


def _strip(state: dict[str, Any]) -> str:
    """Take out of a tokenizer's JSON what would act on every piece; returns `Vocabulary.lead`."""
    state.update(truncation=None, padding=None, post_processor=None)
    for token in state["added_tokens"]:
        token["special"] |= bool(_LOOKS_SPECIAL.fullmatch(token["content"]))
    lead = ""
    for step in _steps(state, "normalizer", "normalizers"):
        if step["type"] == "Prepend":
            lead = "always"
    for step in _steps(state, "pre_tokenizer", "pretokenizers"):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            step["prepend_scheme"], lead = "never", "unless_space"
        if step["type"] == "ByteLevel" and step["add_prefix_space"]:
            step["add_prefix_space"], lead = False, "unless_space"
    if lead == "always":
        kept = [step for step in _steps(state, "normalizer", "normalizers") if step["type"] != "Prepend"]
        state["normalizer"] = {"type": "Sequence", "normalizers": kept}
    return lead


def _steps(state: dict[str, Any], part: str, many: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, be it one, several or none."""
    step = state[part]
    return [] if step is None else step[many] if step["type"] == "Sequence" else [step]


def _begins(state: dict[str, Any], bos: str, eos: str | None, asked: bool | None) -> bool:
    """Whether texts of this base begin with its BOS: as its config says; else not where that is only its EOS again."""
    return asked if asked is not None else bos != eos or json.dumps(bos) in json.dumps(state.get("post_processor"))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise refuse(f"this is not JSON: {error}.", "Fetch the base again.", path) from None
    return said if isinstance(said, dict) else {}


def _said(token: Any) -> str | None:
    """A token in a config: a string, or a mapping with `content`."""
    said = token.get("content") if isinstance(token, dict) else token
    return said if isinstance(said, str) and said else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """The base's chat template: a file of its own, or in the config, alone or as the one called `default`."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    said = _json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(said, list):
        said = {one["name"]: one["template"] for one in said}.get("default")
    return said if isinstance(said, str) else None


def _no_tokenizer(folder: Path) -> Exception:
    if not folder.is_dir():
        return refuse("there is no such folder.", "Name the folder of a base.", folder)
    old = [name for name in ("tokenizer.model", "tekken.json", "spiece.model") if (folder / name).is_file()]
    what = f"there is {old[0]} but no tokenizer.json." if old else "there is no tokenizer.json."
    remedy = "Write one: load the folder with transformers' AutoTokenizer and call save_pretrained on the same folder."
    return refuse(what, remedy if old else "Is this the folder of a base?", folder)
