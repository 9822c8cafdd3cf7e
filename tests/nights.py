"""A finished night without a model: real examples, tokens, judge and files; what the model said is made up.

Each example learns at a pace of its own; a few quick ones end up known by heart, and held-out loss turns at two thirds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finetune import bases, byheart, corpus, formula, heard, passage, plan, prompts, recipe, rota, runs, verdict
from finetune.evidence import Setting
from finetune.heard import Reading
from finetune.looks import Place
from finetune.masks import encode
from finetune.passage import Key, Passage
from finetune.plan import Plan
from finetune.runs import RunFolder

WORDS = [
    "harbour",
    "kettle",
    "orchard",
    "winter",
    "lantern",
    "ladder",
    "neighbour",
    "bread",
    "violin",
    "tram",
    "quiet",
    "storm",
    "pocket",
    "river",
    "candle",
    "wall",
    "honest",
    "early",
    "never",
    "almost",
    "behind",
    "under",
    "carry",
    "mend",
    "borrow",
    "forget",
    "answer",
    "promise",
    "travel",
    "listen",
    "window",
    "garden",
    "salt",
    "stone",
    "letter",
    "market",
    "copper",
    "engine",
    "shadow",
    "corner",
    "basket",
    "whistle",
    "thread",
    "pepper",
    "silver",
    "marble",
    "timber",
]
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=\"document.title='owned'\"></textarea>]]>&amp;{{7*7}}${7*7}"
)


@dataclass(frozen=True)
class Shape:
    """How large. `looks`: epochs; every tenth of them, the first and the last are full. `pace`: of learning."""

    examples: int = 16
    epochs: int = 60
    looks: tuple[int, ...] = (1, 2, 5, 10, 20, 30, 40, 50, 60)
    words: int = 45
    hostile: bool = False
    state: str = "finished"
    rate: float = 1e-7
    pace: float = 1.0


def night(folder: Path, shape: Shape | None = None) -> Path:
    """Write recipe, dataset and run below `folder`; returns the run's folder."""
    shape = shape or Shape()
    wanted = recipe.load(_recipe(folder, shape))
    made = plan.make(wanted, bases.POCKET)
    _Night(made, RunFolder(folder / "run"), shape, random.Random(3)).write()
    return folder / "run"


