"""An adapter added into its base's weights, one tensor at a time: a model larger than the memory passes through.

Into the weights of the base as published, or into those it was trained on, taken out of their 4 or 8 bits. It counts
what rounding swallows, and measures no text.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from finetune import gguffile, model
from finetune.disk import to_json
from finetune.errors import refuse

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_SHARD = 2 * 2**30  # bytes in one file: what is held in memory
_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass
class Count:
    """What became of the adapter's change. `entries` it was meant to move, `still` of them as they were before.

    `kept`, `meant`: sums of (what came) x (what was meant) and of (what was meant) squared.
    """

    entries: int = 0
    still: int = 0
    kept: float = 0.0
    meant: float = 0.0

    @property
    def still_share(self) -> float | None:
        """Share of the entries that did not change."""
        return self.still / self.entries if self.entries else None

    @property
    def lost(self) -> float | None:
        """Share of the change that rounding took; below 0 where it added some."""
        return 1 - self.kept / self.meant if self.meant else None


@dataclass(frozen=True)
class Stored:
    """A tensor of the base as it lies in a file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as opened:
            found: Tensor = opened.get_tensor(self.name)
        return found


@dataclass(frozen=True)
class Merge:
    """A base and the changes to its weights, by name. `unpacked`: weights as trained on, in place of the stored ones.

    `dtype`: of what is asked for; None keeps each tensor's own. `rounded`: what a file will keep of a changed one, if
    less than that. `count`: filled while weights are asked for.
    """

    tensors: tuple[Stored, ...]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    unpacked: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    rounded: Callable[[Tensor], Tensor] | None = None
    count: Count = field(default_factory=Count)

    def weight(self, one: Stored) -> Tensor:
        """As it is written."""
        before = self.before(one)
        kind = self.kind(one)
        if one.name not in self.pairs:
            return before.to(kind)
        a, b = self.pairs[one.name]
        change = self.scale * (b.float() @ a.float())
        keep = self.rounded or (lambda values: values.to(kind))
        after = keep(before + change)
        self._counted(keep(before), after, change)
        return after.to(kind)

    def before(self, one: Stored) -> Tensor:
        """Without the adapter, fp32."""
        unpack = self.unpacked.get(one.name)
        return (unpack() if unpack else one.read()).float()

    def kind(self, one: Stored) -> torch.dtype:
        """What a tensor is written as."""
        found: torch.dtype = self.dtype or {"BF16": torch.bfloat16, "F16": torch.float16}.get(one.dtype, torch.float32)
        return found

    def bytes(self) -> int:
        """Of all weights, written."""
        return sum(numel(one) * self.kind(one).itemsize for one in self.tensors)

    def _counted(self, before: Tensor, after: Tensor, change: Tensor) -> None:
        meant = change != 0
        came = after.double() - before.double()
        self.count.entries += int(meant.sum())
        self.count.still += int((meant & (came == 0)).sum())
        self.count.kept += float((came * change).sum())
        self.count.meant += float(change.double().square().sum())


def plan(base: Path, adapter: Path, dtype: str | None = None, worn: Any = None) -> Merge:
    """Into the base in a folder. `worn`: the loaded model, to take the weights it was trained on from.

    Errors: UserError for an adapter that is more than two matrices beside a weight.
    """
    about = json.loads((adapter / model.ADAPTER_CONFIG).read_text())
    gguffile.refuse_adapter(about)
    given = gguffile.adapter_pairs(load_file(adapter / model.ADAPTER_WEIGHTS))
    tensors = tuple(stored(base))
    names = {one.name for one in tensors}
    pairs = {f"{module}.weight": (torch.from_numpy(a), torch.from_numpy(b)) for module, (a, b) in given.items()}
    if strange := sorted(pairs.keys() - names):
        raise refuse(f"the adapter changes {strange[0]}, and the base has no such weight.", "Restore the base.", base)
    kind = None if dtype is None else DTYPES[dtype]
    return Merge(tensors, pairs, gguffile.scale(about), unpacked(worn) if worn is not None else {}, kind)


def stored(base: Path) -> Iterator[Stored]:
    """Every tensor of a base, in the order of its files. Errors: UserError for weights that are no floats."""
    index = base / "model.safetensors.index.json"
    if index.is_file():
        files = [base / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    else:
        files = sorted(base.glob("model*.safetensors")) or sorted(base.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                part = opened.get_slice(name)
                if part.get_dtype() not in _SIZES:
                    what = f"the base's own weights are {part.get_dtype()}, already packed."
                    raise refuse(what, "Export from a base in 16 or 32 bits.", base)
                yield Stored(name, tuple(part.get_shape()), part.get_dtype(), file)


def unpacked(worn: Any) -> dict[str, Callable[[], Tensor]]:
    """Weights that a loaded model holds in 4 or 8 bits, by the names of the base, taken out when asked for."""
    found = {}
    for name, module in model.bare(worn).named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            key = name.replace(".base_layer", "") + ".weight"
            found[key] = _unpack(module)
    return found


def _unpack(module: Any) -> Callable[[], Tensor]:
    def read() -> Tensor:
        found: Tensor = dequantize_module_weight(module).detach().float().cpu()
        return found

    return read


def write(merge: Merge, folder: Path, tell: Callable[[str], None] = lambda _line: None) -> None:
    """Weights in files of at most 2 GiB, with an index where there are several."""
    shards = list(_shards(merge))
    names = [f"model-{at + 1:05}-of-{len(shards):05}.safetensors" for at in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, some in zip(names, shards, strict=True):
        tell(name)
        save_file({one.name: merge.weight(one).contiguous() for one in some}, folder / name, {"format": "pt"})
    if len(shards) > 1:
        where = {one.name: name for name, some in zip(names, shards, strict=True) for one in some}
        index = {"metadata": {"total_size": merge.bytes()}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(to_json(index, 2) + "\n")


def _shards(merge: Merge) -> Iterator[list[Stored]]:
    some: list[Stored] = []
    size = 0
    for one in merge.tensors:
        own = numel(one) * merge.kind(one).itemsize
        if some and size + own > _SHARD:
            yield some
            some, size = [], 0
        some.append(one)
        size += own
    if some:
        yield some


def numel(one: Stored) -> int:
    """How many weights."""
    return torch.Size(one.shape).numel()


def copy_rest(base: Path, folder: Path, template: str, ends: Sequence[int], dtype: torch.dtype) -> None:
    """Configuration and tokenizer of the base, with this chat template and these tokens as ends; no path."""
    config = _read(base / "config.json")
    for key in ("_name_or_path", "quantization_config", "torch_dtype"):
        config.pop(key, None)
    _write(folder / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
    for name in _TOKENIZER:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    told = _read(base / "tokenizer_config.json")
    for key in ("name_or_path", "chat_template", "tokenizer_file"):
        told.pop(key, None)
    _write(folder / "tokenizer_config.json", told)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    generation = _read(base / "generation_config.json")
    generation = {key: value for key, value in generation.items() if not key.startswith("_")}
    eos = list(ends) if len(ends) > 1 else ends[0] if ends else None
    _write(folder / "generation_config.json", {**generation, "eos_token_id": eos})


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(to_json(body, 2) + "\n", encoding="utf-8")
