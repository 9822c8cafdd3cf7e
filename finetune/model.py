"""Load a base in 4-bit, attach or read an adapter, prove that adapter and residual stream are fp32.

What it will not: train, measure text, or know a recipe. It stands on measured facts: a bf16 adapter stops moving near
512 x LR, and a bf16 residual stream rounds a small adapter's effect away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.utils import logging as talk

from finetune import disk, packed, slices, varlen
from finetune.errors import Problem, UserError, refuse
from finetune.slices import Slice

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POCKET = Path(__file__).with_name("pocket_base")
_NOT_BASE = ["consolidated*", "*/*"]  # the same weights once more, in other layouts
_BASE_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True)
class Base:
    """A base on disk. `name`, what an adapter may say it belongs to: a Hub id, a folder's own name, never a path."""

    name: str
    folder: Path
    commit: str | None = None  # of the Hub's repository


def find_base(base: str, revision: str | None = None, online: bool = True) -> Base:
    """The base's folder. A Hub id is downloaded, `online` (safetensors and text files only). Errors: UserError."""
    if base == "pocket":
        return Base("pocket", POCKET)
    if Path(base).is_dir():
        return Base(Path(base).resolve().name, Path(base))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        wanted: dict[str, Any] = {"allow_patterns": _BASE_FILES, "ignore_patterns": _NOT_BASE}
        found = str(snapshot_download(base, revision=revision, local_files_only=not online, **wanted))
    except GatedRepoError:
        raise _no_base(base, "is gated", "Accept its licence on its page, then run `hf auth login`.") from None
    except RevisionNotFoundError:
        raise _no_base(base, f"has no revision {revision}", "Name a branch, tag or commit it has.") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise _no_base(base, "is not on the Hub, or is private", "Check the name or run `hf auth login`.") from None
    except Exception as fault:  # the client and its transport raise many kinds; each means: not fetched
        if disk.is_full(fault, Path.home()):
            raise _no_base(base, "does not fit on the disk", "Free some space in the Hub's cache folder.") from fault
        if not online:
            raise _no_base(base, "is no longer on this machine", f"Fetch it: hf download {base}") from None
        remedy = "Check the connection and start again, or name a folder, or `base: pocket`."
        raise _no_base(base, f"could not be fetched ({type(fault).__name__})", remedy) from fault
    return Base(base, Path(found), Path(found).name)


def _no_base(base: str, what: str, remedy: str) -> UserError:
    return UserError(Problem(f"base: {base} {what}.", remedy, key=("base",)))


def fingerprint(folder: Path) -> str:
    """sha256 over a base's text files (configuration, tokenizer, template) and the names and sizes of its weights."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.jinja"))):
        digest.update(path.name.encode() + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()


def pick_device() -> torch.device:
    """CUDA where there is one, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def spare_a_core() -> None:
    """One thread fewer than cores, unless OMP_NUM_THREADS says otherwise.

    Threads that wait for one another slow down about tenfold as soon as another program takes a core (measured on two).
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def device_remark() -> str | None:
    """A word where the machine has an NVIDIA card that this torch cannot use, as PyPI's build for Windows cannot."""
    if torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    return "There is an NVIDIA card, but this torch cannot use it: install the CUDA build of torch to train on it."


