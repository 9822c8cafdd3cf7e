"""The adapter moves, every supervised token counts once, and what is switched on does what it says."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from finetune import estimate, head, model, night, orders, plan, prompts, recipe, runs, train, varlen
from finetune.batches import Item
from finetune.model import LoraShape
from finetune.screen import Screen
from finetune.speak import Speaker


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("train") / "llama")


@pytest.fixture(scope="module")
def pocket_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Item]:
    """Six handwritten examples as pocket reads them."""
    made = plan.make(recipe.load(small.recipe(tmp_path_factory.mktemp("rows"))), model.POCKET)
    return made.epochs.order(0)


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """Share of lora_A entries that differ."""
    names = [name for name in before if "lora_A" in name]
    changed = sum(int(torch.count_nonzero(before[name] != after[name])) for name in names)
    return changed / sum(before[name].numel() for name in names)


def stock(rows: list[Item], folder: Path) -> SFTTrainer:
    """What a reader of TRL's documentation would write."""
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model.POCKET, quantization_config=bits, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=1,
            max_steps=50,
            learning_rate=1e-7,
            lr_scheduler_type="constant",
            max_length=None,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": [list(r.ids) for r in rows], "completion_mask": [[int(t) for t in r.trained] for r in rows]}
        ),
        processing_class=AutoTokenizer.from_pretrained(model.POCKET),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules=list(tiny.ALL), task_type="CAUSAL_LM"),
    )


def test_stock_trl_freezes_lora_a_at_1e_7_and_ours_moves_it(pocket_rows: list[Item], tmp_path: Path) -> None:
    theirs = stock(pocket_rows, tmp_path)
    before = tiny.weights(theirs.model)
    theirs.train()
    assert moved(before, tiny.weights(theirs.model)) < 0.05
    ours = tiny.adapted(model.POCKET, "nf4", model.LoraShape(16, 16.0, 0.0, tiny.ALL))
    start = model.Start(ours)
    job = tiny.job(tmp_path, pocket_rows, 50, optimizer={"learning_rate": 1e-7})
    tiny.trained(model.POCKET, job, ours)
    assert start.movement(ours).share >= 0.9


# --- what a step is ------------------------------------------------------------------------------------------------


def nll(net: Any, items: list[Item]) -> tuple[float, int]:
    """Sum of -log p over the supervised tokens of some texts, and their number; each text read alone."""
    speaker = Speaker(net, tiny.tokenizer().backend_tokenizer, None, batch_tokens=1)
    scores = speaker.score([item.ids for item in items], [item.trained for item in items])
    return sum(score.nll for score in scores), sum(len(score.hits) for score in scores)


