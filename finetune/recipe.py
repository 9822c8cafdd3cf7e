"""The recipe: one YAML file, validated. The only home of names, defaults, bounds and their one-line meaning.

`load` tells every fault at once, each with its line. It reads no dataset, opens no network, and does not know which
formats exist: a recipe can be valid and still name a format or a dataset that another room refuses.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from finetune import fields, places, yamlfile
from finetune.errors import Problem, UserError
from finetune.fields import Means, Setting
from finetune.yamlfile import Document, Key, at

MOST_EPOCHS = 100_000


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        told = {"name": fields.cut(twice[0]), "remedy": "Name it once."}
        raise PydanticCustomError("told", "names {name} twice.", told)
    return names


_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TAUGHT = ("chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role")
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
ModuleName = Annotated[str, Field(pattern=r"^\w+$"), Means("module names")]
Names = Annotated[tuple[str, ...], AfterValidator(_distinct), Means("a list of format names, or .yaml files", "format")]
Logger = Literal["tensorboard", "trackio", "wandb"]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "one_cycle", "cyclical"]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversion (`"8"` is no number), no NaN."""

    # the line below a setting is its meaning, in `sft explain` and in editors
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Top(Section):
    """Only the layers nearest the output."""

    top: Annotated[int, Field(ge=1, le=1000)]
    """How many layers, counted from the output."""


class Lora(Section):
    """The adapter: how large, and where."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Size of the adapter. More can hold more, and more by heart."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 16.0
    """The adapter's effect is scaled by alpha / rank; keep it equal to rank so that changing rank changes size only."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of adapter inputs silenced at each step: a mild brake on memorising, for the price of noise."""
    targets: Annotated[tuple[ModuleName, ...], AfterValidator(_distinct), Field(min_length=1)] = _MATRICES
    """Which matrices of a layer get an adapter. All seven teach a style best; fewer save memory."""
    layers: Literal["all"] | Top = "all"
    """Which layers get one. `{top: 8}` trains near the output only: fewer weights, and no gradient below them."""


class Replay(Section):
    """General text mixed in."""

    path: Annotated[str, Means("a path", "path")]
    """Where the general text lies: a folder or a .jsonl."""
    share: Annotated[float, Field(gt=0, le=0.9)]
    """Share of all trained-on tokens that come from it. A tenth is a common start."""


class Data(Section):
    """What is learned from, and what is kept back to see whether it was."""

    train: Annotated[str, Means("a folder of .md or .jsonl, one .jsonl, or a Hub dataset id", "dataset")]
    """The examples. Everything the model learns stands here."""
    held_out: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=0, le=0.34)] | str,
        Means("auto, a share from 0 to 0.34, or a path", "path", ("auto",)),
    ] = "auto"
    """Examples kept back to tell learning from memorising. auto: 20 %, at least 10, at most a third of all."""
    max_tokens: Annotated[int, Field(ge=16, le=131072)] = 2048
    """Longest example, in tokens. Longer ones are refused by name: cutting would lose the conclusion."""
    parts: Literal["bold", "plain"] = "bold"
    """How the headings of perspectives look in an answer: `**The cautious one**`, or plain words."""
    intended: Annotated[str | None, Means("null, or a path", "path")] = None
    """A file of spans the model may recite, one a line: a motto, a licence. They do not count as memorised."""
    replay: Replay | None = None
    """General text mixed in, so that what the base knew is not lost while it learns."""


class Formats(Section):
    """In which prompt formats the same examples are taught, and in which the result is tested."""

    train: Annotated[Names, Field(min_length=1)] = _TAUGHT
    """Formats to teach. Several unlike ones teach the answer, not the wrapping; `native` is the base's own."""
    held_out: Names = ("zephyr", "guanaco", "mistral-v1", "openchat-3.5", "xml-tags")
    """Formats never trained on. They show whether the model still answers well in a wrapping it has not seen."""
    draw: Literal["each_epoch", "fixed", "all"] = "each_epoch"
    """Which one an example wears: another each epoch, always the same, or all (which multiplies the steps)."""
    sampled: Share = 0.0
    """Share of draws that use an invented markdown-like format, so that no fixed list can be learned by heart."""


