"""A run folder: what is written, where, and that a kill, a full disk or a second process never breaks it.

Names every file of the contract. Does not know what the rows mean, and never deletes a run: an old one is renamed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune import disk, seals
from finetune.errors import UserError, refuse

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*")
_STEP = re.compile(r"\.?step-(\d{7,})(\.new|\.old)?")
_GIB = 2**30
_log = logging.getLogger(__name__)

Tell = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint that can be used. `full` ones hold optimizer state; `size` in bytes; `files` are names below."""

    step: int
    folder: Path
    full: bool
    size: int
    files: tuple[str, ...]


class RunFolder:
    """The paths of one run, and what must not break: its lock, its checkpoints, its adapter."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.source_recipe = self.path / "source_recipe.yaml"
        self.run_json = self.path / "run.json"
        self.split = self.path / "split.json"
        self.metrics = self.path / "metrics.jsonl"
        self.examples = self.path / "examples.jsonl"
        self.tokens = self.path / "tokens"
        self.findings = self.path / "findings.jsonl"
        self.verdict = self.path / "verdict.json"
        self.checkpoint_folder = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.samples = self.path / "samples.jsonl"
        self.report = self.path / "report.html"
        self.log = self.path / "log.txt"
        self._open: set[Path] = set()

    @property
    def line_files(self) -> tuple[Path, ...]:
        """Every .jsonl of the contract."""
        return self.metrics, self.examples, self.findings, self.samples

    def tokens_at(self, step: int) -> Path:
        """Where the per-token numbers of a full look lie."""
        return self.tokens / f"step-{step:07d}.safetensors"

    def checkpoint_at(self, step: int) -> Path:
        """Where the checkpoint of a step lies, or would."""
        return self.checkpoint_folder / f"step-{step:07d}"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only writer, and repair what a kill left. Raises UserError naming the process that writes already."""
        with ExitStack() as stack:
            with _explained(self.path, "The run was not begun"):
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    stack.enter_context(disk.locked(self.path / ".lock"))
                except disk.Taken as taken:
                    what = f"process {taken.pid or '?'} on {taken.host or '?'} is writing this run."
                    raise refuse(what, "Wait for it or end it; for a second run give --out.", str(self.path)) from None
                self.repair()
            yield

    def repair(self) -> None:
        """End or undo what a killed writer left. Under the lock every leftover is a dead process's, save our own."""
        steps = _folders(self.checkpoint_folder)
        for folder in (self.path, self.tokens, self.checkpoint_folder, *steps):
            for left in folder.glob(".*.tmp-*"):
                if left not in self._open:
                    disk.remove_tree(left)
        for step in {_step_of(folder) for folder in steps}:
            disk.repair(self.checkpoint_at(step))
        disk.repair(self.adapter)
        for one in self.checkpoints(verify=False, tell=_log.debug):
            if not one.full:
                _drop_others(one.folder, one.files)

    def note(self, text: str) -> None:
        """A line of log.txt, with the time; a full disk loses it, nothing else."""
        with suppress(OSError), self.log.open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")

    def record(self, **facts: object) -> None:
        """Merge facts into run.json."""
        known = read_json(self.run_json) if self.run_json.exists() else {}
        write_json(self.run_json, {**known, **facts})

    def cut_back(self, step: int) -> None:
        """Every .jsonl to what was known at a step; see `cut_back` below."""
        for path in self.line_files:
            cut_back(path, step)

    # checkpoints

    @contextmanager
    def new_checkpoint(self, step: int, full: bool = True) -> Iterator[Path]:
        """A folder to fill. On leaving it is synced, hashed and given its final name, complete or absent.

        The .jsonl files are synced first: no checkpoint is newer than its rows. `full` says that optimizer state is
        inside. Raises UserError on a full disk, the older checkpoints untouched.
        """
        final = self.checkpoint_at(step)
        tmp = disk.beside(final, f"tmp-{os.getpid()}")
        with self._aside(tmp), _explained(self.path, f"The checkpoint of step {step} was not written"):
            yield tmp
            for path in self.line_files:
                if path.exists():
                    disk.sync_file(path)
            disk.sync_tree(tmp)
            files = {name: seals.measure(path) for name, path in disk.files_below(tmp).items() if name != seals.NAME}
            if not files:
                raise ValueError(f"nothing was written into the checkpoint of step {step}")
            disk.write_atomic(tmp / seals.NAME, seals.text(seals.Seal(step, full, files)))
            disk.publish(tmp, final)

    @contextmanager
    def _aside(self, tmp: Path) -> Iterator[None]:
        """A folder of our own beside the final one, gone again if anything fails."""
        with _explained(tmp.parent, "Nothing was written"):
            if not tmp.parent.exists():
                tmp.parent.mkdir(parents=True)
                disk.sync_folder(tmp.parent.parent)
            disk.remove_tree(tmp)
            tmp.mkdir()
        self._open.add(tmp)
        try:
            yield
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        finally:
            self._open.discard(tmp)

    def checkpoints(self, verify: bool = True, tell: Tell = _log.warning) -> list[Checkpoint]:
        """Those that can be used, newest first; `tell` hears of the others. Without `verify` by size, not by hash."""
        return list(self._usable(verify, tell))

    def newest_valid(self, full: bool = False, tell: Tell = _log.warning) -> Checkpoint | None:
        """The newest whose hashes are right; with `full`, the newest that training goes on from exactly."""
        return next((one for one in self._usable(True, tell) if one.full or not full), None)

    def _usable(self, verify: bool, tell: Tell) -> Iterator[Checkpoint]:
        places: dict[int, list[Path]] = {}
        for folder in _folders(self.checkpoint_folder):
            places.setdefault(_step_of(folder), []).append(folder)
        for step in sorted(places, reverse=True):
            for folder in sorted(places[step], key=lambda place: (place.name.startswith("."), place.name)):
                found = _read_checkpoint(folder, step, verify)
                if isinstance(found, Checkpoint):
                    yield found
                    break
                tell(f"{folder}: {found}; skipped.")

    def demote(self, step: int, keep_names: Collection[str] = ADAPTER_FILES) -> None:
        """Leave the adapter alone in a checkpoint. A manifest without the rest comes first: valid at any kill."""
        folder = self.checkpoint_at(step)
        seal = seals.read(folder)
        kept = _matching(seal.files, keep_names)
        if not kept:
            raise ValueError(f"nothing of step {step} would be left")
        with _explained(self.path, f"The checkpoint of step {step} was not reduced"):
            smaller = seals.Seal(step, False, {name: seal.files[name] for name in kept})
            disk.write_atomic(folder / seals.NAME, seals.text(smaller))
        _drop_others(folder, kept)

    def prune(self, protected: Iterable[int] = (), max_gib: float | None = None, full: int = 2) -> list[str]:
        """Optimizer state in the newest `full` only, then the oldest go until `max_gib` (2^30 bytes) holds.

        Never the protected steps, the newest valid, or the newest full ones. Returns what was done, in words.
        """
        newest, keepers = self._worth_keeping(full)
        said: list[str] = []
        for one in self.checkpoints(verify=False, tell=_log.debug):
            if one.full and len(keepers) == full and one.step < min(keepers, default=0):
                self.demote(one.step)
                said.append(f"step {one.step}: optimizer state dropped")
        if max_gib is not None:
            said += self._fit(max_gib, {*protected, *newest, *keepers})
        return said

    def _worth_keeping(self, full: int) -> tuple[list[int], list[int]]:
        """Steps of (the newest valid, the newest valid full ones)."""
        newest: list[int] = []
        keepers: list[int] = []
        for one in self._usable(True, _log.debug):
            newest = newest or [one.step]
            if len(keepers) >= full:
                break
            if one.full:
                keepers.append(one.step)
        return newest, keepers

    def _fit(self, max_gib: float, kept: set[int]) -> list[str]:
        """Drop unusable folders, then the oldest, until the limit holds or only kept ones are left."""
        said: list[str] = []
        usable = {one.folder for one in self.checkpoints(verify=False, tell=_log.debug)}
        folders = _folders(self.checkpoint_folder)
        sizes = {folder: sum(file.stat().st_size for file in disk.files_below(folder).values()) for folder in folders}
        total = sum(sizes.values())
        for folder in sorted(folders, key=lambda folder: (folder in usable, _step_of(folder))):
            if total > max_gib * _GIB and _step_of(folder) not in kept:
                disk.retire(folder)
                total -= sizes[folder]
                said.append(f"step {_step_of(folder)}: dropped, {sizes[folder] / _GIB:.2f} GiB")
        if total > max_gib * _GIB:
            said.append(f"{total / _GIB:.2f} GiB of checkpoints are left, more than watch.keep.max_gib {max_gib:g}")
        return said

    # the chosen adapter

    def install_adapter(self, source: Path | str, replace: Mapping[str, bytes | str] | None = None) -> None:
        """Copy a checkpoint's adapter to `adapter/`; a reader sees the old one, the new one or, for a moment, none.

        `replace` gives files other contents (the configuration without this machine's paths). Raises UserError where
        the source is damaged or the disk is full, the old adapter left alone.
        """
        source = Path(source)
        listed = _listed(source)
        names = _matching(disk.files_below(source), ADAPTER_FILES)
        if not any(name.startswith("adapter_model.") for name in names):
            raise refuse("holds no adapter.", "Choose another checkpoint.", str(source))
        tmp = disk.beside(self.adapter, f"tmp-{os.getpid()}")
        with self._aside(tmp), _explained(self.path, "The adapter was not installed"):
            for name in names:
                shutil.copyfile(source / name, tmp / name)
                if name in listed and seals.measure(tmp / name) != listed[name]:
                    raise refuse(f"{name} is damaged.", "Choose another checkpoint.", str(source))
            for name, data in (replace or {}).items():
                (tmp / name).write_bytes(data.encode() if isinstance(data, str) else data)
            disk.sync_tree(tmp)
            disk.publish(tmp, self.adapter)


