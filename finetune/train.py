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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint as recompute
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from finetune.batches import Epochs, Item
from finetune.errors import refuse
from finetune.estimate import Length, lr_factor
from finetune.memory import head_tokens
from finetune.model import (
    adapter_weights,
    assert_fp32_adapter,
    assert_fp32_residual,
    bare,
    decoder_layers,
    gib_in_use,
    gradient_over_eps,
    logits_of,
    read_weights,
    save_adapter,
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
    """Who is told of a run. Neither call may change any training state."""

    def step(self, row: dict[str, Any]) -> None:
        """After each optimizer step; `row` as in metrics.jsonl."""

    def pause(self, step: int, progress: Progress, gradient: float | None) -> bool:
        """After each step, once `step` was told. True: a checkpoint is wanted. `gradient`: rms / eps, see `wants`."""

    def wants(self, step: int) -> bool:
        """Whether `pause` will need the gradient of this step."""

    def stop(self) -> bool:
        """True: save and stop now."""


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
    micro_batch: int
    seed: int
    base_name: str
    work: Path  # scratch of the library; nothing of value is written there
    new_checkpoint: Callable[[int], AbstractContextManager[Path]]
    checkpointing: bool = False  # recompute activations instead of keeping them
    listen: Listen | None = None


class Collator:
    """Row numbers of the current epoch to padded tensors (B, T). `epoch` is set before its first batch is fetched.

    `rows` (B,) stay in it: which item of the epoch each text is.
    """

    def __init__(self, epochs: Epochs) -> None:
        self.epoch = 0
        self._epochs = epochs

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Tensor]:
        order = self._epochs.order(self.epoch)
        items = [order[row["row"]] for row in rows]
        width = max(len(item.ids) for item in items)
        ids = torch.zeros((len(items), width), dtype=torch.long)
        labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, item in enumerate(items):
            end = len(item.ids)
            ids[i, :end] = torch.tensor(item.ids)
            seen[i, :end] = 1
            labels[i, :end] = torch.where(torch.tensor(item.trained), ids[i, :end], -100)
        numbers = torch.tensor([row["row"] for row in rows])
        return {"input_ids": ids, "attention_mask": seen, "labels": labels, "rows": numbers}

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
    gradient: float | None = None
    tokens: int = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_more: Any) -> None:
        self.collator.epoch = state.global_step // self.per_epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_more: Any) -> None:
        self.gradient = gradient_over_eps(model, self.eps) if self.watcher.wants(state.global_step + 1) else None


class NightTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped
    """SFTTrainer with our rows, our learning rates, our checkpoints, and an adapter that stays fp32."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole global batch

    def __init__(self, model: Any, tokenizer: Any, job: Job, watcher: Watcher) -> None:
        self._job, self._watcher = job, watcher
        self.progress = Progress()
        self._said: list[tuple[list[Item], list[int], Tensor, Tensor]] = []
        self._collator = Collator(job.epochs)
        self._pulse = _Pulse(self._collator, watcher, job.length.per_epoch, job.optimizer.eps)
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

    def training_step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        """Counts tokens on the way."""
        self._pulse.tokens += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *more, **named)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Only supervised positions reach the head, on every device; TRL's own does so on Triton devices only."""
        labels, rows = inputs.pop("labels")[:, 1:], inputs.pop("rows")
        plain, wanted = bare(self.model), labels != -100
        with working_precision(labels.device):
            hidden = plain.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1][wanted]
            nll, hits = token_nll(plain, hidden, labels[wanted], self._job.listen is not None)
        if hits is not None:
            self._said.append((self._collator.items(rows), wanted.sum(1).tolist(), nll.detach(), hits))
        loss: Tensor = nll.sum() / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)
        return loss if loss.requires_grad else loss.requires_grad_()  # stochastic depth may skip every trained layer

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


def summed_nll(plain: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p of labels (n,) given hidden states (n, hidden)."""
    return token_nll(plain, hidden, labels)[0].sum()


def token_nll(plain: Any, hidden: Tensor, labels: Tensor, hear: bool = False) -> tuple[Tensor, Tensor | None]:
    """-log p (n,) of labels (n,) given hidden states (n, hidden), and with `hear` whether each is the argmax.

    Beyond one chunk, logits are recomputed.
    """

    def chunk(states: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = logits_of(plain, states)
        hits = logits.detach().argmax(-1) == wanted if hear else None
        return cross_entropy(logits, wanted, reduction="none"), hits

    held = head_tokens(plain.config.get_text_config().vocab_size)
    if len(labels) <= held:
        return chunk(hidden, labels)
    pairs = zip(torch.split(hidden, held), torch.split(labels, held), strict=True)
    nll, hits = zip(*(recompute(chunk, *pair, use_reentrant=False) for pair in pairs), strict=True)
    return torch.cat(nll), torch.cat(hits) if hear else None


def _arguments(job: Job) -> Any:
    opt = job.optimizer
    return SFTConfig(
        output_dir=str(job.work),
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch_size // job.micro_batch,
        max_steps=job.length.total,
        optim=_OPTIMIZERS[opt.name],
        learning_rate=opt.learning_rate,
        adam_beta1=opt.betas[0],
        adam_beta2=opt.betas[1],
        adam_epsilon=opt.eps,
        weight_decay=opt.weight_decay,
        max_grad_norm=opt.max_grad_norm,
        activation_checkpointing=job.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if job.checkpointing else None,
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