def test_batch_1_accumulated_8_times_equals_batch_8(base: Path, tmp_path: Path) -> None:
    items = tiny.texts([9, 30, 12, 41, 7, 22, 15, 28] * 2)
    calm = {"eps": 1e-4}  # gradients near 0 would make Adam's steps a matter of rounding
    ends = []
    for micro in (1, 8):
        job = tiny.job(tmp_path, items, 4, 8, micro_batch=micro, optimizer=calm)
        net, rows = tiny.trained(base, job)
        ends.append((tiny.weights(net), rows))
    (one, one_rows), (whole, whole_rows) = ends
    assert all(torch.allclose(one[name], whole[name], rtol=1e-3, atol=1e-6) for name in one)
    for key in ("loss", "grad_norm", "tokens"):
        assert [row[key] for row in one_rows] == pytest.approx([row[key] for row in whole_rows], rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_the_loss_is_per_supervised_token(base: Path, tmp_path: Path, micro: int) -> None:
    items = [*tiny.texts([9, 40]), *(Item(f"f{i.example}", "a", i.ids, i.trained) for i in tiny.texts([25, 8], 6))]
    net = tiny.stirred(tiny.adapted(base))
    total, count = nll(net, items)
    assert count == 5 + 36 + 19 + 2
    _, rows = tiny.trained(base, tiny.job(tmp_path, items, 1, 4, micro_batch=micro), net)
    assert rows[0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("micro", "last"), [(1, 1), (2, 1), (4, 3)])
def test_the_last_batch_may_be_smaller_and_is_trained(base: Path, tmp_path: Path, micro: int, last: int) -> None:
    items = tiny.texts([10, 14, 18, 22, 26, 30, 34][: 4 + last])
    net = tiny.stirred(tiny.adapted(base))
    total, count = nll(net, items[4:])
    job = tiny.job(tmp_path, items, 4, 4, micro_batch=micro, optimizer={"learning_rate": 1e-9})
    _, rows = tiny.trained(base, job, net)
    assert [row["tokens"] for row in rows] == [
        sum(len(item.ids) for item in part) for part in (items[:4], items[4:])
    ] * 2
    assert rows[1]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert rows[1]["grad_norm"] == pytest.approx(rows[3]["grad_norm"], rel=1e-3)
    assert rows[1]["epoch"] == 1.0


@contextmanager
def counted(net: Any) -> Iterator[Counter[str]]:
    """How often the lowest layer and its inside began to run, our own check of one token left out."""
    found: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda _module, given: found.update([name] if given[0].shape[1] > 1 else [])

    lowest = model.decoder_layers(net)[0]
    parts = {"base": lowest, "inside": lowest.mlp}
    hooks = [part.register_forward_pre_hook(count(name)) for name, part in parts.items()]
    yield found
    for hook in hooks:
        hook.remove()


def test_one_forward_per_micro_batch(base: Path, tmp_path: Path) -> None:
    net = tiny.adapted(base)
    varlen.hidden(model.bare(net), [(1, 2), (3, 4)])  # isolation is proven once
    with counted(net) as found:
        tiny.trained(base, tiny.job(tmp_path, tiny.texts([12] * 8), 3, 4, micro_batch=2), net)
    assert found["base"] == 3 * 2


def test_padding_teaches_nothing(base: Path, tmp_path: Path) -> None:
    short, long = tiny.texts([9, 40])
    silent = Item("silent", "a", long.ids, (False,) * 40)
    alone, rows = tiny.trained(base, tiny.job(tmp_path, [short], 3))
    beside, padded = tiny.trained(base, tiny.job(tmp_path, [short, silent], 3, 2))
    assert [row["loss"] for row in padded] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    one, other = tiny.weights(alone), tiny.weights(beside)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_a_text_longer_than_the_head_takes_at_once_is_scored_whole(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = tiny.texts([60, 33])
    whole, rows = tiny.trained(base, tiny.job(tmp_path, items, 3, 2))
    monkeypatch.setattr(head, "head_tokens", lambda _vocabulary: 16)
    pieces, again = tiny.trained(base, tiny.job(tmp_path, items, 3, 2))
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    one, other = tiny.weights(whole), tiny.weights(pieces)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_a_step_is_written_down_as_the_contract_says(base: Path, tmp_path: Path) -> None:
    _, rows = tiny.trained(base, tiny.job(tmp_path, tiny.texts([12, 20]), 4, optimizer={"learning_rate": 1e-6}))
    wanted = {"kind", "step", "epoch", "lr", "travel", "loss", "grad_norm", "tokens", "seconds", "gib"}
    assert all(set(row) == wanted for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0]
    assert [row["travel"] for row in rows] == pytest.approx([1e-6, 2e-6, 3e-6, 4e-6])


# --- what is in the loss -------------------------------------------------------------------------------------------


def test_the_end_mark_is_inside_the_mask_of_every_item(tmp_path: Path) -> None:
    names = list(prompts.shipped())
    made = plan.make(recipe.load(small.recipe(tmp_path, 4, formats={"train": names, "held_out": []})), model.POCKET)
    items = [item for epoch in range(len(names)) for item in made.epochs.order(epoch)]
    assert {item.format for item in items} == set(names)
    for item in items:
        stops = prompts.stops(made.formats[item.format], made.vocabulary)
        last = len(item.ids) - item.trained[::-1].index(False)
        answer = made.vocabulary.tokenizer.decode(item.ids[last:], skip_special_tokens=False)
        assert answer.endswith(stops), f"{item.format}: {answer[-30:]!r} ends with none of {stops}"
        assert made.conversations[item.example].answer[-20:] in answer


# --- switches ------------------------------------------------------------------------------------------------------


def test_stochastic_depth_skips_only_while_training(base: Path) -> None:
    ids = range(20, 40)
    net = tiny.stirred(tiny.adapted(base))
    plain = tiny.logits(net, ids)
    train.add_stochastic_depth(net, 0.8)
    assert torch.equal(tiny.logits(net, ids), plain)
    net.train()
    inputs = torch.tensor([list(ids)])
    skipped = []

    def look(_layer: Any, given: Any, named: Any, output: Any) -> None:
        skipped.append(torch.equal(output, given[0] if given else named["hidden_states"]))

    hooks = [layer.register_forward_hook(look, with_kwargs=True) for layer in model.decoder_layers(net)]
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(200):
            net(input_ids=inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    low, high = skipped[0::2], skipped[1::2]
    assert sum(low) / 200 == pytest.approx(0.4, abs=0.1)
    assert sum(high) / 200 == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("depth", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_loss(base: Path, tmp_path: Path, depth: float) -> None:
    told = []
    for count in (0, 2):
        net = tiny.adapted(base)
        if depth:
            train.add_stochastic_depth(net, depth)
        job = tiny.job(tmp_path, tiny.texts([12, 20, 31]), 6, twice=lambda _tokens, count=count: count)
        with counted(net) as found:
            _, rows = tiny.trained(base, job, net)
        told.append(([row["loss"] for row in rows], [row["grad_norm"] for row in rows]))
        assert (found["inside"] > 6) == (count == 2)  # a skipped layer is not computed again
    assert told[0][0] == pytest.approx(told[1][0], rel=1e-6)
    assert told[0][1] == pytest.approx(told[1][1], rel=1e-5)


def test_only_what_does_not_fit_is_computed_twice(base: Path, tmp_path: Path) -> None:
    net = tiny.adapted(base)
    with counted(net) as found:
        tiny.trained(
            base, tiny.job(tmp_path, tiny.texts([12, 20, 31]), 3, twice={12: 0, 20: 1, 31: 2}.__getitem__), net
        )
    assert found["base"] == 3
    assert found["inside"] == 3 + 2  # of the lowest layer: again for the two longer texts


class Cramped:
    """A device on which a layer that keeps its activations runs out of memory beyond so many tokens."""

    def __init__(self, net: Any, tokens: int) -> None:
        self.net, self.tokens, self.faults = net, tokens, 0
        for layer in model.decoder_layers(net):
            layer.register_forward_pre_hook(self._measure)

    def _measure(self, layer: Any, given: Any) -> None:
        kept = given[0].shape[1] * (1 if layer.gradient_checkpointing else 4)
        if layer.training and torch.is_grad_enabled() and kept > self.tokens:
            self.faults += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(("tokens", "said"), [(63, ["computed twice"]), (31, ["computed twice", "of one text"])])
def test_out_of_memory_keeps_less_and_goes_on_with_the_same_loss(
    base: Path, tmp_path: Path, tokens: int, said: list[str]
) -> None:
    job = tiny.job(tmp_path, tiny.texts([12, 20, 31] * 2), 4, 3)
    calm, rows = tiny.trained(base, job)
    net = tiny.adapted(base)
    cramped = Cramped(net, tokens)
    notes = tiny.Notes()
    train.train(net, base, job, notes)
    again = notes.rows
    assert cramped.faults == len(said)
    for words, one in zip(said, notes.said, strict=True):
        assert one.startswith("Out of memory before step 1: from here on ")
        assert words in one
    assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]
    one, other = tiny.weights(calm), tiny.weights(net)
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_memory_that_will_never_do_is_told(base: Path, tmp_path: Path) -> None:
    net = tiny.adapted(base)
    Cramped(net, 30)
    with pytest.raises(torch.OutOfMemoryError):
        tiny.trained(base, tiny.job(tmp_path, tiny.texts([12, 31]), 2, 2), net)


def test_a_step_in_which_every_trained_layer_was_skipped_is_survived(base: Path, tmp_path: Path) -> None:
    net = tiny.adapted(base)
    train.add_stochastic_depth(net, 0.9)
    _, rows = tiny.trained(base, tiny.job(tmp_path, tiny.texts([12]), 12), net)
    norms = [row["grad_norm"] for row in rows]
    assert min(norms) == 0 < max(norms)


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "linear", "cosine", "one_cycle", "cyclical"])
def test_every_schedule_trains_at_the_rates_that_were_estimated(base: Path, tmp_path: Path, schedule: str) -> None:
    warm = 2 if schedule in ("constant_with_warmup", "linear", "cosine") else 0
    settings = {"schedule": schedule, "warmup_steps": warm}
    job = tiny.job(tmp_path, tiny.texts([9, 12, 15, 18]), 12, optimizer=settings)
    _, rows = tiny.trained(base, job)
    wanted = [1e-3 * estimate.lr_factor(schedule, step, job.length) for step in range(12)]
    assert [row["lr"] for row in rows] == pytest.approx(wanted)
    assert rows[-1]["travel"] == pytest.approx(estimate.travel(1e-3, schedule, job.length))


# 2026-11-21 bitsandbytes 0.50 says so on a CPU, and trains
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_every_optimizer_trains(base: Path, tmp_path: Path, name: str) -> None:
    net = tiny.adapted(base, shape=LoraShape(64, 64.0, 0.0, ("q_proj", "o_proj")))
    job = tiny.job(tmp_path, tiny.texts([24]), 12, optimizer={"name": name, "learning_rate": 3e-3})
    notes = tiny.Notes()
    trainer = train.NightTrainer(net, tiny.tokenizer(), job, notes)
    trainer.train()
    assert notes.rows[-1]["loss"] < notes.rows[0]["loss"] - 0.05
    states = [value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    kept = {state.dtype for state in states if state.numel() >= 4096}
    assert kept == {torch.float32 if name == "adamw" else torch.uint8}


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_every_setting_of_the_base_trains(base: Path, tmp_path: Path, quantization: str) -> None:
    net = tiny.adapted(base, quantization)
    start = model.Start(net)
    _, rows = tiny.trained(base, tiny.job(tmp_path, tiny.texts([24]), 12, optimizer={"learning_rate": 3e-3}), net)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    assert start.movement(net).share > 0.95
    model.assert_fp32_adapter(net)


def test_top_layers_train_and_the_rest_has_no_adapter(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "base", layers=3)
    net = tiny.adapted(folder, shape=LoraShape(4, 4.0, 0.0, tiny.ALL, top=1))
    before = tiny.weights(net)
    _, rows = tiny.trained(folder, tiny.job(tmp_path, tiny.texts([24]), 12, optimizer={"learning_rate": 3e-3}), net)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(".layers.2." in name for name in before)
    assert all(not torch.equal(before[name], after) for name, after in tiny.weights(net).items())


def test_the_base_is_left_as_it_was(base: Path, tmp_path: Path) -> None:
    net = tiny.adapted(base)
    before = {name: one.detach().clone() for name, one in net.named_parameters() if not one.requires_grad}
    tiny.trained(base, tiny.job(tmp_path, tiny.texts([24]), 3), net)
    after = dict(net.named_parameters())
    assert all(torch.equal(one, after[name]) for name, one in before.items())


def replay(folder: Path) -> dict[str, Any]:
    """General text in a file of its own."""
    rows = "".join(f'{{"text": "The old clock in the hall struck {n} and nobody came."}}\n' for n in range(20))
    (folder / "general.jsonl").write_text(rows)
    return {"replay": {"path": str(folder / "general.jsonl"), "share": 0.3}}


@pytest.mark.usefixtures("short_drift")
@pytest.mark.parametrize("what", ["goldfish", "replay", "all", "fixed"])
def test_goldfish_and_replay_and_all_formats_run(tmp_path: Path, what: str) -> None:
    small.dataset(tmp_path / "examples")
    changes: dict[str, Any] = {
        "goldfish": {"regularise": {"goldfish": 4}},
        "replay": {"data": {"train": str(tmp_path / "examples"), "held_out": 0.25, **replay(tmp_path)}},
        "all": {"formats": {"draw": "all"}},
        "fixed": {"formats": {"draw": "fixed"}},
    }[what]
    path = small.recipe(tmp_path, epochs=2, **changes)
    made = plan.make(recipe.load(path), model.POCKET)
    plain = plan.make(recipe.load(small.recipe(tmp_path / "plain", epochs=2)), model.POCKET)
    task = orders.read(orders.Order(str(path), out=tmp_path / "run"))
    outcome = night.run(task, Screen(Console(file=io.StringIO())), save_every=1e9, page=False)
    steps = [row for row in runs.read_lines(outcome.folder / "metrics.jsonl") if row["kind"] == "step"]
    rows = [item for epoch in (0, 1) for item in made.epochs.order(epoch)]
    assert sum(row["tokens"] for row in steps) == sum(len(item.ids) for item in rows)
    assert len(steps) == 2 * math.ceil(made.epochs.size / 2)
    own = plain.epochs.order(0)
    supervised = sum(item.supervised for item in made.epochs.order(0))
    if what == "goldfish":
        assert 0.6 < supervised / sum(item.supervised for item in own) < 0.9
    elif what == "replay":
        replayed = sum(item.supervised for item in made.epochs.order(0) if not item.format)
        assert replayed / supervised == pytest.approx(0.3, abs=0.05)
    elif what == "all":
        assert made.epochs.size == 2 * len(own)
    else:
        assert {(i.example, i.format) for i in rows[:6]} == {(i.example, i.format) for i in rows[6:]}


# --- what the forward said ---------------------------------------------------------------------------------------


def test_listening_changes_no_weight_and_hears_what_a_pass_gives(base: Path, tmp_path: Path) -> None:
    items = [*tiny.texts([20, 33]), Item("late", "a", tiny.texts([12])[0].ids, (*(False,) * 9, *(True,) * 3))]
    heard: list[tuple[int, train.Spoken]] = []

    def listen(step: int, _progress: train.Progress, spoken: Sequence[train.Spoken]) -> dict[str, float]:
        heard.extend((step, one) for one in spoken)
        return {"listening": 0.0}

    job = tiny.job(tmp_path, items, 4, 3, micro_batch=1)
    deaf, _ = tiny.trained(base, job)
    net, rows = tiny.trained(base, replace(job, listen=listen))
    one, other = tiny.weights(net), tiny.weights(deaf)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [(step, said.item.example) for step, said in heard[:3]] == [(1, "e0"), (1, "e1"), (1, "late")]
    assert len(heard) == 4 * 3
    assert all("listening" in row for row in rows)
    speaker = Speaker(net, tiny.tokenizer().backend_tokenizer, None)
    scores = speaker.score([item.ids for item in items], [item.trained for item in items], base=True)
    for score, (_, said) in zip(scores, heard[:3], strict=True):  # before the first step the adapter says nothing
        assert torch.allclose(score.log_p, said.log_p, atol=1e-4)
        assert torch.equal(score.hits, said.hits)
    later = [said for step, said in heard if step == 4]
    assert sum(said.log_p.sum() for said in later) > sum(said.log_p.sum() for _, said in heard[:3])


def test_a_head_that_takes_few_tokens_at_once_hears_the_same(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[train.Spoken] = []

    def listen(_step: int, _progress: train.Progress, spoken: Sequence[train.Spoken]) -> dict[str, float]:
        heard.extend(spoken)
        return {}

    job = tiny.job(tmp_path, tiny.texts([60, 33]), 1, 2, listen=listen)
    tiny.trained(base, job)
    monkeypatch.setattr(head, "head_tokens", lambda _vocabulary: 16)
    tiny.trained(base, job)
    for one, other in zip(heard[:2], heard[2:], strict=True):
        assert torch.allclose(one.log_p, other.log_p, atol=1e-5)
        assert torch.equal(one.hits, other.hits)
