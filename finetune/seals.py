"""A folder's seal: its manifest of names, sizes and hashes, and whether they still hold. Reads only; writes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

NAME = "manifest.json"


class About(TypedDict):
    """One file: bytes, and sha256 in hex."""

    size: int
    sha256: str


class Seal(NamedTuple):
    """What a manifest says. `full`: optimizer state is among the files."""

    step: int
    full: bool
    files: dict[str, About]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(about["size"] for about in self.files.values())


def text(seal: Seal) -> str:
    """The manifest itself, sealed by a hash of its own."""
    body = {"step": seal.step, "full": seal.full, "files": seal.files}
    return json.dumps({**body, "sha256": _own(body)}, indent=2) + "\n"


def _own(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def measure(path: Path) -> About:
    """Size and hash of a file as it lies there."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read(folder: Path) -> Seal:
    """Raises FileNotFoundError without a manifest, ValueError where it was changed or is torn."""
    value = json.loads((folder / NAME).read_bytes())
    if not isinstance(value, dict) or value.pop("sha256", None) != _own(value):
        raise ValueError("its manifest was changed")
    return Seal(value["step"], value["full"], value["files"])


def fault(folder: Path, seal: Seal, hashes: bool) -> str:
    """The first thing that does not hold, in words; "" where all does. Files the manifest does not name are ignored."""
    for name, about in seal.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != about["size"] or (hashes and measure(path) != about):
            return f"{name} is damaged"
    return ""
