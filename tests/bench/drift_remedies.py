"""What keeps a base's knowledge while it learns: remedies side by side, each read where its training loss is the same.

    .venv/bin/python tests/bench/drift_remedies.py [RECIPE] [FOLDER] [key=value ...]

By default `recipes/quickstart.yaml`, a look every two epochs. Upper layers alone are among them: what their speed costs
in quality. The loss to meet is the highest of the lowest ones that the remedies reach, so that all pass it; figures
there lie on a straight line between the two looks around it. Held-out: nats per token at the best temperature, against
the base. Echo: 8-word windows of trained answers in excess. Kept: gain in each held-out format as a share of the mean
gain in trained ones. Runs are kept in FOLDER if one is named.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

from rich.console import Console

from finetune import forgotten, night, opened, orders, plan, prompts, runs, tables, world
from finetune.batches import Epochs, Item
from finetune.masks import encode
from finetune.opened import Opened
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.screen import Screen

ROOT = Path(__file__).resolve().parents[2]
Row = Mapping[str, Any]
Change = Callable[[Plan], Plan]


def unchanged(made: Plan) -> Plan:
    """As planned."""
    return made


def asked_otherwise(made: Plan) -> Plan:
    """Every second epoch an example with a twin is trained under the twin's question. No recipe can say this."""
    twins, wardrobe = made.split.twins, made.texts.wardrobe

    def worn(epoch: int, example: str) -> Sequence[str]:
        names = wardrobe.worn(epoch, example)
        return [f"twin:{name}" for name in names] if epoch % 2 and example in twins else names

    def item(example: str, name: str) -> Item:
        if not name.startswith("twin:"):
            return wardrobe.item(example, name)
        one, format_ = made.conversations[example].asked(twins[example]), made.formats[name.removeprefix("twin:")]
        tokens = encode(prompts.render(one, format_, made.vocabulary), made.vocabulary)
        return Item(example, "", tokens.ids, tokens.trained)

    recipe = made.recipe
    epochs = Epochs(item, made.split.train, worn, recipe.seed, recipe.shuffle, recipe.batch_size)
    return replace(made, epochs=epochs)


def remedies(text: Path) -> Iterator[tuple[str, list[str], Change]]:
    """(name, settings, change of the plan). `text`: general text of the base's own kind."""
    yield "none", [], unchanged
    for share in (0.1, 0.5):
        yield f"replay {share:.0%}", [f"data.replay={{path: {text}, share: {share}}}"], unchanged
    for share in (0.1, 0.5):
        yield f"self-replay {share:.0%}", [f"regularise.self_replay={share}"], unchanged
    yield "LoRA dropout 0.1", ["lora.dropout=0.1"], unchanged
    yield "stochastic depth 0.2", ["regularise.stochastic_depth=0.2"], unchanged
    for top in (2, 1):
        yield f"top {top} of 4 layers", [f"lora.layers={{top: {top}}}"], unchanged
    yield "goldfish 4", ["regularise.goldfish=4"], unchanged
    yield "paraphrased prompts", [], asked_otherwise


def general(folder: Path, count: int = 300) -> Path:
    """Paragraphs of pocket's world, none of them held out or measured."""
    draw = Random(11)
    rows = [" ".join(world.world().draw_text(draw) for _ in range(draw.randint(1, 3))) for _ in range(count)]
    path = folder / "general.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def trained(recipe: Path, folder: Path, sets: Sequence[str], change: Change) -> Opened:
    """A finished run. A plan of night's own making is changed on its way: this measures what a recipe cannot say."""
    task = orders.read(orders.Order(str(folder if folder.exists() else recipe), out=None if folder.exists() else folder,
                                    sets=() if folder.exists() else tuple(sets)))  # fmt: skip
    make = plan.make
    plan.make = lambda *given, **named: change(make(*given, **named))
    try:
        night.run(task, Screen(Console(file=io.StringIO())))
    finally:
        plan.make = make
    return opened.read(folder)


Figures = Mapping[str, float | None]


def course(run: RunFolder) -> dict[int, float]:
    """Training loss at every full look."""
    rows = [row for row in runs.read_lines(run.metrics) if row["kind"] == "look" and row["split"] == "train"]
    return {row["step"]: row["nll"] for row in rows if row["step"] > 0}


