"""Real llama.cpp, where it is installed (`pip install xllamacpp`): load a file on the CPU and hear what it says.

It runs in a process of its own: a file it cannot read ends that one, not ours. It judges and writes nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_CONTEXT = 2048  # tokens of prompt and answer together


@dataclass(frozen=True)
class Heard:
    """Greedy answers, one a prompt, and the ids llama.cpp gives each text."""

    answers: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]


class Unreadable(RuntimeError):
    """llama.cpp could not load the file, or died of it."""


def installed() -> bool:
    """Whether xllamacpp is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def hear(
    model: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    adapter: Path | None = None,
    texts: Sequence[str] = (),
) -> Heard:
    """Answers of up to `tokens` tokens to prompts of ids, with an adapter if given. Errors: Unreadable."""
    asked = {
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "prompts": [list(one) for one in prompts],
        "tokens": tokens,
        "texts": list(texts),
    }
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        try:
            answers, ids = apart.submit(_there, asked).result()
        except (BrokenProcessPool, RuntimeError) as fault:
            raise Unreadable(f"llama.cpp cannot load {model.name}: {fault}") from fault
    return Heard(tuple(answers), tuple(map(tuple, ids)))


def _there(asked: dict[str, Any]) -> tuple[list[str], list[list[int]]]:
    """In the other process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["model"]
    if asked["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(asked["adapter"], 1.0)]
    params.n_ctx, params.n_parallel, params.n_gpu_layers = _CONTEXT, 1, 0
    params.verbosity, params.warmup, params.port = -1, False, 0
    # as exact as transformers: a cache of 16 bits would decide near ties otherwise
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    # its threads wait for one another spinning: where another program has a core, each token takes a second
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 2) - 1)))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    return [_answer(server, one, asked["tokens"]) for one in asked["prompts"]], [
        _ids(server, text) for text in asked["texts"]
    ]


def _answer(server: Any, prompt: list[int], tokens: int) -> str:
    said = server.handle_completions({"prompt": prompt, "n_predict": tokens, "temperature": 0, "top_k": 1})
    if "choices" not in said:
        raise RuntimeError(json.dumps(said)[:300])
    return str(said["choices"][0]["text"])


def _ids(server: Any, text: str) -> list[int]:
    """As a client's text is cut: BOS first, special tokens recognised."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    asked = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as reply:
        found: list[int] = json.load(reply)["tokens"]
    return found
