"""A folder of files for other programs: made aside, complete or not there at all, with no path of this machine in it.

It knows how a folder comes to be, not what is in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import disk
from finetune.errors import refuse

MARK = "export.json"
_GIB = 2**30
_HEAD = 2**24  # bytes of a file of weights that are looked through: names and settings, not the weights
_WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model")  # vocabularies hold any string


@dataclass
class Bundle:
    """What is said of a folder while it is made. `next`: (program, what to do with it)."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    verified: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    next: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and export.json; no path but names inside the folder."""
        files = {name: path.stat().st_size for name, path in disk.files_below(self.folder).items() if name != MARK}
        told = [{"program": program, "do": do} for program, do in self.next]
        return {**self.facts, "files": files, "verified": self.verified, "warnings": self.warnings, "next": told}


@contextmanager
def bundle(final: Path, needs: float, secrets: Sequence[Path]) -> Iterator[Bundle]:
    """A folder to fill, put in its place when all went well. `needs`: bytes; `secrets`: paths no file may name.

    Errors: UserError where another thing is in the way or the disk has no room.
    """
    _refuse_taken(final)
    aside = _begun(final, needs)
    try:
        made = Bundle(aside)
        yield made
        (aside / "README.md").write_text(_readme(made), encoding="utf-8")
        (aside / MARK).write_text(disk.to_json(made.as_dict(), 2) + "\n", encoding="utf-8")
        prove_no_path(aside, secrets)
        disk.sync_tree(aside)
        disk.publish(aside, final)
        made.folder = final
    except Exception as fault:  # writers in Rust and C++ wrap a full disk in kinds of their own
        if disk.is_full(fault, final.parent):
            raise refuse("the disk is full; nothing was left there.", "Free some space.", final) from fault
        raise
    finally:
        disk.remove_tree(aside)


def _begun(final: Path, needs: float) -> Path:
    """An empty folder beside it. Errors: UserError where none can be made, or has no room."""
    aside = disk.beside(final, f"tmp-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        disk.repair(final)
        require(final.parent, needs)
        disk.remove_tree(aside)
        aside.mkdir()
    except OSError as fault:
        raise refuse(f"cannot be written ({fault.strerror}).", "Name another place with --out.", final) from None
    return aside


def _refuse_taken(final: Path) -> None:
    if final.is_file() or (final.is_dir() and any(final.iterdir()) and not (final / MARK).is_file()):
        raise refuse("is there already, and is no export.", "Name another folder with --out.", final)


def require(place: Path, needs: float) -> None:
    """Errors: UserError where the disk of a folder has less room than `needs` bytes, and a little."""
    free = shutil.disk_usage(place).free
    if needs * 1.02 + 2**20 > free:
        what = f"this needs {size(needs)} and {size(free)} are free."
        raise refuse(what, "Free some space, or name a folder on another disk with --out.", place)


def prove_no_path(folder: Path, secrets: Sequence[Path]) -> None:
    """Errors: RuntimeError for a file that names a place of this machine."""
    spelled = {str(form) for one in secrets for form in (one.absolute(), one.resolve()) if len(form.parts) > 2}
    for name, path in disk.files_below(folder).items():
        if Path(name).name in _WORDS:
            continue
        with path.open("rb") as file:
            head = file.read(_HEAD)
        for one in spelled:
            if one.encode() in head:
                raise RuntimeError(f"{name} names a place of this machine: {one}")


def size(count: float) -> str:
    """Bytes in words."""
    if count >= _GIB:
        return f"{count / _GIB:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _readme(made: Bundle) -> str:
    lines = [f"# {made.facts.get('name', 'export')}", ""]
    lines += [
        f"- {key.replace('_', ' ')}: {value}" for key, value in made.facts.items() if isinstance(value, str | int)
    ]
    for title, rows in (("Verified", made.verified), ("Mind", made.warnings)):
        if rows:
            lines += ["", f"## {title}", "", *(f"- {row}" for row in rows)]
    lines += ["", "## Use", "", *(f"- {program}: {do}" for program, do in made.next), ""]
    return "\n".join(lines)
