"""A base on paper: configuration, tokenizer and no weights, for what is known before a model is loaded. No torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from finetune import cli

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "tie_word_embeddings": False,
}


def base(folder: Path, **changes: Any) -> Path:
    """One token a byte, then BOS and EOS; a file named like weights, empty."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<s>", "</s>"])
    words.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "model.safetensors").touch()
    return folder


def example(question: str, answer: str, **front: str) -> str:
    """A Markdown example of one turn."""
    head = "".join(f"{key}: {value}\n" for key, value in front.items())
    return f"---\n{head}---\n## user\n{question}\n## assistant\n{answer}\n"


# of unlike words, so that lint has nothing to say
TALK = {
    "bread": ("How long should dough rise?", "### conclusion\nUntil a thumb leaves its mark, warm kitchens sooner."),
    "chess": ("Is losing to children bad?", "### conclusion\nThey learn faster; ask them which move you missed."),
    "moss": ("Why is north green?", "### conclusion\nShade keeps stones damp, and damp is all it wants."),
    "tram": ("Walk or ride tomorrow?", "### conclusion\nRide if rain comes before eight, otherwise your legs win."),
    "violin": ("Am I too old to start?", "### conclusion\nFingers stiffen, patience grows. Rent one for a season."),
    "zebra": ("Black on white?", "### conclusion\nBoth answers describe one animal; biologists say white on black."),
}


def folder(place: Path, **changes: Any) -> Path:
    """`r.yaml` in a folder with `base/` and `talk/`; six examples, two of them held out."""
    base(place / "base")
    talk = place / "talk"
    talk.mkdir(parents=True, exist_ok=True)
    for name, (question, answer) in TALK.items():
        (talk / f"{name}.md").write_text(example(question, answer, id=name))
    text = "base: ./base\nlora: {rank: 4, alpha: 4}\ndata: {train: talk, held_out: 0.3}\n"
    text += "formats: {train: [chatml, alpaca], held_out: [zephyr]}\noptimizer: {learning_rate: 1e-4}\nepochs: 10\n"
    (place / "r.yaml").write_text(text)
    return place / "r.yaml"


class Door:
    """`sft` in this process: the exit code, what was printed, what was told on stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, monkeypatch

    def __call__(self, *words: str | Path) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["sft", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        told = self._capsys.readouterr()
        return code, told.out, told.err
