"""What is known of a base without loading or fetching it: its tokenizer, its shape, what is still to be downloaded.

Looks at pocket, at a folder, or at the Hub's cache on this disk; never at the network. Where the tokenizer is not at
hand a stand-in counts four characters a token, and says so. It reads no weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from finetune import memory
from finetune.errors import Problem, UserError, refuse
from finetune.masks import Vocabulary
from finetune.memory import GIB, Shape

POCKET = Path(__file__).with_name("pocket_base")
CHARACTERS = 4  # a token of the stand-in: usual for English text in vocabularies of 32,000 and more
_INDEX, _ONE = "model.safetensors.index.json", "model.safetensors"
_SMALL = ("config.json", "tokenizer.json", "tokenizer_config.json")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
# for a template nobody has seen: turns, and a mark that ends them
_ANY_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Known:
    """What is known of a base. `counted`: the vocabulary is the base's own; else `remedy` says how to get it.

    `download`: GiB still to come, None where nobody here knows; `download_from` and `shape_from` name the sources.
    `config`: its config.json, where that is on this disk.
    """

    name: str
    vocabulary: Vocabulary
    counted: bool
    shape: Shape | None
    shape_from: str
    download: float | None = 0.0
    download_from: str = "which is on this computer"
    cached: bool = True
    remedy: str = ""
    config: Mapping[str, Any] | None = None


def look_up(base: str, revision: str | None = None) -> Known:
    """Everything about a base named in a recipe. UserError where its folder or its cached files are unusable."""
    if base == "pocket":
        return _in_folder("pocket", POCKET)
    if Path(base).exists():
        return _in_folder(Path(base).resolve().name, Path(base))
    return _on_hub(base, revision)


def _in_folder(name: str, folder: Path) -> Known:
    config = _config(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise refuse(f"base: {folder} holds no weights.", "A base has .safetensors files.", key=("base",))
    return Known(name, Vocabulary.load(folder), True, shape_of(config), f"{name}'s config.json", config=config)


def _on_hub(base: str, revision: str | None) -> Known:
    here = _cached(base, revision)
    config, folder = here("config.json"), here("tokenizer.json")
    shape, source, told = None, "", _config(config) if config else None
    if told is not None:
        shape, source = shape_of(told), f"{base}'s config.json, in the cache"
    elif shape := memory.well_known(base):
        source = f"a built-in table: {base} is not in the cache"
    if folder:
        vocabulary, remedy = Vocabulary.load(folder.parent), ""
    else:
        at = f" --revision {revision}" if revision else ""
        vocabulary, remedy = stand_in(), f"hf download {base} {' '.join(_SMALL)}{at}"
    size, why = _to_come(here, shape)
    return Known(base, vocabulary, folder is not None, shape, source, size, why, told is not None, remedy, told)


class _cached:
    """Asks the Hub's cache for the files of one repository."""

    def __init__(self, repo: str, revision: str | None) -> None:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        self._repo, self._revision, self._ask, self._invalid = repo, revision, try_to_load_from_cache, HFValidationError

    def __call__(self, name: str) -> Path | None:
        """Where a file lies, if it is there."""
        try:
            found = self._ask(self._repo, name, revision=self._revision)
        except self._invalid:
            raise refuse(f"base: {self._repo} is no Hub id.", "Write owner/name.", key=("base",)) from None
        return Path(found) if isinstance(found, str) else None


def _to_come(here: _cached, shape: Shape | None) -> tuple[float | None, str]:
    """GiB of safetensors that are not in the cache yet, and how that is known."""
    index = _json(path) if (path := here(_INDEX)) else {}
    files, total = index.get("weight_map"), index.get("metadata")
    names = {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else set()
    missing = [name for name in names if not here(name)]
    if here(_ONE) or (names and not missing):
        return 0.0, "which is in the cache"
    size = total.get("total_size") if isinstance(total, dict) else None
    if names and isinstance(size, (int, float)):
        return size * len(missing) / len(names) / GIB, f"{len(missing)} of {len(names)} files of its index"
    if shape:
        return 2.0 * shape.weights / GIB, "at two bytes a weight; it is not in the cache"
    return None, "which is not in the cache, and the network is not asked"


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """From a config.json; None where it is not of Llama's kind (mixtures of experts are not)."""
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
    width, layers = _whole(config, "intermediate_size"), _whole(config, "num_hidden_layers")
    words = _whole(config, "vocab_size")
    if not (hidden and heads and width and layers and words) or any(config.get(key) for key in _EXPERTS):
        return None
    kv = _whole(config, "num_key_value_heads") or heads
    head = _whole(config, "head_dim") or hidden // heads
    return Shape(hidden, width, layers, heads, kv, head, words, config.get("tie_word_embeddings") is True)


def _whole(config: Mapping[str, Any], key: str) -> int:
    """A count in a config; 0 where it is missing or is none."""
    value = config.get(key)
    return value if type(value) is int and 0 < value < 10**9 else 0


def shape_in(folder: Path) -> Shape | None:
    """Of a base on the disk; None where its config.json has other words. Errors: UserError where there is none."""
    return shape_of(_config(folder / "config.json"))


def lora_problems(shape: Shape | None, targets: tuple[str, ...], top: int | None) -> Iterator[Problem]:
    """What an adapter asks for that a base of this shape has not. Nothing where the shape is unknown."""
    if shape is None:
        return
    for number, name in enumerate(targets):
        if name not in shape.matrices:
            remedy = f"Its layers have {', '.join(shape.matrices)}."
            yield Problem(f"lora.targets: this base has no {name}.", remedy, key=("lora", "targets", number))
    if top is not None and top > shape.layers:
        what = f"lora.layers: top {top} of {shape.layers} layers."
        yield Problem(what, f"Give at most {shape.layers}, or all.", key=("lora", "layers", "top"))


def stand_in() -> Vocabulary:
    """A vocabulary that counts: every four characters are one token, with BOS, EOS and a simple chat template."""
    counter = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2}, unk_token="?"))  # type: ignore[no-untyped-call,unused-ignore]
    counter.pre_tokenizer = pre_tokenizers.FixedLength(length=CHARACTERS)
    counter.add_special_tokens(["<s>", "</s>"])
    return Vocabulary.of(counter, "<s>", "</s>", _ANY_TEMPLATE)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise refuse(f"base: {path.parent} holds no config.json.", "Is this the folder of a base?", key=("base",))
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"this is not JSON: {error}.", "Fetch the base again.", path) from None
    if not isinstance(said, dict):
        raise UserError(Problem("this holds no settings.", "Fetch the base again.", path))
    return said