class Optimizer(Section):
    """How far and how fast the adapter moves."""

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw keeps exact state, and an adapter needs little; the 8-bit ones are for when even that is too much."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1.0e-7
    """How far a weight may move in one step. Times steps it bounds the whole way (travel): large and short recites."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Memory of AdamW for the gradient and for its square; the usual values suit nearly all runs."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1.0e-8
    """Gradients below this size stop counting. Lower it if the report says that gradients meet it."""
    schedule: Schedule = "constant"
    """How the rate changes. Only a constant one lets a finished run go further; cyclical is one cycle an epoch."""
    warmup_steps: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps over which the rate rises from zero. Needs a schedule that warms up."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pull of every weight towards zero. Off, because at a tiny learning rate it does next to nothing."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients longer than this are shortened, so that one odd example cannot throw the adapter. 0 never shortens."""


class Regularise(Section):
    """Brakes on memorising. All off: first see whether you need them."""

    stochastic_depth: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Chance that a layer is skipped in a training step, so that no single path learns an example by heart."""
    goldfish: Annotated[int, Field(ge=2)] | None = None
    """Leave about every k-th token out of the loss, so that no answer can be learned whole. null trains on all."""
    self_replay: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """Share of supervised tokens that are the base's own answers to everyday questions, written once before."""


class Keep(Section):
    """What stays on disk."""

    max_gib: Annotated[float, Field(gt=0)] = 10.0
    """Disk for checkpoints, in GiB (2^30 bytes). Older ones go first; the chosen adapter never does."""


class Watch(Section):
    """When a run looks at itself, and when it stops."""

    every: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Epochs between two looks. auto spaces them so that looking stays within the budget."""
    budget: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of wall time that looking may take. A look the budget cannot pay is skipped, and the report says so."""
    prompts: tuple[str, ...] = ()
    """Your own questions, answered at looks, so that you can read how the voice changes overnight."""
    stop_at: Literal["overfit", "watch", "never"] = "overfit"
    """Which verdict ends the run early. A stop is a result: the best adapter so far is kept."""
    keep: Keep = Keep()
    """What stays on disk."""


class Machine(Section):
    """How the work is laid out on this computer. Changes speed and memory, not what is learned."""

    micro_batch: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Examples on the GPU at once: a number dividing batch_size; auto: up to 2,048 tokens, fewer if memory is short."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Compute layers twice to save memory. auto does it for as few layers as each micro-batch needs to fit."""
    prefix_gib: Annotated[float, Field(ge=0)] = 20.0
    """Disk, in GiB, for what untrained lower layers compute, kept so that it is computed once. 0 never stores."""


class Hub(Section):
    """Where `sft push` goes when it is not told."""

    repo: Annotated[str, Field(pattern=f"^{places.HUB_ID}$"), Means("owner/name")] | None = None
    """Repository on the Hugging Face Hub. Nothing is sent before you type `sft push`."""
    private: bool = True
    """Whether a new repository is private. It is unless you say otherwise: examples may be personal."""


@dataclass(frozen=True)
class Clash:
    """Settings that are fine alone and not together; the first of `keys` is where the reader is sent."""

    keys: tuple[str, ...]
    what: str
    remedy: str


