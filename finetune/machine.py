"""What run.json records: machine, libraries, numbers with reasons. Imports no library; no host, user or path in it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OURS = (
    "minisymposium",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "tokenizers",
)


@dataclass(frozen=True)
class Derived:
    """A number worked out for the user, with its reason; run.json holds both."""

    value: Any
    reason: str


def environment() -> dict[str, Any]:
    """Versions (None: not installed), processors, memory in GiB (2^30 bytes; None: unknown)."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "memory_gib": memory_gib(),
        "versions": {name: _version(name) for name in _OURS},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def speed() -> dict[str, Any]:
    """What decides how fast this machine trains: processor, threads that training takes, card, versions."""
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 2) - 1)  # as `model.spare_a_core` does
    versions = {name: _version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return {"processor": _processor(), "threads": str(threads), "card": _card(), "versions": versions}


def _processor() -> str:
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _card() -> str | None:
    """Name of the first NVIDIA card, as its driver tells it; None where there is none."""
    if (told := shutil.which("nvidia-smi")) is None:
        return None
    words = [told, "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() if found else None


if sys.platform == "win32":
    import ctypes

    def memory_gib() -> float | None:
        """Of the host."""
        kib = ctypes.c_ulonglong(0)
        known = ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kib))
        return round(kib.value / 2**20, 2) if known else None

else:

    def memory_gib() -> float | None:
        """Of the host."""
        try:
            return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 2)
        except (ValueError, OSError):
            return None
