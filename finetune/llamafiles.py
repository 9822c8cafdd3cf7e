"""The `gguf` export and the weights of the `ollama` one: llama.cpp's files, loaded by llama.cpp where it is installed.

llama.cpp's own converter writes them where the user has one, else our writer, for Llama, Mistral and Qwen shapes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import gguf
import psutil
import torch
from gguf import GGUFWriter
from safetensors.numpy import load_file
from torch import Tensor

from finetune import bundle, gguffile, jinjaform, llamacpp, merge, mergedfiles, model, prompts, slices, wordlist
from finetune.bundle import Bundle
from finetune.errand import Errand
from finetune.errors import refuse
from finetune.gguffile import Weight
from finetune.merge import Merge

Tell = Callable[[str], None]
_SCRIPTS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
_SMALL = 2 * 2**30  # bytes of a base below which one is written only to try the adapter on it
_ASKED, _TOKENS = 3, 32
_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}


def size(plan: Merge, dtype: str) -> float:
    """Bytes of a model's file."""
    return sum(merge.numel(one) for one in plan.tensors) * _BYTES[dtype]


def bare_plan(errand: Errand) -> Merge:
    """The base alone: as published, or as it was trained on."""
    unpacked = merge.unpacked(errand.worn().model) if errand.wish.onto == "dequantised" else {}
    return Merge(tuple(merge.stored(errand.opened.base.folder)), {}, 1.0, unpacked, torch.float32)


def to_gguf(errand: Errand, plan: Merge, made: Bundle, tell: Tell) -> None:
    """Fill the folder with an adapter's and a model's file."""
    dtype = errand.wish.dtype or "f16"
    made.facts |= {**errand.facts(), "onto": errand.wish.onto, "dtype": dtype}
    if errand.wish.only != "model":
        lora = made.folder / f"{errand.name}-lora.gguf"
        write_adapter(errand, lora, made, tell)
        if errand.wish.check and plan.bytes() < _SMALL:
            _try_on_a_base(errand, lora, made, tell)
        elif errand.wish.check:
            made.warnings.append(f"{lora.name} was not loaded: its base is large, and none is here as GGUF")
        made.next.append(
            ("llama.cpp", f"llama-server -m BASE.gguf --lora {lora.name}, BASE being {made.facts['base']}")
        )
    if errand.wish.only != "adapter":
        whole = made.folder / f"{errand.name}-{dtype}.gguf"
        write_model(errand, plan, whole, errand.name, made, tell)
        mergedfiles.told_of_rounding(made, plan.count, dtype)
        try_out(errand, made, tell, whole)
        made.next.append(("llama.cpp", f"llama-server -m {whole.name} --jinja"))
        made.next.append(("KoboldCpp", f"koboldcpp --model {whole.name}; sft export RUN --to presets has its tags"))
        made.next.append(("smaller", f"llama-quantize {whole.name} {errand.name}-Q4_K_M.gguf Q4_K_M"))


def rounded_to(dtype: str) -> Callable[[Tensor], Tensor]:
    """What a file of this kind keeps of fp32 weights, in fp32."""
    kind = gguffile.DTYPES[dtype][0]

    def keep(values: Tensor) -> Tensor:
        if kind in gguf.GGML_QUANT_SIZES and values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            return values.half().float()
        packed = gguf.quantize(values.contiguous().numpy(), kind)
        return torch.from_numpy(gguf.dequantize(packed, kind).reshape(values.shape).copy())

    return keep


# --- writing ---------------------------------------------------------------------------------------------------------


def write_model(errand: Errand, plan: Merge, path: Path, name: str, made: Bundle, tell: Tell) -> None:
    """A model's file, merged as `plan` says. Errors: UserError."""
    dtype = errand.wish.dtype or "f16"
    tell(f"writing {path.name}")
    if (script := converter(errand, _SCRIPTS[0])) is not None:
        _convert_model(errand, plan, path, script, dtype)
        made.facts["written_by"] = script.name
    else:
        shape = gguffile.shape(_config(errand))
        writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[shape.arch])
        gguffile.model_head(writer, shape, name, dtype)
        words = wordlist.read(errand.opened.base.folder, int(shape.config.vocab_size))
        template = jinjaform.chat_template(errand.format, errand.vocabulary)
        wordlist.write(writer, words, errand.vocabulary, mergedfiles.end_mark(errand), template)
        gguffile.write_model(path, writer, shape, _weights(plan, shape.config), dtype)
        made.facts["written_by"] = "sft"
    tensors = len(gguf.GGUFReader(path).tensors)
    made.verified.append(f"{path.name}: {tensors} tensors read back, {bundle.size(path.stat().st_size)}")


def _weights(plan: Merge, config: Any) -> Iterator[Weight]:
    for one in plan.tensors:
        if one.name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield Weight(one.name, one.shape, lambda one=one: plan.weight(one).float().contiguous().numpy())  # type: ignore[misc]


