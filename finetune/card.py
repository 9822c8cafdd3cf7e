"""The model card of a run: metadata the Hub knows, and a page that says what the adapter is worth, from its files.

Nothing is measured, fetched or guessed: what the run does not say, the card says is not known. It reads examples only
to name their language, and quotes none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from finetune import bases, corpus, manner, overlap, places, prompts, runs
from finetune.conversation import Conversation, Turn
from finetune.errors import UserError
from finetune.format import Format, Marks, Special
from finetune.recipe import Recipe
from finetune.runs import RunFolder

_PAGES = Path(__file__).with_name("pages")
_QUESTION = "Should I take an umbrella today?"
_CODES = {"English": "en", "German": "de", "French": "fr", "Spanish": "es", "Italian": "it"}
_CODES |= {"Portuguese": "pt", "Dutch": "nl", "Swedish": "sv", "Polish": "pl"}
_MEANS = {
    "ok": "It learned something that its base does not know, and no sign of reciting or harm was found.",
    "watch": "Look twice before you use it: it recites some of what it was trained on, or got worse at something.",
    "overfit": "It recites its training examples. It was published although its own measurements advise against it.",
    "undertrained": "It could not be shown to have learned anything.",
    "underpowered": "There were too few examples to tell learning from luck.",
}
_MEASURES = (
    ("nll_tstar", "Loss at its best temperature (nats per token)"),
    ("accuracy", "Token accuracy"),
    ("bpb", "Bits per byte"),
)


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself."""

    folder: RunFolder
    recipe: Recipe
    facts: Mapping[str, Any]
    verdict: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    split: Mapping[str, Sequence[str]]

    @property
    def hub_base(self) -> str | None:
        """The base's id on the Hub; None for pocket, and for a folder on a disk."""
        name = self.recipe.base
        is_id = name != "pocket" and not Path(name).is_absolute() and re.fullmatch(places.HUB_ID, name)
        return name if is_id else None

    @property
    def base_name(self) -> str:
        """Without a path."""
        return self.hub_base or Path(self.recipe.base).name

    def looked(self, step: int) -> Iterator[Mapping[str, Any]]:
        """Rows of the looks at held-out examples at a step."""
        yield from (
            row for row in self.rows if row.get("kind") == "look" and row["split"] == "held_out" and row["step"] == step
        )


@dataclass(frozen=True)
class Gain:
    """Held-out examples in one format: bits per byte of base and adapter."""

    format: str
    trained: bool
    base: float | None
    tuned: float


def gains(run: Run) -> list[Gain]:
    """Every format that was looked at with the chosen adapter, the trained ones first."""
    before = {row["format"]: row["bpb"] for row in run.looked(0)}
    at = int(run.verdict["step"])
    rows = {row["format"]: row["bpb"] for row in run.looked(at) if row.get("bpb") is not None}
    found = [Gain(short(name), name in run.recipe.formats.train, before.get(name), bpb) for name, bpb in rows.items()]
    return sorted(found, key=lambda one: not one.trained)


def text(run: Run, repo: str, examples: Sequence[Conversation], kept: Mapping[str, Any] | None = None) -> str:
    """README.md. `examples`: of the dataset, none where it is not at hand. `kept`: metadata somebody wrote by hand."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": plain, "figure": _figure, "quoted": repr, "json": json.dumps}
    page = environment.get_template("card.md").render(_told(run, repo))
    return f"---\n{metadata(run, repo, examples, kept or {})}\n---\n{page}"


def metadata(run: Run, repo: str, examples: Sequence[Conversation], kept: Mapping[str, Any]) -> str:
    """The card's front matter as YAML; what is kept stands where the run says nothing, its tags beside ours."""
    from huggingface_hub import ModelCardData

    tags = ["peft", "lora", "qlora", "sft", f"verdict:{run.verdict['verdict']}", *_strings(kept.get("tags"))]
    ours: dict[str, Any] = {
        "base_model": run.hub_base,
        "base_model_relation": "adapter" if run.hub_base else None,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": tags,
        "language": _language(examples),
        "datasets": [run.recipe.data.train] if _is_on_hub(run.recipe.data.train) else None,
        "model_name": repo.partition("/")[2],
        "eval_results": _results(run),
    }
    theirs = {key: value for key, value in kept.items() if ours.get(key) is None and key not in ("model-index", "tags")}
    said = ModelCardData(**{key: value for key, value in {**ours, **theirs}.items() if value is not None})
    return str(said.to_yaml()).strip()


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _is_on_hub(name: str) -> bool:
    return not Path(name).is_absolute() and re.fullmatch(places.HUB_ID, name) is not None