def fresh(path: Path | str) -> Path | None:
    """Put an old run folder out of the way as `<name>.old-N`, and say where. None where there was none to move."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and {one.name for one in path.iterdir()} <= {".lock", "log.txt"}):
        return None
    run = RunFolder(path)
    if not path.is_dir() or not any(
        mark.exists() for mark in (run.recipe, run.run_json, run.metrics, run.checkpoint_folder)
    ):
        raise refuse("is no run folder.", "Choose another --out.", str(path))
    with run.lock():
        pass  # a run that is being written stays where it is
    number = 1
    while (old := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, old)
    disk.sync_folder(path.parent)
    return old


# files


def write_atomic(path: Path, data: bytes | str) -> None:
    """The new file whole, or the old one. Raises UserError on a full disk."""
    with _explained(path, f"{path.name} was not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomic(path, data)


def write_json(path: Path, value: object) -> None:
    """As indented JSON; dataclasses (Derived) as objects, null for a number that is not finite."""
    write_atomic(path, disk.to_json(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Raises UserError where the file is absent or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror}).", "Is this a run folder?", str(path)) from None
    except (ValueError, RecursionError):
        raise refuse("is not JSON.", "It was changed by hand, or the disk is damaged.", str(path)) from None


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]], sync: bool = False) -> None:
    """All rows or none, one JSON object a line; with `sync` they are on the disk. Raises UserError on a full disk."""
    with _explained(path, f"Rows of {path.name} were not written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.append_lines(path, rows, sync)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl; [] where there is no file. A torn last line is no row; any other raises UserError."""
    found = list(disk.numbered_lines(path))
    torn = [number for number, _, row in found[:-1] if row is None]
    if torn:
        raise refuse("is not a JSON object.", "Remove this line.", str(path), torn[0])
    return [row for _, _, row in found if row is not None]