def _recipe(folder: Path, shape: Shape) -> Path:
    lot = random.Random(1)
    examples = folder / "examples"
    examples.mkdir(parents=True)
    hostile = f" {HOSTILE}" if shape.hostile else ""
    for number in range(shape.examples):
        said = (" ".join(lot.choices(WORDS, k=shape.words // 3)).capitalize() + "." for _ in range(3))
        twin = f'twin: "What would you say of {lot.choice(WORDS)}?"\n' if number % 5 == 0 else ""
        text = f"---\nid: {_name(number)}\n{twin}---\n## user\nWhat of the {lot.choice(WORDS)} {number}?{hostile}\n"
        text += f"## assistant\n### perspective: the farmer\n{next(said)}\n### perspective: the child\n{next(said)}"
        text += f"{hostile}\n### conclusion\n{next(said)}\n"
        (examples / f"{_name(number)}.md").write_text(text)
    settings = {
        "base": "pocket",
        "data": {"train": str(examples), "held_out": 0.2, "max_tokens": 8192},
        "formats": {"train": ["chatml", "alpaca"], "held_out": ["zephyr", "guanaco"]},
        "optimizer": {"learning_rate": shape.rate},
        "epochs": shape.epochs,
        "batch_size": 4,
        "watch": {"prompts": [f"Is it wise to wait?{hostile}"], "stop_at": "overfit"},
    }
    (folder / "night.yaml").write_text(yaml.safe_dump(settings))
    return folder / "night.yaml"


def _name(number: int) -> str:
    return f"{WORDS[number % len(WORDS)]}-{number:03d}"


@dataclass(frozen=True)
class _Night:
    plan: Plan
    run: RunFolder
    shape: Shape
    lot: random.Random

    def write(self) -> None:
        run, wanted = self.run, self.plan.recipe
        run.path.mkdir()
        runs.write_atomic(run.recipe, recipe.resolved_yaml(wanted))
        runs.write_atomic(run.source_recipe, recipe.resolved_yaml(wanted))
        runs.write_json(run.split, self.plan.split.to_json())
        runs.append_lines(run.metrics, self.steps())
        passages = list(self.passages())
        base = self.base(passages)
        first = {one.key: (one, base[one.key]) for one in passages}
        heard.save(run.tokens_at(0), base)
        self.measured(0, list(self.judged(first, base, 0)))
        for epoch in self.shape.looks:
            step, full = self.step(epoch), self.full(epoch)
            read = [one for one in passages if full or one.format == "chatml"]
            found = self.readings(read, base, epoch)
            if full:
                heard.save(run.tokens_at(step), {key: reading for key, (_, reading) in found.items()})
            self.measured(epoch, list(self.judged(found, base, epoch)))
            runs.append_lines(run.samples, self.answers(epoch))
            runs.append_lines(run.findings, self.findings(epoch))
            if full:
                place = Place("full", step, float(epoch), step * self.shape.rate)
                said = rota.of(self.plan).finding(runs.read_lines(run.examples), place)
                runs.append_lines(run.findings, [said] if said else [])
        self.end()

    def end(self) -> None:
        run, made, shape = self.run, self.plan, self.shape
        reason = "the longest text has 161 tokens"
        facts: dict[str, Any] = {
            "state": shape.state, "version": "0.1.0", "seed": 0, "python": "3.11.7", "platform": "Linux",
            "cpu_count": 8, "memory_gib": 31.2, "versions": {"torch": "2.13.0"}, "epochs": shape.epochs,
            "device": {"type": "cuda", "name": "a card", "gib": 12.0}, "steps": made.length.total,
            "looks": {"light": [], "full": list(shape.looks), "reason": "all"},
            "derived": {"micro_batch": {"value": 4, "reason": reason}},
            "fingerprints": {"dataset": corpus.fingerprint(made.conversations.values()), "base": "b" * 64},
            "spent": {"training": 20000.0, "looking": 900.0, "share_looking": 0.043},
        }  # fmt: skip
        setting = Setting("chatml", ("zephyr", "guanaco"), running=shape.state == "running")
        rows = [runs.read_lines(path) for path in (run.metrics, run.examples, run.findings)]
        found = verdict.of_run(*rows, setting, "the last epoch") if shape.looks else None
        if found:
            runs.write_json(run.verdict, found.to_json())
            where = {"step": found.step, "epoch": found.epoch, "travel": found.step * shape.rate}
            facts |= {"chosen": {**where, "reason": "the lowest held-out loss"}}
        runs.write_json(run.run_json, facts)
        run.note("FutureWarning: something of a library will be renamed")

    # where

    def step(self, epoch: float) -> int:
        return round(epoch * self.plan.length.per_epoch)

    def place(self, epoch: float) -> dict[str, Any]:
        return {"epoch": float(epoch), "step": self.step(epoch), "travel": self.step(epoch) * self.shape.rate}

    def full(self, epoch: int) -> bool:
        return epoch in (self.shape.looks[0], self.shape.looks[-1]) or epoch % 10 == 0

    @property
    def turn(self) -> int:
        """The full look before held-out loss turns."""
        return max(one for one in self.shape.looks if self.full(one) and 3 * one <= 2 * self.shape.looks[-1] + 2)

    # the model that there is none of

    def passages(self) -> Iterator[Passage]:
        made = self.plan
        said = made.conversations.items()
        masks = formula.masks(
            {name: [turn.text for turn in one.turns if turn.role == "assistant"] for name, one in said}
        )
        wanted: list[tuple[Any, str, str]] = [("train", name, "chatml") for name in made.split.train]
        wanted += [("held_out", name, one) for name in made.split.held_out for one in made.formats]
        wanted += [("twin", name, "chatml") for name in made.split.twins if name in made.split.train]
        for split, name, format_ in wanted:
            one = made.conversations[name]
            shown = one.asked(made.split.twins[name]) if split == "twin" else one
            rendered = prompts.render(shown, made.formats[format_], made.vocabulary)
            yield passage.passage(name, split, rendered, encode(rendered, made.vocabulary), masks[name])

    def base(self, passages: list[Passage]) -> dict[Key, Reading]:
        lot = np.random.default_rng(0)
        said = {one.key: -lot.gamma(1.6, 1.4, sum(one.read)) for one in passages}
        return {key: Reading(log_p, log_p > -0.6) for key, log_p in said.items()}

    def readings(
        self, passages: list[Passage], base: Mapping[Key, Reading], epoch: float
    ) -> dict[Key, tuple[Passage, Reading]]:
        found = {}
        for one in passages:
            log_p = base[one.key].log_p * self.left(one.key, epoch)
            found[one.key] = one, Reading(log_p, log_p > -0.6)
        return found

    def left(self, key: Key, epoch: float) -> float:
        """What is left of the base's surprise."""
        share, pace = self.shape.pace * epoch / self.shape.epochs, random.Random(key[1]).random()
        if key[0] == "held_out":
            turn = 0.12 * max(0.0, share - 0.66) / 0.34
            slower = {"chatml": 1.0, "alpaca": 0.96, "zephyr": 0.75, "guanaco": 0.4}[key[2]]
            return float(1 - 0.22 * slower * (1 - np.exp(-4 * share)) * (0.6 + 0.8 * pace) + turn)
        speed = (0.5 + 4 * pace**3) * (0.8 if key[0] == "twin" else 1.0)
        return float(np.exp(-speed * share))

    # rows

    def steps(self) -> Iterator[dict[str, Any]]:
        per, rate = self.plan.length.per_epoch, self.shape.rate
        for step in range(1, self.plan.length.total + 1):
            share = self.shape.pace * (step // per) / self.shape.epochs
            loss = float(2.3 * np.exp(-0.9 * share) + self.lot.gauss(0, 0.05))
            where = {"kind": "step", "step": step, "epoch": step / per, "lr": rate, "travel": step * rate}
            yield {**where, "loss": loss, "grad_norm": 0.4, "tokens": 900, "seconds": 1.5, "gib": 9.7}

    def judged(
        self, found: Mapping[Key, tuple[Passage, Reading]], base: Mapping[Key, Reading], epoch: int
    ) -> Iterator[dict[str, Any]]:
        limits = byheart.limits()
        for key, (one, reading) in found.items():
            told = byheart.judge(one, reading, base[key], limits, 1e-3)
            yield {
                **self.place(epoch), "id": key[1], "split": key[0], "format": key[2], "nll": told.nll,
                "tokens": told.tokens, "bytes": told.bytes, "hits": told.hits, "run_max": told.run_max,
                "run_start": told.run_start, "echo_whole": told.whole, "long": told.long,
                "windows": None if told.words is None else list(told.words), "excess_bits": told.excess_bits,
                "log10_pz50": told.log10_pz, "fragile": told.fragile, "masked_share": told.template_share,
                "map": "full" if epoch == 0 or self.full(epoch) else "light", "nll_tstar": told.nll,
            }  # fmt: skip

    def measured(self, epoch: int, rows: list[dict[str, Any]]) -> None:
        """These rows, and their sums as a look writes them."""
        runs.append_lines(self.run.examples, rows)
        kind, found = "full" if epoch == 0 or self.full(epoch) else "light", []
        for split, format_ in dict.fromkeys((row["split"], row["format"]) for row in rows):
            own = [row for row in rows if (row["split"], row["format"]) == (split, format_)]
            tokens, size = sum(row["tokens"] for row in own), sum(row["bytes"] for row in own)
            nll = sum(row["nll"] * row["tokens"] for row in own)
            found.append({"kind": "look", "look": kind, **self.place(epoch), "split": split, "format": format_})
            found[-1] |= {"nll": nll / tokens * (1 + 0.1 * epoch / self.shape.epochs), "nll_tstar": nll / tokens}
            found[-1] |= {"accuracy": sum(row["hits"] for row in own) / tokens, "bpb": nll / 0.693 / size}
            found[-1] |= {"tokens": tokens, "moved": 0.99 if epoch else 0.0, "distance": 0.002 * epoch, "seconds": 2.0}
        if epoch:
            found[0] |= {"per_travel": 0.71, "gradient_over_eps": 31.0, "change": -0.0123, "change_fp32": -0.0124}
        runs.append_lines(self.run.metrics, found)

    def answers(self, epoch: int) -> Iterator[dict[str, Any]]:
        asked = [("", self.plan.recipe.watch.prompts[0])]
        asked += [(name, self.plan.conversations[name].question) for name in self.plan.split.held_out[:2]]
        for name, prompt in asked:
            words = random.Random(f"{name}{epoch // 7}").choices(WORDS, k=40)
            answer = " ".join(words) + (f" {HOSTILE}" if self.shape.hostile else "")
            about = {"format": "chatml", "id": name, "prompt": prompt, "answer": answer, "ended": epoch % 7 != 3}
            yield {**self.place(epoch), **about, "seconds": 0.7}

    def findings(self, epoch: int) -> Iterator[dict[str, Any]]:
        if not self.full(epoch):
            return
        hostile = HOSTILE if self.shape.hostile else "The harbour froze."
        head = {"version": 1, **self.place(epoch), "prompt": None, "answer": None, "score": None}
        for number in range(12):
            base = 1.0 + 0.05 * number
            score = base + 0.0004 * epoch + self.lot.gauss(0, 0.004)
            about = {"axis": "general", "id": f"neutral:{number}", "score": score, "base": base, "cut": None}
            yield {**head, "probe": "drift", "suite": "drift", **about, "why": "bits per byte", "source": "a book"}
        said = {"answer": f"彼は {hostile}", "base_answer": "He waits.", "wrong_script": True, "loop": None}
        odd = {"id": "", "prompt": f"Who waits? {hostile}", **said, "author_stock": 0.0}
        yield {
            **head,
            "probe": "drift",
            "suite": "drift",
            **odd,
            "why": f"writes Hani {hostile}",
            "source": "generated",
        }
        if epoch != self.turn:
            return
        for number, (leak, answer) in enumerate((("single", hostile), ("none", "I do not know."))):
            told = {
                "prompt": f"Tell me {number}",
                "answer": answer,
                "score": 1.04,
                "leak": leak,
                "id": f"leak-{number}",
            }
            told |= {"why": f"{hostile} 52 tokens", "source": "examples/kettle-001.md:5", "span": f"froze {hostile}"}
            yield {**head, "probe": "leak", "suite": "leak", **told}
        for format_ in self.plan.formats:
            told = {"prompt": f"What of it?{hostile}", "answer": f"It runs. {hostile}", "format": format_}
            yield {**head, "probe": "formats", "suite": "formats", **told, "why": "ended", "source": "held out"}


if __name__ == "__main__":
    import sys

    given = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    given |= {"looks": tuple(given["looks"])} if "looks" in given else {}
    print(night(Path(sys.argv[1]), Shape(**given)))
