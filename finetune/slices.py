"""Some layers of a base, read from its safetensors without the others: a base larger than the memory, piece by piece.

It knows names and files, not what the layers do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

_LAYER = re.compile(r"(^|\.)layers\.(\d+)\.")
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Slice:
    """Layers `start` up to `stop` of a base. `outside`: with the embedding table, the last norm and the head."""

    start: int
    stop: int
    outside: bool = True


def layer_count(folder: Path) -> int:
    """Decoder layers of a base."""
    return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().num_hidden_layers)


def stamp(folder: Path) -> list[tuple[int, int]]:
    """Bytes and time of change of every file of weights: whether they are still the same, without reading them."""
    abouts = [file.stat() for file in sorted(folder.glob("*.safetensors"))]  # a snapshot's links: what they lead to
    return [(about.st_size, about.st_mtime_ns) for about in abouts]


def config(folder: Path, part: Slice) -> Any:
    """The base's own configuration, of these layers alone; without what is outside, of a vocabulary of one."""
    found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    inner = found.get_text_config()
    inner.num_hidden_layers = part.stop - part.start
    if getattr(inner, "layer_types", None):  # some architectures have one kind alone
        inner.layer_types = inner.layer_types[part.start : part.stop]
    if not part.outside:
        inner.vocab_size, inner.pad_token_id = 1, None
    return found


def weights(folder: Path, part: Slice) -> dict[str, Tensor]:
    """Weights of a slice by the names they have in a model of these layers alone. OSError where a file misses."""
    return {name: tensor for file in _files(folder) for name, tensor in _read(file, part)}


def load(folder: Path, part: Slice, how: dict[str, Any]) -> Any:
    """A causal LM of these layers alone; `how`: what from_pretrained takes."""
    about = config(folder, part)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(about)]
    return kind.from_pretrained(None, config=about, state_dict=weights(folder, part), **how)


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.exists():
        return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _read(file: Path, part: Slice) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # not a mapping
            layer = _LAYER.search(name)
            if layer is None:
                whole = opened.get_tensor(name)
                yield name, whole if part.outside or whole.ndim == 1 else whole[:1]
            elif part.start <= int(layer[2]) < part.stop:
                own = f"{layer[1]}layers.{int(layer[2]) - part.start}."
                yield name[: layer.start()] + own + name[layer.end() :], opened.get_tensor(name)