class Recipe(Section):
    """One run, completely described."""

    base: Annotated[str, Means("a Hub id, a folder, or pocket (bundled, offline)", "base", ("pocket",))]
    """The model that is taught. Start with pocket: it is tiny, needs no download and shows everything in minutes."""
    revision: str | None = None
    """Branch, tag or commit of the base on the Hub. Name a commit to get the same base again next year."""
    quantization: Literal["nf4", "int8", "none"] = "nf4"
    """How the frozen base is stored: 4 bits let a 7B fit a 12 GB card; the adapter stays fp32 in any case."""
    lora: Lora = Lora()
    """The adapter."""
    data: Data
    """What is learned from, and what is kept back to see whether it was."""
    formats: Formats = Formats()
    """The prompt formats."""
    optimizer: Optimizer = Optimizer()
    """How far and how fast the adapter moves."""
    regularise: Regularise = Regularise()
    """Brakes on memorising."""
    epochs: Annotated[int, Field(ge=1, le=MOST_EPOCHS)] = 600
    """How often every example is seen. Many small steps are the idea: epochs are cheap with a few dozen examples."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 1
    """Examples per step, over all accumulation. 1 takes the most steps, and so the longest way."""
    shuffle: Literal["each_epoch", "once", "never"] = "each_epoch"
    """Order of the examples. never lets what comes first leave the deepest mark, which makes curves easy to read."""
    watch: Watch = Watch()
    """When the run looks at itself."""
    machine: Machine = Machine()
    """How the work is laid out on this computer."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Fixes every draw: split, order, formats. Two seeds show how much of a result is luck."""
    report_to: Annotated[tuple[Logger, ...], AfterValidator(_distinct)] = ()
    """Also send the numbers to these loggers. The run folder has them all anyway."""
    hub: Hub = Hub()
    """Where `sft push` goes."""

    @model_validator(mode="after")
    def _no_clash(self) -> Self:
        if found := tuple(_clashes(self)):
            raise PydanticCustomError("clash", "{text}", {"text": found[0].what, "found": found})
        return self


def _clashes(recipe: Recipe) -> Iterator[Clash]:
    for name in recipe.formats.train:
        if name in recipe.formats.held_out:
            what = f"formats.held_out names {name}, which is also trained."
            yield Clash(("formats.held_out", "formats.train"), what, "Take it out of one of the two.")
    if recipe.formats.sampled and recipe.formats.draw == "all":
        what = f"formats.sampled is {recipe.formats.sampled:g}, which draw: all leaves no place for."
        yield Clash(("formats.sampled", "formats.draw"), what, "Write draw: each_epoch, or remove sampled.")
    steps, schedule = recipe.optimizer.warmup_steps, recipe.optimizer.schedule
    if steps and schedule in ("constant", "one_cycle", "cyclical"):
        what = f"optimizer.warmup_steps is {steps}, which the schedule {schedule} ignores."
        remedy = "Write schedule: constant_with_warmup, or remove warmup_steps."
        if schedule != "constant":
            remedy = "Remove warmup_steps: this schedule rises by itself."
        yield Clash(("optimizer.warmup_steps", "optimizer.schedule"), what, remedy)
    micro, batch = recipe.machine.micro_batch, recipe.batch_size
    if micro != "auto" and batch % micro:
        what = f"machine.micro_batch is {micro}, which does not divide batch_size {batch}."
        fits = max(one for one in range(1, min(micro, batch) + 1) if batch % one == 0)
        yield Clash(("machine.micro_batch", "batch_size"), what, f"Write {fits} or auto.")


@dataclass(frozen=True)
class Draft:
    """A file as far as it holds: settings in `left_out` were wrong or missing, and stand at some value that is not."""

    recipe: Recipe
    problems: list[Problem]
    left_out: frozenset[str]

    def sound(self) -> Recipe:
        """The recipe, if nothing is wrong with it."""
        if self.problems:
            raise UserError(self.problems)
        return self.recipe


SHAPE = fields.Shape(Recipe)
_APART: dict[str, Any] = {"held_out": (), "sampled": 0.0, "warmup_steps": 0, "micro_batch": "auto"}  # free of clashes
_FREE = ("watch", "hub", "report_to", "machine")  # going on with a run may change these


def load(path: Path | str, sets: Sequence[str] = ()) -> Recipe:
    """The recipe in a file after `--set key=value`; its paths are absolute. UserError with every fault at once."""
    return read(path, sets).sound()


def read(path: Path | str, sets: Sequence[str] = ()) -> Draft:
    """As `load`, for whoever goes on to tell what else is wrong. UserError only where the file holds no settings."""
    draft = yamlfile.read(Path(path), sets)
    places.settle(draft, SHAPE.leaves)
    return _judged(draft)


def load_resolved(path: Path | str) -> Recipe:
    """A run's own recipe.yaml, as `resolved_yaml` wrote it: what it points to may be gone by now."""
    return _judged(yamlfile.read(Path(path))).sound()


