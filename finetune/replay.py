"""General text mixed in, so that what the base knew is not lost: files to token ids. It cuts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from finetune.batches import Item
from finetune.errors import Problem
from finetune.masks import Vocabulary
from finetune.recipe import Recipe, Replay


def replayed(wanted: Replay | None, limit: int, vocabulary: Vocabulary, problems: list[Problem]) -> Iterator[Item]:
    """.txt files whole, rows of .jsonl with `text`; all tokens but the first are in the loss. Adds to `problems`."""
    if wanted is None:
        return
    path = Path(wanted.path)
    files = sorted((*path.glob("*.txt"), *path.glob("*.jsonl"))) if path.is_dir() else [path]
    for file in files:
        for line, text in _texts(file, problems):
            ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
            ids = [*_some(vocabulary.bos_id), *ids, *_some(vocabulary.eos_id)]
            if len(ids) > limit:
                what = f"a replayed text has {len(ids)} tokens, more than data.max_tokens {limit}."
                problems.append(Problem(what, "Split it in two.", file, line))
            trained = (False, *(True,) * (len(ids) - 1))  # the first token is given, never foretold
            yield Item(f"{file.name}:{line}", "", tuple(ids), trained)
    if not files:
        problems.append(Problem("data.replay.path holds no .txt or .jsonl.", "Put general text there.", path))


def one_kind(wanted: Recipe) -> Iterator[Problem]:
    """Text of two kinds mixed in at once would share one share."""
    if wanted.data.replay is not None and wanted.regularise.self_replay:
        what = "data.replay and regularise.self_replay both mix text in."
        yield Problem(what, "Choose one of them.", key=("regularise", "self_replay"))


def unwritten(wanted: Recipe) -> Iterator[Problem]:
    """What a plan without a model cannot count."""
    if share := wanted.regularise.self_replay:
        more = f"about {1 / (1 - share):.2g} times as many as counted here"
        what = f"regularise.self_replay: the base writes its answers first; with them steps are {more}."
        yield Problem(what, "`sft train` counts them.", key=("regularise", "self_replay"))


def _some(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _texts(file: Path, problems: list[Problem]) -> Iterator[tuple[int, str]]:
    try:
        whole = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        problems.append(Problem(f"cannot be read ({type(fault).__name__}).", "It must be UTF-8 text.", file))
        return
    if file.suffix != ".jsonl":
        yield from [(1, whole)] if whole.strip() else []
        return
    for line, row in enumerate(whole.split("\n"), start=1):  # splitlines would also cut at U+2028, inside a text
        try:
            text = json.loads(row)["text"] if row.strip() else ""
        except (ValueError, TypeError, KeyError):
            text = None
        if not isinstance(text, str):
            problems.append(Problem("this is no row with `text`.", 'Write {"text": "..."}.', file, line))
        elif text.strip():
            yield line, text
