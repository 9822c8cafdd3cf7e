"""Tensors kept on the disk between runs: found by what they were made from, mapped into memory, never trusted unread.

Each is hashed when it is first read; a damaged one is dropped and made again. What was longest unused goes first when
the shelf is full. It does not know what the tensors mean.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from finetune import disk

_NAME = "kept"


def name_of(ids: Sequence[int]) -> str:
    """The name of what was made from these tokens."""
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


class Depot:
    """One folder of tensors made in one way (`made`, by whatever tells it apart), all folders within `limit` bytes."""

    def __init__(self, root: Path, made: str, limit: int) -> None:
        self._root, self._folder, self._limit = root, root / hashlib.sha256(made.encode()).hexdigest()[:16], limit
        self._good: set[str] = set()  # read and found whole, in this process
        self._size: int | None = None
        self.damaged = 0

    def get(self, name: str) -> Tensor | None:
        """A kept tensor, backed by its file; None where there is none, or a damaged one, which goes."""
        path = self._path(name)
        try:
            with safe_open(path, "pt") as opened:
                kept: Tensor = opened.get_tensor(_NAME)
                told = (opened.metadata() or {}).get("sha256")
            if name in self._good or told == _digest(kept):
                self._mark(name, path)
                return kept
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError):
            pass
        self.damaged += 1
        path.unlink(missing_ok=True)
        return None

    def put(self, name: str, tensor: Tensor) -> bool:
        """Keep a tensor, whole or not at all. False where the shelf or the disk has no room for it."""
        needed = tensor.numel() * tensor.element_size() + 512
        if not self._room(needed):
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            disk.write_atomic(self._path(name), save({_NAME: tensor.contiguous()}, {"sha256": _digest(tensor)}))
        except OSError as fault:
            if disk.is_full(fault, self._root):
                return False
            raise
        self._good.add(name)
        self._size = (self._size or 0) + needed
        return True

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _mark(self, name: str, path: Path) -> None:
        """Used now: the last to go."""
        if name not in self._good:
            self._good.add(name)
            with suppress(OSError):
                os.utime(path)

    def _room(self, needed: int) -> bool:
        """Make room by dropping what others kept, longest unused first; nothing of this run's."""
        if self._size is None:
            self._size = sum(size for _, size, _ in self._all())
        if self._size + needed <= self._limit:
            return True
        for _, size, path in sorted(self._all(), key=lambda one: one[0]):
            if self._size + needed <= self._limit:
                break
            if not (path.parent == self._folder and path.stem in self._good):
                path.unlink(missing_ok=True)
                self._size -= size
        return self._size + needed <= self._limit

    def _all(self) -> list[tuple[float, int, Path]]:
        """(when last used, bytes, path) of every file of every folder."""
        found = []
        for path in self._root.glob("*/*.safetensors"):
            with suppress(OSError):  # another run may have dropped it
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        return found


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