def describe(device: torch.device) -> dict[str, Any]:
    """What run.json says of the device: name, memory in GiB, threads on a CPU."""
    if device.type != "cuda":
        return {"type": device.type, "threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(device)
    return {"type": "cuda", "name": about.name, "gib": about.total_memory / 2**30}


def working_precision(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 autocast on CUDA; on a CPU everything stays fp32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def load_base(folder: Path, quantization: str, device: torch.device, part: Slice | None = None) -> Any:
    """A frozen causal LM in eval mode on `device`: nf4 (double quantised), int8 or none. Errors: UserError.

    `part`: a model of some of its layers alone.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    talk.disable_progress_bar()
    how = {
        "dtype": dtype,
        "quantization_config": _bits(quantization, dtype),
        "device_map": {"": device},
        "trust_remote_code": False,
        "use_safetensors": True,
        "attn_implementation": varlen.NAME,
    }
    try:
        model = slices.load(folder, part, how) if part else packed.load(folder, quantization == "nf4", how)
    except (OSError, ValueError, SafetensorError) as fault:
        what = f"base: {folder.name} cannot be loaded: {str(fault).splitlines()[0]}"
        raise refuse(what, "It needs a config.json and the safetensors of a causal language model.") from fault
    model.requires_grad_(False)
    model.eval()
    packed.keep_layout(model)
    _residual_in_fp32(model)
    if part is None or part.outside:
        _prove_logits(model)
    return model


def let_go(net: nn.Module) -> None:
    """Free a model that nobody needs any more as soon as the last name of it goes.

    bitsandbytes ties each 4-bit weight and its layer in a circle, which else stays on the device until Python happens
    to look for circles.
    """
    for weight in net.parameters():
        if getattr(weight, "module", None) is not None:
            weight.module = None  # type: ignore[attr-defined]  # of Params4bit


def _bits(quantization: str, dtype: torch.dtype) -> Any:
    if quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "int8" else None


def _residual_in_fp32(model: Any) -> None:
    """Norms and the embedding's *output* in fp32: the stream they feed stays fp32, table and head keep their dtype."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
            module.float()
    model.get_input_embeddings().register_forward_hook(lambda _module, _given, hidden: hidden.float())


def bare(model: Any) -> Any:
    """The causal language model itself, without PEFT's wrapper; an adapter's layers stay inside it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def logits_of(plain: Any, hidden: Tensor) -> Tensor:
    """Last hidden states (n, hidden) to fp32 logits (n, vocabulary), as the model's own forward makes them."""
    head = plain.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if not torch.is_autocast_enabled(hidden.device.type):  # autocast finds the dtype by itself, without an fp32 copy
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    logits: Tensor = nn.functional.linear(hidden, weight, bias).float()
    cap = getattr(plain.config.get_text_config(), "final_logit_softcapping", None)  # Gemma 2 and later
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _prove_logits(model: Any) -> None:
    """Only positions in the loss go through the head, so the head must be ours to call. Errors: UserError."""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), working_precision(device):
        whole = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = logits_of(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(whole, ours, rtol=2e-2, atol=2e-2):
        what = f"base: {type(model).__name__} scales its logits in a way that is not known here."
        raise refuse(what, "Use a Llama, Mistral, Qwen or Gemma shaped base.")


def decoder_layers(model: Any) -> nn.ModuleList:
    """The base's stack of decoder layers, lowest first. Errors: UserError for an architecture without one."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not stacks:
        what = f"base: {type(model).__name__} has no stack of decoder layers."
        raise refuse(what, "Use a decoder-only language model.")
    return stacks[0]


def trained_layers(model: Any) -> list[Any]:
    """The decoder layers that hold trained weights, lowest first."""
    return [layer for layer in decoder_layers(model) if any(w.requires_grad for w in layer.parameters())]


@dataclass(frozen=True)
class LoraShape:
    """What an adapter looks like. `top`: only that many uppermost layers, None for all."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    top: int | None = None


def attach(model: Any, shape: LoraShape, seed: int) -> Any:
    """A PeftModel with a fresh fp32 LoRA adapter drawn from `seed` (lora_B is zero: the base is unchanged)."""
    layers = len(decoder_layers(model))
    _refuse_unknown_targets(model, shape.targets)
    if shape.top is not None and shape.top > layers:
        raise refuse(f"lora.layers: top {shape.top} of {layers} layers.", f"Give at most {layers}, or `all`.")
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=list(shape.targets),
        layers_to_transform=None if shape.top is None else list(range(layers - shape.top, layers)),
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    sum_in_fp32(adapted)
    assert_fp32_adapter(adapted)
    return adapted.train()  # every module alike, so that a look that restores the mode changes nothing


def sum_in_fp32(model: nn.Module) -> None:
    """PEFT adds an adapter in the dtype of the base's output, so that must be fp32 at every adapted layer."""
    for module in _adapted(model):
        module.base_layer.register_forward_hook(lambda _module, _given, output: output.float())


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def _refuse_unknown_targets(model: nn.Module, targets: Iterable[str]) -> None:
    inside = decoder_layers(model)[-1]
    linears = {name.rsplit(".", 1)[-1] for name, module in inside.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in targets if target not in linears]:
        what = f"lora.targets: this base has no {', '.join(missing)}."
        raise refuse(what, f"Its linear layers are {', '.join(sorted(linears))}.")


def adapter_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained weight by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def assert_fp32_adapter(model: nn.Module) -> None:
    """Errors: RuntimeError if any trained weight is not fp32. Such an adapter does not learn at a low LR."""
    wrong = [name for name, weight in adapter_weights(model).items() if weight.dtype != torch.float32]
    if wrong:
        raise RuntimeError(f"{len(wrong)} adapter weights are not fp32, first {wrong[0]}")


def assert_fp32_residual(model: Any) -> None:
    """One forward of one token: outputs of layers and adapted matrices must be fp32. Errors: RuntimeError."""
    seen: list[torch.dtype] = []

    def record(_module: nn.Module, _given: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).dtype)

    hooks = [module.register_forward_hook(record) for module in (*decoder_layers(model), *_adapted(model))]
    device = next(model.parameters()).device
    try:
        with frozen_random_state(), torch.no_grad(), working_precision(device):
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if set(seen) != {torch.float32}:
        raise RuntimeError(f"the residual stream is {sorted(map(str, set(seen)))}, not fp32")


def save_adapter(model: Any, folder: Path, base_name: str) -> None:
    """Weights (safetensors) and config into `folder`: plain PEFT loads them, equal weights are equal bytes, no path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT looks for the base's config to see whether embeddings grew; they do not
        model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_name
    for key in ("target_modules", "layers_to_transform"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_weights(model: Any, folder: Path) -> None:
    """Put the adapter in `folder` into `model`, which must have the same shape. Errors: UserError."""
    given, own = load_file(folder / ADAPTER_WEIGHTS), get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: weight.shape for name, weight in given.items()} != {name: weight.shape for name, weight in own.items()}:
        raise refuse(
            f"{folder}: this adapter has another shape than the recipe's.", "Start with --fresh, or restore the recipe."
        )
    set_peft_model_state_dict(model, given)
    assert_fp32_adapter(model)


@contextmanager
def frozen_random_state() -> Iterator[None]:
    """What happens inside leaves torch's random state (CPU and CUDA) as it was."""
    cpu = torch.random.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.random.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class Start:
    """The adapter as it began, on the CPU, to tell later whether and how far it moved."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {name: weight.detach().to("cpu", copy=True) for name, weight in adapter_weights(model).items()}

    def movement(self, model: nn.Module) -> Movement:
        """How far the adapter is from its start."""
        moved = entries = 0
        square = total = 0.0
        count = 0
        for name, weight in adapter_weights(model).items():
            step = weight.detach().to("cpu") - self._weights[name]
            square += float(step.double().square().sum())
            total += float(step.double().abs().sum())
            count += step.numel()
            if "lora_A" in name:
                moved += int(torch.count_nonzero(step))
                entries += step.numel()
        return Movement(moved / max(entries, 1), square**0.5, total / max(count, 1))


@dataclass(frozen=True)
class Movement:
    """`share` of lora_A entries that differ from the start; `distance` (L2) and `mean` absolute change of all."""

    share: float
    distance: float
    mean: float


def gradient_over_eps(model: nn.Module, eps: float) -> float | None:
    """Median over weights of rms(gradient) / eps; near 1 or below, eps swallows the step. None: no gradients."""
    gradients = [weight.grad for weight in adapter_weights(model).values() if weight.grad is not None]
    ratios = [float(gradient.double().square().mean().sqrt()) / eps for gradient in gradients]
    return float(torch.tensor(ratios).median()) if ratios else None


def gib_in_use(device: torch.device) -> float:
    """GiB (2^30 bytes): peak allocated on CUDA since start, else the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import psutil

    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**30
