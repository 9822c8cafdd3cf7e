"""What cannot be dialled is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune import dial
from finetune.errors import UserError


@pytest.mark.parametrize("odd", ["use_dora", "modules_to_save", "trainable_token_indices", "lora_bias"])
def test_an_adapter_that_does_not_scale_is_refused_at_once(tmp_path: Path, odd: str) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", odd: [1]}))
    bench: Any = SimpleNamespace(subject=SimpleNamespace(adapters={1: tmp_path}), ear=None)
    with pytest.raises(UserError, match="Only plain LoRA can be dialled"):
        dial.sweep(bench)
