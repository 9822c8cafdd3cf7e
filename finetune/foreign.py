"""An adapter made elsewhere: found in a folder or on the Hub, and worn by a base the way plain PEFT does it.

Safetensors only; any shape of LoRA that PEFT knows and that leaves the base as it was. It judges nothing.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune import model
from finetune.errors import refuse
from finetune.model import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin that move weights of the base, with or without it


@dataclass(frozen=True)
class Adapter:
    """An adapter on this machine. `of`: as the user named it; `name`: the last part of that, for a folder's name."""

    of: str
    folder: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        parts = [part for part in Path(self.of).absolute().parts if part not in ("adapter", "adapters")]
        return parts[-1] if parts else "adapter"

    def remarks(self, base: str) -> Iterator[str]:
        """What does not fit together, but may be meant."""
        own = self.config.get("base_model_name_or_path")
        if own and Path(str(own)).name != Path(base).name:
            yield f"The adapter says that it was trained on {own}; the recipe's base is {base}."


def find(target: str) -> Adapter:
    """A folder, or a Hub id that is fetched. Errors: UserError, also without a network."""
    folder = Path(target)
    if not folder.exists() and is_hub_id(target):
        folder = _fetched(target)
    if not folder.is_dir():
        raise refuse(f"{target} is neither a folder nor a Hub id.", "Name a run, an adapter's folder, or user/name.")
    return Adapter(target, folder, _config(folder, target))


def is_hub_id(target: str) -> bool:
    """`runs/typo` is a folder that is missing, `user/name` is not."""
    return bool(_HUB_ID.fullmatch(target)) and not Path(target).parent.is_dir()


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.errors import RepositoryNotFoundError as Missing

    try:
        return Path(snapshot_download(name, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS]))
    except GatedRepoError:
        raise refuse(f"{name} is gated.", "Accept its terms on its page, then run `hf auth login`.") from None
    except LocalEntryNotFoundError:
        what = f"{name} is no folder here, and the Hub cannot be reached."
        raise refuse(what, "Check the name and the connection, or name a folder.") from None
    except (Missing, HFValidationError):
        raise refuse(f"{name} is not on the Hub, or is private.", "Check the name or run `hf auth login`.") from None
    except Exception as fault:  # the client and its transport raise many kinds; each means: not fetched
        what = f"{name} could not be fetched ({type(fault).__name__})."
        raise refuse(what, "Check the connection, or name a folder.") from fault


def _config(folder: Path, target: str) -> dict[str, Any]:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise refuse(f"{target} holds no {ADAPTER_CONFIG}.", "Name a run, or the folder of a PEFT adapter.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise refuse("is no JSON object.", "Fetch or save the adapter again.", path)
    if (folder / "adapter_model.bin").is_file() and not (folder / ADAPTER_WEIGHTS).is_file():
        remedy = "Load it where you trust it, and save it again with safe_serialization=True."
        raise refuse(f"{target} holds pickled weights, and those are not loaded.", remedy)
    _refuse_kind(found, target)
    return found


def _refuse_kind(config: dict[str, Any], target: str) -> None:
    kind, begun = str(config.get("peft_type")), str(config.get("init_lora_weights")).lower()
    if kind != "LORA":
        raise refuse(f"{target} is an adapter of the kind {kind}.", "Only LoRA can be examined.")
    if begun.startswith(_CHANGES_BASE):
        what = f"{target} was begun with {begun}, which changes the base under it."
        raise refuse(what, "Save it as a plain LoRA (path_initial_model_for_weight_conversion) and come again.")


def wear(bare: Any, adapter: Adapter) -> Any:
    """A PeftModel in eval mode, adapter and sums in fp32. Errors: UserError where it does not fit the base."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is refused below, in words
            worn = PeftModel.from_pretrained(bare, str(adapter.folder), is_trainable=False)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as fault:
        told = str(fault).strip().splitlines() or [type(fault).__name__]
        what = f"{adapter.of} does not fit this base: {told[0][:160]}"
        raise refuse(what, "Give the recipe whose `base` it was trained on.") from fault
    if strange := _strange(worn, adapter.folder):
        what = f"{adapter.of} does not fit this base: {len(strange)} weights have no place, first {strange[0]}."
        raise refuse(what, "Give the recipe whose `base` it was trained on.")
    model.sum_in_fp32(worn)
    return worn.eval()


def _strange(worn: Any, folder: Path) -> list[str]:
    """LoRA weights of the file that the model lacks, or that the file does not hold."""
    from peft import get_peft_model_state_dict

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        given = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118  # safetensors has no other way
    own = {name for name in get_peft_model_state_dict(worn, save_embedding_layers=False) if "lora_" in name}
    return sorted(given ^ own)