def write_adapter(errand: Errand, path: Path, made: Bundle, tell: Tell) -> None:
    """An adapter's file. Errors: UserError for a kind llama.cpp has no words for."""
    folder = errand.opened.adapter
    about = json.loads((folder / model.ADAPTER_CONFIG).read_text())
    gguffile.refuse_adapter(about)
    tell(f"writing {path.name}")
    script = None if about.get("use_rslora") else converter(errand, _SCRIPTS[1])  # it leaves rsLoRA's scale out
    if script is not None:
        _run(script, folder, "--base", errand.opened.base.folder, "--outfile", path, "--outtype", "f32")
    else:
        shape = gguffile.shape(_config(errand))
        gguffile.write_adapter(path, shape, load_file(folder / model.ADAPTER_WEIGHTS), about, errand.name)
    read = gguf.GGUFReader(path)
    alpha = float(read.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    made.verified.append(
        f"{path.name}: {len(read.tensors) // 2} matrices read back, alpha {alpha:g}, rank {about['r']}"
    )


def _config(errand: Errand) -> Any:
    folder = errand.opened.base.folder
    return slices.config(folder, slices.Slice(0, slices.layer_count(folder)))


def converter(errand: Errand, script: str) -> Path | None:
    """llama.cpp's script: in the folder named, in $LLAMA_CPP, or on the PATH. Errors: UserError if not where named."""
    named = errand.wish.converter
    if named is not None:
        found = named if named.name == script else (named if named.is_dir() else named.parent) / script
        if not found.is_file():
            raise refuse(f"--set converter={named}: there is no {script}.", "Name llama.cpp's own folder.")
        return found
    home = os.environ.get("LLAMA_CPP")
    if home and (Path(home) / script).is_file():
        return Path(home) / script
    there = shutil.which(script)
    return Path(there) if there else None


def _convert_model(errand: Errand, plan: Merge, path: Path, script: Path, dtype: str) -> None:
    """By way of a merged folder, which goes again."""
    aside = path.parent / f".{errand.name}"
    bundle.require(path.parent, plan.bytes())
    aside.mkdir()
    try:
        merge.write(plan, aside)
        template = jinjaform.chat_template(errand.format, errand.vocabulary)
        merge.copy_rest(errand.opened.base.folder, aside, template, mergedfiles.ends(errand), torch.float32)
        _run(script, aside, "--outfile", path, "--outtype", dtype, "--model-name", errand.name)
    finally:
        shutil.rmtree(aside)


def _run(script: Path, *words: object) -> None:
    done = subprocess.run([sys.executable, str(script), *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no word of why").splitlines()[-1]
        what = f"{script.name} failed: {last[:200]}"
        raise refuse(what, "Mend llama.cpp's folder, or take it out of LLAMA_CPP and PATH: sft has a writer too.")


# --- trying out ------------------------------------------------------------------------------------------------------


def try_out(errand: Errand, made: Bundle, tell: Tell, whole: Path, adapter: Path | None = None) -> None:
    """Let llama.cpp load files and answer, beside the trained model; say what came of it. Errors: UserError."""
    what = whole.name if adapter is None else f"{adapter.name} on {whole.name}"
    if not errand.wish.check:
        made.warnings.append(f"{what} was not loaded (check=no)")
        return
    if not llamacpp.installed():
        made.warnings.append(f"{what} was not loaded by llama.cpp: pip install xllamacpp, and export again")
        return
    free = psutil.virtual_memory().available
    if whole.stat().st_size * 1.2 > free:
        made.warnings.append(f"{what} was not loaded: it needs {whole.stat().st_size * 1.2 / 2**30:.1f} GiB of memory")
        return
    tell(f"loading {what} in llama.cpp")
    asked = errand.questions(_ASKED)
    texts = [prompts.prompt_text(turns, errand.format, errand.vocabulary) for turns, _ in asked]
    ids = [one.asked for _, one in asked]
    try:
        heard = llamacpp.hear(whole, ids, _TOKENS, adapter, texts)
    except llamacpp.Unreadable as fault:
        raise RuntimeError(str(fault)) from fault
    cut = sum(tuple(own) == tuple(theirs) for own, theirs in zip(ids, heard.ids, strict=True))
    told = f"{what}: loaded by llama.cpp, which cuts {cut} of {len(ids)} questions into the tokens of training"
    (made.verified if cut == len(ids) else made.warnings).append(told)
    answers = errand.worn().speaker.complete(ids, (), _TOKENS)
    _compare(made, what, [one.text for one in answers], list(heard.answers))


def _compare(made: Bundle, what: str, own: list[str], theirs: list[str]) -> None:
    same = sum(one.strip() == other.strip() for one, other in zip(own, theirs, strict=True))
    together = [_together(*pair) for pair in zip(own, theirs, strict=True)]
    made.facts.setdefault("llama_cpp", {})[what] = {"asked": len(own), "same": same, "characters": together}
    told = f"{what}: {same} of {len(own)} greedy answers are the trained model's, {_TOKENS} tokens each"
    if same < len(own):
        told += f"; the others part after {min(together)} characters or more, for weights are rounded otherwise"
    made.verified.append(told)


def _together(one: str, other: str) -> int:
    """Characters that two texts have in common from their start."""
    return len(list(takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False))))


def _try_on_a_base(errand: Errand, lora: Path, made: Bundle, tell: Tell) -> None:
    """A base is written for that, and goes again."""
    aside = made.folder / "base.gguf"
    unwritten = Bundle(made.folder)
    write_model(errand, bare_plan(errand), aside, errand.base_name, unwritten, lambda _line: None)
    try:
        try_out(errand, made, tell, aside, lora)
    finally:
        aside.unlink()