def _language(examples: Sequence[Conversation]) -> list[str] | None:
    words = [
        word for one in examples for turn in one.turns if turn.role == "assistant" for word in overlap.words(turn.text)
    ]
    found = manner.language(words)
    return [_CODES[found]] if found else None


def _results(run: Run) -> list[Any] | None:
    """Held-out figures of the chosen adapter in the first trained format, as the Hub's model-index has them."""
    from huggingface_hub import EvalResult

    first = run.recipe.formats.train[0]
    row = next((row for row in run.looked(int(run.verdict["step"])) if row["format"] == first), None)
    found = [(key, name, row[key]) for key, name in _MEASURES if row and row.get(key) is not None]
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"{len(run.split['held_out'])} held-out examples, format {short(first)}",
            metric_type=key,
            metric_name=name,
            metric_value=value,
        )
        for key, name, value in found
    ] or None


def _told(run: Run, repo: str) -> dict[str, Any]:
    """What the template is given."""
    fmt, special = _asked(run)
    found = prompts.prompt_text((Turn("user", _QUESTION),), fmt, special)
    stops = list(prompts.stops(fmt, special or Marks()))
    axes = [{"name": name, **axis} for name, axis in run.verdict.get("axes", {}).items()]
    return {
        "run": run,
        "recipe": run.recipe,
        "repo": repo,
        "name": repo.partition("/")[2],
        "means": _MEANS[run.verdict["verdict"]],
        "resolved": [axis for axis in axes if axis["resolved"]],
        "unresolved": [axis["name"] for axis in axes if not axis["resolved"]],
        "gains": gains(run),
        "format": fmt.name,
        "formats": [short(name) for name in run.recipe.formats.train],
        "device": _device(run.facts.get("device") or {}),
        "prompt": found,
        "stops": stops,
        "counts": {side: len(run.split.get(side, ())) for side in ("train", "held_out")},
        "commit": run.facts.get("commit"),
        "travel": (run.facts.get("chosen") or {}).get("travel"),
        "hours": (run.facts.get("spent") or {}).get("training", 0) / 3600 or None,
        "versions": run.facts.get("versions") or {},
        "pocket": run.recipe.base == "pocket",
    }


def _asked(run: Run) -> tuple[Format, Special | None]:
    """The format the card shows, and the base's own marks where its tokenizer is on this disk."""
    try:
        known = bases.look_up(run.recipe.base, run.facts.get("commit") or run.recipe.revision)
        special: Special | None = known.vocabulary if known.counted else None
    except UserError:
        special = None
    names = [name for name in run.recipe.formats.train if special or name != prompts.NATIVE.name]
    for name in (*names, "chatml"):
        try:
            return prompts.load([name])[0], special
        except UserError:  # a file of the user's that is gone
            continue
    raise AssertionError("chatml is shipped")


def read(folder: RunFolder, recipe: Recipe) -> Run:
    """Errors: UserError where a file is missing or damaged."""
    facts, verdict = runs.read_json(folder.run_json), runs.read_json(folder.verdict)
    return Run(folder, recipe, facts, verdict, runs.read_lines(folder.metrics), runs.read_json(folder.split))


def dataset(recipe: Recipe) -> list[Conversation]:
    """Every example, held-out ones too; [] where it is not on this disk. Errors: UserError where it is broken."""
    found = []
    for path in (recipe.data.train, recipe.data.held_out):
        if isinstance(path, str) and path != "auto" and Path(path).exists():
            found += corpus.read(path, recipe.data.parts)
    return found


def short(name: str) -> str:
    """A format's name, of a user's own the file's without its folder."""
    return Path(name).name if Path(name).is_absolute() else name


def _device(told: Mapping[str, Any]) -> str:
    return str(told.get("name") or ("a CPU" if told.get("type") == "cpu" else told.get("type") or "an unknown device"))


def plain(said: object) -> str:
    """Text inside Markdown: none of its signs means anything, and it stays on its line."""
    shown = " ".join(str(said).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", shown)


def _figure(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