def placed(problems: Sequence[Problem], path: Path | str, sets: Sequence[str] = ()) -> list[Problem]:
    """The same problems; where one blames a key and names no file, with the file and line that key was written at."""
    document = yamlfile.read(Path(path), sets) if any(one.key and one.file is None for one in problems) else None
    found = []
    for one in problems:
        at_key = document.origin(one.key) if document and one.key and one.file is None else None
        found.append(replace(one, file=at_key.file, line=at_key.line) if at_key else one)
    return found


def resolved_yaml(recipe: Recipe) -> str:
    """Every setting written out; `load_resolved` gives back an equal recipe."""
    return yamlfile.dump(recipe.model_dump(mode="json"))


def fingerprint(recipe: Recipe) -> str:
    """sha256, in hex, over all that may not change when a run goes on."""
    kept = {key: value for key, value in _values(recipe).items() if not _may_change(key, recipe)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def changed(old: Recipe, new: Recipe) -> list[str]:
    """What differs among the settings that may not change when a run goes on: `lora.rank was 16, is 8`."""
    was, now = _values(old), _values(new)
    kept = [key for key in now if not (_may_change(key, old) and _may_change(key, new))]
    return [f"{key} was {fields.shown(was[key])}, is {fields.shown(now[key])}" for key in kept if was[key] != now[key]]


def settings() -> list[Setting]:
    """Every setting with type, default, bounds and meaning, in the order of the recipe."""
    return fields.settings(Recipe)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema()


def _values(recipe: Recipe) -> dict[str, Any]:
    data = recipe.model_dump(mode="json")
    return {key: at(data, key.split(".")) for key in SHAPE.leaves if not key.startswith("data.replay.")}


def _may_change(key: str, recipe: Recipe) -> bool:
    constant = recipe.optimizer.schedule in ("constant", "constant_with_warmup")
    return key.partition(".")[0] in _FREE or (key == "epochs" and constant)


def _judged(draft: Document) -> Draft:
    left_out: set[str] = set()
    try:
        recipe = Recipe.model_validate(draft.data)
    except ValidationError as error:
        for path, fault in _faults(error).items():
            draft.refuse(path, *SHAPE.fault(fault, at(draft.data, path)))
        recipe, clashes = _rest(draft.data, error, left_out)
        for clash in clashes:
            draft.refuse(tuple(clash.keys[0].split(".")), clash.what, clash.remedy)
    problems = sorted(draft.problems, key=lambda one: (one.line is None, one.line or 0))
    return Draft(recipe, problems, frozenset(left_out))


def _faults(error: ValidationError) -> dict[Key, ErrorDetails]:
    """One fault a key: a union complains once for each of its members."""
    faults = [fault for fault in error.errors() if fault["type"] != "clash"]
    return {SHAPE.path(fault["loc"]): fault for fault in faults}


def _rest(data: dict[str, Any], error: ValidationError, left_out: set[str]) -> tuple[Recipe, list[Clash]]:
    """What is valid alone, wrong settings left out, and what clashes in it: pydantic looks for that once all is."""
    rest, clashes = copy.deepcopy(data), []
    while True:
        for path, fault in _faults(error).items():
            left_out.add(fields.dotted(path).partition("[")[0])
            names = [part for part in path if isinstance(part, str)]  # one wrong name spoils its list,
            names = names[:-1] if fault["type"] == "missing" else names  # one missing setting its section
            if names and (section := at(rest, names[:-1])):
                section.pop(names[-1], None)
        for clash in [one for fault in error.errors() if fault["type"] == "clash" for one in fault["ctx"]["found"]]:
            clashes += [] if left_out.intersection(clash.keys) else [clash]
            section, _, name = clash.keys[0].rpartition(".")
            at(rest, section.split(".") if section else ())[name] = _APART[name]
        rest = {"base": "pocket"} | rest
        rest["data"] = {"train": "."} | rest.get("data", {})
        try:
            return Recipe.model_validate(rest), clashes
        except ValidationError as again:
            error = again