def cut_back(path: Path, step: int) -> int:
    """Drop the rows after a step, and the torn last line; returns how many lines went.

    Rows without a step stay. An unreadable line among rows that stay raises UserError: those are not written again.
    """
    found = list(disk.numbered_lines(path))
    stays = [row is not None and not _after(row, step) for _, _, row in found]
    last = max((i for i, stay in enumerate(stays) if stay), default=-1)
    for number, _, row in found[: last + 1]:
        if row is None:
            raise refuse("is not a JSON object.", "Remove this line.", str(path), number)
    if not all(stays):
        lines = (line.rstrip(b"\n") + b"\n" for (_, line, _), stay in zip(found, stays, strict=True) if stay)
        write_atomic(path, b"".join(lines))
    return stays.count(False)


def _after(row: Mapping[str, Any], step: int) -> bool:
    at = row.get("step")
    return isinstance(at, (int, float)) and at > step


@contextmanager
def _explained(path: Path, lost: str) -> Iterator[None]:
    """A full disk, or a place that may not be written, in words: what was lost, what is still there, what to change."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        remedy = "Make it writable for you, or name another place."
        raise refuse(f"cannot be written ({error.strerror}). {lost}.", remedy, str(path)) from error
    except Exception as error:  # writers wrap a full disk in exceptions of their own
        if isinstance(error, UserError) or not disk.is_full(error, path):
            raise
        remedy = "Free some space there, or lower watch.keep.max_gib; then start the same command again: it goes on."
        raise refuse(f"the disk is full. {lost}; what was written before is whole.", remedy, str(path)) from error


# folders of checkpoints


def _read_checkpoint(folder: Path, step: int, verify: bool) -> Checkpoint | str:
    """A checkpoint, or in words why it is none."""
    try:
        seal = seals.read(folder)
        wrong = f"its manifest is of step {seal.step}" if seal.step != step else seals.fault(folder, seal, verify)
    except FileNotFoundError:
        return "it has no manifest"
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    return wrong or Checkpoint(step, folder, seal.full, seal.size, tuple(seal.files))


def _listed(folder: Path) -> dict[str, seals.About]:
    """What a sealed folder's manifest names; {} for a folder without one."""
    try:
        return seals.read(folder).files
    except FileNotFoundError:
        return {}
    except ValueError:
        raise refuse("its manifest is damaged.", "Choose another checkpoint.", str(folder)) from None


def _drop_others(folder: Path, keep: Collection[str]) -> None:
    for name, path in disk.files_below(folder).items():
        if name not in keep and name != seals.NAME:
            os.unlink(path)


def _folders(path: Path) -> list[Path]:
    """Those of checkpoints, a replaced one's `.new` and `.old` included."""
    return sorted(found for found in path.iterdir() if _STEP.fullmatch(found.name)) if path.is_dir() else []


def _step_of(folder: Path) -> int:
    return int(_STEP.findall(folder.name)[0][0])


def _matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
