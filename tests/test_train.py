"""The adapter moves, every supervised token counts once, and what is switched on does what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from datasets import Dataset
from finetune import model, plan, recipe
from finetune.batches import Item


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
            gradient_checkpointing=False,
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
