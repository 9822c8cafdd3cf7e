"""How early the first 8-word echo warns of the first of 50 tokens, on pocket and on two bases of other shapes.

    .venv/bin/python tests/bench/early_warning.py FOLDER [STEPS]

Makes a small Llama and a small Qwen2 on pocket's text (STEPS optimizer steps, 1200 by default: they answer poorly, but
they speak), then takes each through quickstart's data at a harsh and at a gentle learning rate and reads the free map.
A run that never echoes 50 tokens should raise no alarm of 8 words either; where it does, the table says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from arms import HERE, warning
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from finetune import pocket, runs

KINDS: dict[str, tuple[Any, Any]] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
ARMS = {
    "harsh": {"optimizer.learning_rate": 5e-3, "epochs": 40},
    "gentle": {"optimizer.learning_rate": 3e-4, "epochs": 30},
}


def make(folder: Path, kind: str, steps: int) -> Path:
    """A base of width 128 and three layers with pocket's tokenizer, trained on pocket's text."""
    out = folder / kind
    if (out / "config.json").exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(pocket.HOME)
    config, model = KINDS[kind]
    torch.manual_seed(0)
    made = model(
        config(
            vocab_size=pocket.VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    settings = pocket.Settings(out=out, steps=steps, hot=steps * 2 // 3)
    pocket.train(made, tokenizer, settings, out / "state.pt")
    made.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "state.pt").unlink()
    return out


def run(folder: Path, base: str, name: str, arm: str) -> runs.RunFolder:
    out = folder / f"{name}-{arm}"
    if not out.exists():
        sets = {"base": base, "watch.every": 10, "watch.stop_at": "never", **ARMS[arm]}
        words = [f"--set={key}={value}" for key, value in sets.items()]
        recipe = str(HERE / "recipes/quickstart.yaml")
        command = [str(HERE / ".venv/bin/sft"), "train", recipe, "--out", str(out), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return runs.RunFolder(out)


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1200
    torch.set_num_threads(1)
    bases = {"pocket": "pocket", **{kind: str(make(folder, kind, steps)) for kind in KINDS}}
    for name, base in bases.items():
        for arm in ARMS:
            print(f"{name:8}{arm:8}{warning(run(folder, base, name, arm))}", flush=True)


if __name__ == "__main__":
    main()
