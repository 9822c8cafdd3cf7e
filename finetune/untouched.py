"""What an adapter folder tells of itself, whoever made it: shape, precision, whether it does anything at all.

Reads its configuration and weights with numpy; loads no model, and cannot say what it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TOLD = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")


def told(folder: Path) -> list[tuple[str, str]]:
    """(what, said), for a page."""
    return [*_configuration(folder / "adapter_config.json"), *_weights(folder / "adapter_model.safetensors")]


def _configuration(path: Path) -> Iterator[tuple[str, str]]:
    try:
        known: Any = json.loads(path.read_text(encoding="utf-8"))
        for key in _TOLD:
            if known.get(key) is not None:
                yield key.replace("_", " "), Path(str(known[key])).name if key == _TOLD[0] else str(known[key])
        targets = known.get("target_modules") or []
        yield "targets", targets if isinstance(targets, str) else ", ".join(sorted(targets))
    except (OSError, ValueError, AttributeError):
        yield "configuration", "cannot be read"


def _weights(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        yield "weights", "not there as safetensors, so not opened"
        return
    sizes, kinds, seconds, zero = 0, set(), 0, 0
    for name, kind, values in _tensors(path):
        sizes += values.size
        kinds.add(kind)
        if "lora_B" in name:
            seconds += 1
            zero += not values.any()
    yield "weights", f"{sizes:,} in {path.stat().st_size / 2**20:.1f} MiB, {', '.join(sorted(kinds))}"
    if seconds:
        untouched = "all of lora_B is zero: it is the base, unchanged" if zero == seconds else ""
        yield "moved", untouched or f"{seconds - zero} of {seconds} lora_B matrices are not zero"


def _tensors(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(name, precision, raw values): only whether they are zero is asked, so bf16 is read as whole numbers."""
    with path.open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
        for name, about in head.items():
            if name != "__metadata__":
                first, last = about["data_offsets"]
                file.seek(begin + first)
                width = (last - first) // max(int(np.prod(about["shape"])), 1)
                whole = np.frombuffer(file.read(last - first), dtype=f"<u{width or 1}")
                yield name, about["dtype"], whole