def read(run: Opened, loss: float) -> Figures:
    """Where the training loss is `loss`, between the two looks around it."""
    losses = sorted(course(run.run).items(), key=lambda pair: -pair[1])
    above = next((step for step, at in reversed(losses) if at >= loss), losses[0][0])
    below = next((step for step, at in losses if at <= loss), losses[-1][0])
    one, other = at_look(run, above), at_look(run, below)
    way = (one["loss"] - loss) / (one["loss"] - other["loss"]) if one["loss"] != other["loss"] else 0.0  # type: ignore[operator]
    return {
        key: None if value is None or (to := other[key]) is None else value + way * (to - value)
        for key, value in one.items()
    }


def at_look(run: Opened, step: int) -> Figures:
    metrics = [row for row in runs.read_lines(run.run.metrics) if row["kind"] == "look" and row["split"] == "held_out"]
    at = {when: {row["format"]: row for row in metrics if row["step"] == when} for when in (0, step)}
    first = run.plan.first_format
    drift = forgotten.summary(runs.read_lines(run.run.findings), step)
    assert drift is not None
    moved = {each.axis: each.change for each in drift.moved}
    carried, kept = transfer(at, run), drift.facts
    return {
        "epoch": run.epoch(step),
        "loss": course(run.run)[step],
        "held-out": at[step][first]["nll_tstar"] - at[0][first]["nll_tstar"],
        "echo": echo(run.run, step, first),
        "median": carried and carried[0],
        "least": carried and carried[1],
        "general": found.value if (found := moved.get("general")) else None,
        "kl": found.value if (found := moved.get("kl")) else None,
        "facts": kept.kept / kept.sure if kept and kept.sure else None,
    }


def echo(run: RunFolder, step: int, first: str) -> float | None:
    """Share of 8-word windows of trained answers echoed in excess."""
    rows = [row for row in runs.read_lines(run.examples) if row["step"] == step and row["split"] == "train"]
    some = [row["windows"] for row in rows if row["format"] == first and row.get("windows")]
    total = sum(of for _, of in some)
    return sum(yes for yes, _ in some) / total if total else None


def transfer(at: Mapping[int, Mapping[str, Row]], run: Opened) -> tuple[float, float] | None:
    """Median and least over held-out formats."""
    (base, now), formats = at.values(), run.recipe.formats
    gains = {name: base[name]["bpb"] - now[name]["bpb"] for name in base if name in now}
    own = fmean(gains[name] for name in formats.train if name in gains)
    others = [gains[name] / own for name in formats.held_out if name in gains]
    return (median(others), min(others)) if others and own > 0 else None


COLUMNS: Mapping[str, tuple[str, str]] = {
    "epoch": ("epoch", ".0f"),
    "loss": ("train loss", ".3f"),
    "held-out": ("held-out", "+.3f"),
    "echo": ("echo", ".1%"),
    "median": ("kept, median", ".2f"),
    "least": ("kept, least", ".2f"),
    "general": ("general bpb", "+.3f"),
    "kl": ("KL", "+.3f"),
    "facts": ("facts kept", ".0%"),
}


def line(name: str, one: Figures) -> list[str]:
    return [name, *("-" if one[key] is None else format(one[key], how) for key, (_, how) in COLUMNS.items())]


def main(recipe: str = str(ROOT / "recipes/quickstart.yaml"), folder: str = "", *sets: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        place = Path(folder or work)
        place.mkdir(parents=True, exist_ok=True)
        text = general(place)
        done = {}
        for name, own, change in remedies(text):
            where = place / name.replace(" ", "-").replace("%", "")
            usual = ["watch.every=2", "watch.stop_at=never", "watch.budget=1.0"]
            done[name] = trained(Path(recipe), where, [*usual, *sets, *own], change)
            print(f"{name}: lowest training loss {min(course(done[name].run).values()):.3f}", flush=True)
        loss = max(min(course(run.run).values()) for run in done.values())
        head = ["remedy", *(title for title, _ in COLUMNS.values())]
        rows = [head, *(line(name, read(run, loss)) for name, run in done.items())]
        print(f"\nat training loss {loss:.3f} nats per token")
        print("\n".join(tables.columns(rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
