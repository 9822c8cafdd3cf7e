"""A base kept in four bits on the disk: quantised once, read a quarter of the bytes ever after, with the same bits.

A base whose files were touched since is another one. Quantising itself is the library's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from finetune import disk, slices

_WORTH = 2**30  # bytes of weights below which quantising takes no time worth saving


def load(folder: Path, four_bits: bool, how: dict[str, Any]) -> Any:
    """A whole causal LM; `how`: what from_pretrained takes. A large one in four bits is kept for the next time."""
    kept = _place(folder, how) if four_bits else None
    if kept is not None and kept.is_dir():
        stored = {name: value for name, value in how.items() if name != "quantization_config"}  # it has its own
        try:
            return AutoModelForCausalLM.from_pretrained(kept, **stored)
        except (OSError, ValueError, RuntimeError, SafetensorError):  # damaged: made again
            shutil.rmtree(kept, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(folder, **how)
    if kept is not None:
        _keep(model, kept)
    return model


def keep_layout(model: torch.nn.Module) -> None:
    """bitsandbytes repacks NF4 in place at the first eval forward on AVX512-BF16: logits shift, backward breaks."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain flag of Linear4bit


def _place(folder: Path, how: dict[str, Any]) -> Path | None:
    """Where it lies once quantised in this way; None for one that is small."""
    files = slices.stamp(folder)
    if sum(size for size, _ in files) < _WORTH:
        return None
    versions = torch.__version__, transformers.__version__, bitsandbytes.__version__
    made = repr((str(folder.resolve()), files, versions, how["dtype"], how["device_map"]))
    return disk.home("quantised") / f"{folder.name[:40]}-{hashlib.sha256(made.encode()).hexdigest()[:16]}"


def _keep(model: Any, where: Path) -> None:
    """Write it, complete or not at all, in place of any other: in four bits, too, a base is large."""
    aside = where.with_name(f".{where.name}.tmp-{os.getpid()}")
    try:
        aside.mkdir(parents=True, exist_ok=True)
        keep_layout(model)
        model.save_pretrained(aside)
        disk.sync_tree(aside)
        for other in where.parent.iterdir():
            if other != aside:
                shutil.rmtree(other, ignore_errors=True)
        aside.rename(where)
    except Exception as fault:  # safetensors wraps a full disk in its own kind
        shutil.rmtree(aside, ignore_errors=True)
        if not isinstance(fault, OSError) and not disk.is_full(fault, Path.home()):
            raise
