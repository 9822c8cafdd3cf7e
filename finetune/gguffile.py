"""Weights as llama.cpp's files: a model of Llama, Mistral or Qwen shape, or a LoRA adapter for one.

Tensors are asked for one at a time, so a model larger than the memory passes through. Names and the order of heads are
llama.cpp's (conversion/llama.py, convert_lora_to_gguf.py). It merges nothing and runs nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from finetune.errors import UserError, refuse

Floats = NDArray[np.float32]
DTYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
# transformers' model_type: llama.cpp's architecture, and whether it orders a head's rows in its own way
ARCHITECTURES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
}
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_REMEDY = "Name llama.cpp's own folder with --set converter=DIR, or use the `merged` export."


@dataclass(frozen=True)
class Shape:
    """What llama.cpp must know of a base, from its configuration (transformers' names)."""

    arch: gguf.MODEL_ARCH
    permuted: bool
    config: Any

    @property
    def heads(self) -> int:
        return int(self.config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        return int(self.config.num_key_value_heads or self.heads)

    @property
    def head_size(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads)

    def name(self, weight: str) -> str:
        """llama.cpp's name of a weight. Errors: UserError where it has none."""
        names = gguf.get_tensor_name_map(self.arch, int(self.config.num_hidden_layers))
        found = names.get_name(weight, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise refuse(f"llama.cpp has no place for the weight {weight}.", _REMEDY)
        return found

    def arranged(self, weight: str, values: Floats) -> Floats:
        """Rows (out, ...) in the order llama.cpp turns them: it pairs neighbours where transformers pairs halves."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(weight.split(".")[-2])
        if heads is None or not self.permuted:
            return values
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def shape(config: Any) -> Shape:
    """From a base's configuration. Errors: UserError for an architecture this room cannot write."""
    inner = config.get_text_config()
    known = ARCHITECTURES.get(str(inner.model_type))
    if known is None:
        what = (
            f"a base of the kind {inner.model_type} is not written for llama.cpp here: {', '.join(ARCHITECTURES)} are."
        )
        raise refuse(what, _REMEDY)
    return Shape(*known, inner)


def model_head(writer: GGUFWriter, shape: Shape, name: str, dtype: str) -> None:
    """What a model's file says of it, tokenizer aside. Errors: UserError for positions llama.cpp is not told here."""
    config = shape.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] not in ("default", "llama3"):
        raise refuse(f"its positions are scaled in the way {rope['rope_type']}, not written here.", _REMEDY)


def rope_factors(shape: Shape) -> Floats | None:
    """Llama 3's scaling, a factor for each pair of a head's rows; None where positions are not scaled so."""
    rope = shape.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    old = float(rope["original_max_position_embeddings"])
    found = []
    for at in range(0, shape.head_size, 2):
        wave = 2 * math.pi * float(rope["rope_theta"]) ** (at / shape.head_size)
        smooth = (old / wave - low) / (high - low)
        found.append(1.0 if wave < old / high else factor if wave > old / low else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


@dataclass(frozen=True)
class Weight:
    """A tensor by transformers' name, read when it is written."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Floats]


def write_model(path: Path, writer: GGUFWriter, shape: Shape, weights: Iterable[Weight], dtype: str) -> int:
    """The file, with all that `writer` was told before. Returns how many tensors. Errors: UserError."""
    told = [one for one in weights if not one.name.endswith("rotary_emb.inv_freq")]
    planned = [(shape.name(one.name), one, _kind(one.shape, dtype)) for one in told]
    extra = rope_factors(shape)
    for name, one, kind in planned:
        _announce(writer, name, one.shape, kind)
    if extra is not None:
        _announce(writer, "rope_freqs.weight", extra.shape, GGMLQuantizationType.F32)
    _begin(writer, path)
    for _, one, kind in planned:
        values = one.read()
        _refuse_overflow(one.name, values, kind)
        writer.write_tensor_data(_packed(shape.arranged(one.name, values), kind))
    if extra is not None:
        writer.write_tensor_data(extra)
    writer.close()
    return len(planned) + (extra is not None)


def write_adapter(path: Path, shape: Shape, weights: Mapping[str, Floats], about: Mapping[str, Any], name: str) -> int:
    """A LoRA adapter in fp32; `about`: adapter_config.json. Returns how many matrices it changes. Errors: UserError."""
    pairs = adapter_pairs(weights)
    alpha = _alpha(about, {one[0].shape[0] for one in pairs.values()})
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[shape.arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for module, (a, b) in pairs.items():
        place = shape.name(f"{module}.weight")
        writer.add_tensor(f"{place}.lora_a", a)
        writer.add_tensor(f"{place}.lora_b", shape.arranged(f"{module}.weight", b))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(pairs)


def adapter_pairs(weights: Mapping[str, Floats]) -> dict[str, tuple[Floats, Floats]]:
    """(A (rank, in), B (out, rank)) by module. Errors: UserError for a weight that is no LoRA matrix."""
    found: dict[str, dict[str, Floats]] = {}
    for name, values in weights.items():
        part = _LORA.fullmatch(name)
        if part is None:
            raise _no_adapter(f"it holds {name}, which is no matrix of a LoRA")
        found.setdefault(part[1], {})[part[2]] = values
    return {module: (both["A"], both["B"]) for module, both in sorted(found.items())}


def refuse_adapter(about: Mapping[str, Any]) -> None:
    """Errors: UserError for a kind of LoRA that is more than two matrices beside a frozen one."""
    kinds = {
        "use_dora": "it is a DoRA, which rescales the base's columns",
        "modules_to_save": "it replaces whole modules (modules_to_save)",
        "trainable_token_indices": "it changes rows of the embedding",
        "lora_bias": "its matrices have a bias",
        "layer_replication": "it repeats layers of the base",
    }
    for key, why in kinds.items():
        if about.get(key):
            raise _no_adapter(why)
    if about.get("bias", "none") != "none":
        raise _no_adapter("it changes biases of the base")
    if about.get("rank_pattern") or about.get("alpha_pattern"):
        raise _no_adapter("its scale differs from matrix to matrix")


def scale(about: Mapping[str, Any]) -> float:
    """What B A is multiplied by: alpha / rank, for rsLoRA alpha / sqrt(rank)."""
    rank = float(about["r"])
    return float(about["lora_alpha"]) / (math.sqrt(rank) if about.get("use_rslora") else rank)


def _alpha(about: Mapping[str, Any], ranks: set[int]) -> float:
    """llama.cpp divides by the rank it sees: rsLoRA's larger scale is folded in."""
    refuse_adapter(about)
    if ranks != {int(about["r"])}:
        raise _no_adapter(
            f"its matrices are of rank {', '.join(map(str, sorted(ranks)))}, its config says {about['r']}"
        )
    return scale(about) * float(about["r"])


def _no_adapter(why: str) -> UserError:
    remedy = "Merge it with PEFT's merge_and_unload, where it was made."
    return refuse(f"the adapter cannot be exported: {why}.", remedy)


def _kind(shape: Sequence[int], dtype: str) -> GGMLQuantizationType:
    """Vectors stay fp32; a row that does not divide into blocks stays f16."""
    kind = DTYPES[dtype][0]
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block == 0 else GGMLQuantizationType.F16


def _announce(writer: GGUFWriter, name: str, shape: Sequence[int], kind: GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, raw_dtype=kind)


def _begin(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _packed(values: Floats, kind: GGMLQuantizationType) -> NDArray[Any]:
    packed: NDArray[Any] = gguf.quantize(values, kind)
    return packed


def _refuse_overflow(name: str, values: Floats, kind: GGMLQuantizationType) -> None:
    if kind in (GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0) and np.abs(values).max(initial=0) > 65504:
        raise refuse(f"{name} has values too large for 16-bit floats.", "Write it with --dtype bf16.")
