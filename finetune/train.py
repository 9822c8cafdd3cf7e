"""Recipe to adapter, through TRL's SFTTrainer, subclassed here and nowhere else.

Rows come ready from `batches`; the adapter and the residual stream are proven fp32 before the optimizer is made; going
on from a checkpoint is bit-exact on a CPU. What it will not: render text, decide when to look or stop, or print (a
watcher is passed in).

The loss is the sum of -log p over the supervised tokens of a global batch, divided by their number: batch 1 accumulated
8 times equals batch 8.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from finetune import varlen
from finetune.batches import Epochs, Item, Packing
from finetune.errors import refuse
from finetune.estimate import Length, lr_factor
from finetune.head import supervised, token_nll
from finetune.model import (
    adapter_weights,
    assert_fp32_adapter,
    assert_fp32_residual,
    bare,
    decoder_layers,
    gib_in_use,
    gradient_over_eps,
    read_weights,
    save_adapter,
    trained_layers,
    working_precision,
)
from finetune.recipe import Optimizer

_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
PROGRESS = "progress.json"
_ALLOCATOR = "DefaultCPUAllocator"  # a full host is a plain RuntimeError that names it


@dataclass
class Progress:
    """What a run has behind it; travels with every checkpoint."""

    travel: float = 0.0  # sum of the learning rate over all steps
    tokens: int = 0  # tokens trained on, prompts included
    seconds: float = 0.0  # spent training, looks and saves left out


class Watcher(Protocol):
    """Who is told of a run. No call may change any training state."""

    def step(self, row: dict[str, Any]) -> None:
        """After each optimizer step; `row` as in metrics.jsonl."""

    def pause(self, step: int, progress: Progress, gradient: float | None) -> bool:
        """After each step, once `step` was told. True: a checkpoint is wanted. `gradient`: rms / eps, see `wants`."""

    def wants(self, step: int) -> bool:
        """Whether `pause` will need the gradient of this step."""

    def stop(self) -> bool:
        """True: save and stop now."""

    def say(self, text: str) -> None:
        """What the user should know."""


@dataclass(frozen=True, eq=False)
class Spoken:
    """What the training forward said of one text, before its step: of the supervised tokens only, in train mode."""

    item: Item
    log_p: Tensor  # (supervised,) float32, cpu, nats
    hits: Tensor  # (supervised,) bool, cpu: the argmax is the token


Listen = Callable[[int, Progress, Sequence[Spoken]], Mapping[str, float]]  # told after each step; gives what it took


@dataclass(frozen=True)
class Job:
    """Everything a training needs beside the model."""

    epochs: Epochs
    optimizer: Optimizer
    length: Length
    batch_size: int
    packing: Packing
    seed: int
    base_name: str
    work: Path  # scratch of the library; nothing of value is written there
    new_checkpoint: Callable[[int], AbstractContextManager[Path]]
    listen: Listen | None = None
    twice: Callable[[int], int] = lambda _tokens: 0  # lower layers that compute a micro-batch of so many tokens twice
    ahead: Callable[[int], None] = lambda _epoch: None  # told that an epoch begins, counted from 0


class Collator:
    """Row numbers of the current epoch, (B,). `epoch` is set before its first batch is fetched."""

    def __init__(self, epochs: Epochs) -> None:
        self.epoch = 0
        self._epochs = epochs

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        return {"rows": torch.tensor([row["row"] for row in rows])}

    def items(self, rows: Tensor) -> list[Item]:
        """The texts of a batch."""
        order = self._epochs.order(self.epoch)
        return [order[row] for row in rows.tolist()]


@dataclass
class _Pulse(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Sets the epoch before its batches are made (the trainer does not on a resume) and reads gradients when asked."""

    collator: Collator
    watcher: Watcher
    per_epoch: int
    eps: float
    ahead: Callable[[int], None]
    gradient: float | None = None
    tokens: int = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.collator.epoch = state.global_step // self.per_epoch
        self.ahead(self.collator.epoch)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_more: Any) -> None:
        self.gradient = gradient_over_eps(model, self.eps) if self.watcher.wants(state.global_step + 1) else None


class NightTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """SFTTrainer with our rows, our learning rates, our checkpoints, and an adapter that stays fp32."""

    def __init__(self, model: Any, tokenizer: Any, job: Job, watcher: Watcher) -> None:
        self._job, self._watcher = job, watcher
        self._packing, self._twice = job.packing, job.twice
        self.progress = Progress()
        self._said: list[tuple[list[Item], list[int], Tensor, Tensor]] = []
        self._collator = Collator(job.epochs)
        self._pulse = _Pulse(self._collator, watcher, job.length.per_epoch, job.optimizer.eps, job.ahead)
        before = {name: weight.detach().clone() for name, weight in adapter_weights(model).items()}
        super().__init__(
            model=model,
            args=_arguments(job),
            train_dataset=Dataset.from_dict({"row": range(job.epochs.size)}),
            data_collator=self._collator,
            processing_class=tokenizer,
            callbacks=[self._pulse],
        )
        self._give_back_fp32(before)
        self._trained = trained_layers(self.model)
        bare(self.model).activation_checkpointing_enable({"use_reentrant": False})  # of a layer once it is told so
        self._clock = time.monotonic()

    def _give_back_fp32(self, before: Mapping[str, Tensor]) -> None:
        """SFTTrainer has rounded the adapter of a quantised model to bf16: put the fp32 values back."""
        for name, weight in adapter_weights(self.model).items():
            weight.data = before[name]

    def create_optimizer(self, model: Any = None) -> Any:
        """Only for an fp32 adapter on an fp32 residual stream."""
        assert_fp32_adapter(self.model)
        assert_fp32_residual(self.model)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rates of `estimate.lr_factor`, the same that `travel` was estimated from."""
        schedule, length = self._job.optimizer.schedule, self._job.length
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: lr_factor(schedule, step, length))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], *_more: Any, **_named: Any) -> Tensor:
        """A global batch, micro-batch after micro-batch: the loss is over all its supervised tokens.

        Out of memory, it is done again with every layer's activations computed twice, then text by text.
        """
        model.train()
        items = self._collator.items(inputs["rows"])
        self._pulse.tokens += sum(len(item.ids) for item in items)
        while True:
            try:
                return self._there_and_back(items)
            except torch.OutOfMemoryError as fault:
                if not self._keeps_less(items):
                    raise
                traceback.clear_frames(fault.__traceback__)  # they hold what the failed try had made
            self._made_room()

    def _there_and_back(self, items: Sequence[Item]) -> Tensor:
        supervised = max(1, sum(item.supervised for item in items))
        total = torch.zeros((), device=self.args.device)
        for pack in self._packing.packs(items):
            with working_precision(self.args.device):
                loss = self._nll(pack).sum() / supervised
            self.accelerator.backward(loss if loss.requires_grad else loss.requires_grad_())  # every layer was skipped
            total += loss.detach()
        return total

    def _nll(self, pack: Sequence[Item]) -> Tensor:
        """-log p of the supervised tokens of a micro-batch, text after text; no other position reaches the head."""
        twice = self._twice(sum(len(item.ids) for item in pack))
        for depth, layer in enumerate(self._trained):
            layer.gradient_checkpointing = depth < twice
        plain, (at, labels) = bare(self.model), supervised(pack, self.args.device)
        states = varlen.hidden(plain, [item.ids for item in pack])[at]
        nll, hits = token_nll(plain, states, labels, self._job.listen is not None)
        if hits is not None:
            self._said.append(([*pack], [sum(item.trained[1:]) for item in pack], nll.detach(), hits))
        return nll

    def _keeps_less(self, items: Sequence[Item]) -> bool:
        """Whether memory that ran out may do: less is kept from now on."""
        if self._twice(1) < (layers := len(self._trained)):
            self._twice, what = lambda _tokens: layers, "activations are computed twice"
        elif len(self._packing.packs(items)) < len(items):
            self._packing, what = Packing(texts=1), "micro-batches are of one text"
        else:
            return False
        self._watcher.say(f"Out of memory before step {self.state.global_step + 1}: from here on {what}.")
        return True

    def _made_room(self) -> None:
        """Drop what a failed try left."""
        self._said.clear()
        self.model.zero_grad()
        torch.cuda.empty_cache()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row a step to the watcher; nothing stays in the trainer's state, which every checkpoint would repeat."""
        self._metrics["train"].clear()
        if "grad_norm" not in logs:
            return
        seconds, self._clock = time.monotonic() - self._clock, time.monotonic()
        self._count(logs["learning_rate"], seconds)
        row = self._row(logs, seconds)
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise refuse(
                f"The loss is {row['loss']}, the gradient {row['grad_norm']} at step {row['step']}.",
                "Lower optimizer.learning_rate and start with --fresh; the last good checkpoint is kept.",
            )
        if self._job.listen is not None:
            row.update(self._listen(self._job.listen))
        self._watcher.step(row)
        wanted = self._watcher.pause(row["step"], self.progress, self._pulse.gradient)
        stop = self._watcher.stop()
        self.control.should_save = wanted or stop
        self.control.should_training_stop = self.control.should_training_stop or stop
        if not self.control.should_save:
            self._clock = time.monotonic()

    def _listen(self, listen: Listen) -> Mapping[str, float]:
        """Pass on what the step's forwards said of its texts; keys for the step's row."""
        said, self._said = self._said, []
        spoken = [
            Spoken(item, -one.float(), hit)
            for items, sizes, nll, hits in said
            for item, one, hit in zip(items, torch.split(nll.cpu(), sizes), torch.split(hits.cpu(), sizes), strict=True)
        ]
        return listen(int(self.state.global_step), self.progress, spoken)

    def _count(self, learning_rate: float, seconds: float) -> None:
        self.progress.travel += learning_rate
        self.progress.tokens += self._pulse.tokens
        self.progress.seconds += seconds

    def _row(self, logs: Mapping[str, float], seconds: float) -> dict[str, Any]:
        tokens, self._pulse.tokens = self._pulse.tokens, 0
        step = int(self.state.global_step)
        return {
            "kind": "step",
            "step": step,
            "epoch": step / self._job.length.per_epoch,
            "lr": logs["learning_rate"],
            "travel": self.progress.travel,
            "loss": logs["loss"],
            "grad_norm": logs["grad_norm"],
            "tokens": tokens,
            "seconds": seconds,
            "gib": gib_in_use(self.args.device),
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A complete checkpoint or none: written aside by the run folder, with all that going on exactly needs."""
        with self._job.new_checkpoint(int(self.state.global_step)) as folder:
            save_adapter(self.model, folder, self._job.base_name)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))
            (folder / PROGRESS).write_text(json.dumps(asdict(self.progress)))
        self._clock = time.monotonic()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        read_weights(self.model, folder)
        self.progress = Progress(**json.loads((folder / PROGRESS).read_text()))


def _arguments(job: Job) -> Any:
    opt = job.optimizer
    return SFTConfig(
        output_dir=str(job.work),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.length.total,
        optim=_OPTIMIZERS[opt.name],
        learning_rate=opt.learning_rate,
        adam_beta1=opt.betas[0],
        adam_beta2=opt.betas[1],
        adam_epsilon=opt.eps,
        weight_decay=opt.weight_decay,
        max_grad_norm=opt.max_grad_norm,
        activation_checkpointing=False,  # TRL's default is on; see _nll
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),  # the model is there: no other accelerator is known here
        seed=job.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def train(model: Any, base: Path, job: Job, watcher: Watcher, resume: Path | None = None) -> Progress:
    """Train the adapter of `model` to `job.length.total` steps or until the watcher says stop.

    `base`: the folder its tokenizer is in. `resume`: a checkpoint folder to go on from. Errors: UserError for what the
    user can mend (a loss that is no number).
    """
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    trainer = NightTrainer(model, tokenizer, job, watcher)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer.progress


@contextmanager
def memory_faults(longest: str, remedies: Sequence[str]) -> Iterator[None]:
    """Running out of memory inside is the user's to mend: a UserError with the longest text and what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as fault:
        if (
            isinstance(fault, RuntimeError)
            and not isinstance(fault, torch.OutOfMemoryError)
            and _ALLOCATOR not in str(fault)
        ):
            raise
        remedy = f"Try {', or '.join(remedies)}. What was saved is kept; the same command goes on."
        raise refuse(f"Out of memory; the longest text is {longest}.", remedy) from None


def add_stochastic_depth(model: Any, rate: float) -> None:
    """While training, skip decoder layer l of L with probability rate * l / L [Huang et al. 2016, linear decay]."""
    layers = decoder_layers(model)
    for depth, layer in enumerate(layers, start=1):
        layer.register_forward_hook(_skipper(rate * depth / len(layers)), with_kwargs=True)


def _skipper(rate: float) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def hook(layer: nn.Module, given: Any, named: Any, output: Any) -> Any:
        if not layer.training or float(torch.rand(())) >= rate:
            return None
        hidden = given[0] if given else named["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook
