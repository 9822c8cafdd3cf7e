"""What the free running map costs: the same training with and without listening, in turns, medians of CPU seconds.

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/free_map.py [EPOCHS] [TURNS]

Twice: on pocket, and on a random Llama of width 512 with a vocabulary of 32,000, whose head weighs more against its
layers than a 7B's does. Readings of the base are made beforehand: they are counted as looking, once a run.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from finetune import ear, model, plan, recipe, runs, train
from finetune.batches import Packing
from finetune.ear import Overheard
from finetune.hearing import Hearing
from finetune.looks import Place
from finetune.plan import Plan
from finetune.runs import RunFolder
from finetune.speak import Speaker
from finetune.train import Job, Progress, Spoken

HERE = Path(__file__).resolve().parents[2]


class Quiet:
    """A watcher that wants nothing."""

    def step(self, row: dict[str, object]) -> None: ...
    def wants(self, step: int) -> bool:
        return False

    def pause(self, step: int, progress: Progress, gradient: float | None) -> bool:
        return False

    def stop(self) -> bool:
        return False

    def say(self, text: str) -> None: ...


def wide(folder: Path) -> Path:
    """A random base with pocket's tokenizer and a 7B's vocabulary."""
    for path in model.POCKET.glob("*.json"):
        if "index" not in path.name:
            (folder / path.name).write_bytes(path.read_bytes())
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1_408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def listener(made: Plan, speaker: Speaker, folder: Path) -> Callable[..., Mapping[str, float]]:
    """As a run does it, rows written to a file."""
    run, listens = RunFolder(folder), ear.ear(made)
    hearing = Hearing(run, listens, speaker, ear.base(run))
    for name in made.recipe.formats.train:
        hearing.base.of(speaker, listens.passages("train", name))

    def listen(step: int, progress: Progress, spoken: Sequence[Spoken]) -> dict[str, float]:
        said = [
            Overheard(one.item.example, one.item.format, one.item.trained, one.log_p.double().numpy(), one.hits.numpy())
            for one in spoken
        ]
        rows = hearing.free(said, Place("free", step, step / made.length.per_epoch, progress.travel))
        runs.append_lines(run.examples, rows)
        return {}

    return listen


def seconds(base: Path, epochs: int, heard: bool, folder: Path) -> float:
    """CPU seconds of one training, loading left out."""
    wanted = recipe.load(HERE / "recipes/quickstart.yaml", [f"base={base}", f"epochs={epochs}", "batch_size=3"])
    made = plan.make(wanted, base)
    shape = model.LoraShape(16, 16.0, 0.0, wanted.lora.targets)
    net = model.attach(model.load_base(base, "none", model.pick_device()), shape, 0)
    speaker = Speaker(net, made.vocabulary.tokenizer, made.vocabulary.eos_id)
    listen = listener(made, speaker, folder / "run") if heard else None
    job = Job(
        made.epochs, wanted.optimizer, made.length, 3, Packing(), 0, "x", folder, lambda _step: None, listen=listen
    )  # type: ignore[arg-type,return-value]
    began = time.process_time()
    train.train(net, base, job, Quiet())
    return time.process_time() - began


def compare(name: str, base: Path, epochs: int, turns: int) -> None:
    taken: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for heard in (False, True) if turn % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                taken[heard].append(seconds(base, epochs, heard, Path(folder)))
    without, listening = (statistics.median(taken[heard]) for heard in (False, True))
    spread = ", ".join(f"{one:.1f}" for one in sorted(taken[False]))
    print(f"{name}: {without:.2f} s without ({spread}), {listening:.2f} s with, {listening / without - 1:+.2%}")


def main() -> None:
    epochs, turns = (int(word) for word in (*sys.argv[1:], "1", "3")[:2])
    compare("pocket", model.POCKET, 4 * epochs, turns)
    with tempfile.TemporaryDirectory() as folder:
        compare("width 512, 32,000 tokens", wide(Path(folder)), epochs, turns)


if __name__ == "__main__":
    main()
