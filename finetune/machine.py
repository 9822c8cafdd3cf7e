"""What run.json records: machine, libraries, numbers with reasons. Imports no library; no host, user or path in it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
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
