"""Bytes onto disk so that a kill at any moment leaves the old or the new, never half.

Files, lines of JSON, folders and one lock, on POSIX and Windows. Knows no run; raises OSError and nothing friendlier.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_BINARY: int = getattr(os, "O_BINARY", 0)
_count = itertools.count()


# files


def home(kind: str) -> Path:
    """Where things of a kind lie: below the user's cache folder."""
    local = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
    return Path(os.environ.get("XDG_CACHE_HOME") or local or Path.home() / ".cache") / "minisymposium" / kind


def write_atomic(path: Path, data: bytes | str) -> None:
    """The whole file or the one before it, at any kill. Raises OSError, the old file untouched."""
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}-{next(_count)}")
    try:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o666)
        try:
            _write_all(handle, raw)
            os.fsync(handle)
        finally:
            os.close(handle)
        replace(aside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(aside)
        raise
    sync_folder(path.parent)


def _write_all(handle: int, raw: bytes) -> None:
    rest = memoryview(raw)
    while rest:
        rest = rest[os.write(handle, rest) :]


def replace(source: Path, target: Path) -> None:
    """Rename, over an existing file. Windows refuses while a reader or a virus scanner holds it: try for a second."""
    for attempt in range(20):
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or attempt == 19:
                raise
            time.sleep(0.05)


def sync_file(path: Path) -> None:
    """What was written to a file reaches the disk."""
    try:
        handle = os.open(path, os.O_RDWR | _BINARY)  # Windows flushes writable handles only
    except PermissionError:
        handle = os.open(path, os.O_RDONLY | _BINARY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """A rename inside a folder reaches the disk, where the system can be told so."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems have no such call
            raise
    finally:
        os.close(handle)


# folders


def files_below(folder: Path) -> dict[str, Path]:
    """Every file by its name relative to the folder, with `/`, in order."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return dict(sorted(found.items()))


def sync_tree(folder: Path) -> None:
    """Every file and folder below, then the folder."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(folder)


def remove_tree(folder: Path) -> None:
    """A folder and all in it, if it is there."""
    if folder.is_symlink() or folder.is_file():
        os.unlink(folder)
    elif folder.exists():
        shutil.rmtree(folder)


def beside(final: Path, what: str) -> Path:
    """The name next to a folder under which it is prepared (`tmp-<pid>`, `new`) or put away (`old`)."""
    return final.with_name(f".{final.name}.{what}")


def publish(tmp: Path, final: Path) -> None:
    """A synced folder under its final name, over an older one. After a kill in between, `repair` ends the work."""
    if not final.exists():
        replace(tmp, final)
        return sync_folder(final.parent)
    new = beside(final, "new")
    remove_tree(new)
    replace(tmp, new)  # from here on the new folder is known to be whole
    sync_folder(final.parent)
    _swap(new, final)


def _swap(new: Path, final: Path) -> None:
    old = beside(final, "old")
    if final.exists():
        remove_tree(old)
        replace(final, old)
    replace(new, final)
    sync_folder(final.parent)
    remove_tree(old)


def repair(final: Path) -> None:
    """End or undo what a kill inside `publish` left of one folder."""
    new, old = beside(final, "new"), beside(final, "old")
    if new.exists():
        _swap(new, final)
    elif old.exists() and not final.exists():
        replace(old, final)
        sync_folder(final.parent)
    remove_tree(old)


def retire(folder: Path) -> None:
    """Remove a folder so that no reader meets half of it."""
    away = beside(folder, f"tmp-{os.getpid()}-{next(_count)}")
    replace(folder, away)
    sync_folder(folder.parent)
    remove_tree(away)


# JSON


def to_json(value: object, indent: int | None = None) -> str:
    """JSON any reader takes: dataclasses as objects, paths as text, and null where a number is not finite."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _finite(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]], sync: bool = False) -> None:
    """All rows or none, each a line; what a kill left of a line is cut off. Raises OSError, the file as it was."""
    raw = "".join(to_json(row) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    if not raw:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
    try:
        end, missing = _whole(handle)
        os.ftruncate(handle, end)
        os.lseek(handle, end, os.SEEK_SET)
        try:
            _write_all(handle, missing + raw)
            if sync:
                os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


def _whole(handle: int) -> tuple[int, bytes]:
    """(where the whole rows of a file end, what is missing there): a last row may lack its newline only."""
    size = at = os.lseek(handle, 0, os.SEEK_END)
    tail = b""
    while at and b"\n" not in tail:
        block = min(at, 65536)
        at = os.lseek(handle, at - block, os.SEEK_SET)
        tail = os.read(handle, block) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    if last and _row(last) is not None:
        return size, b"\n"
    return size - len(last), b""


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
    """(line from 1, its bytes, its row or None if unreadable), empty lines passed over. None where there is no file."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line, _row(line)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


# faults of the disk, and the lock


def is_full(error: BaseException | None, path: Path) -> bool:
    """Whether a disk without room is behind an error; writers in Rust and C++ wrap it in types of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):  # torch.save keeps the reason back
            return _free(path) < 2**24
        error = error.__cause__ or error.__context__
    return False


def _free(path: Path) -> int:
    """Bytes left on the disk of a path that may not exist yet."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), Path())
    return shutil.disk_usage(there).free


class Taken(OSError):
    """Another process holds the lock."""

    def __init__(self, pid: int, host: str) -> None:
        super().__init__(f"held by {pid} on {host}")
        self.pid, self.host = pid, host


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file. The system frees it when the process dies, however it dies. Raises Taken."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
    try:
        if not _system_lock(handle):
            raise Taken(*_holder(handle))
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
        with suppress(OSError):  # a full disk: the lock holds without a name in it
            _write_all(handle, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _holder(handle: int) -> tuple[int, str]:
    os.lseek(handle, 0, os.SEEK_SET)
    pid, _, host = os.read(handle, 300).decode("utf-8", "replace").strip().partition(" ")
    return int(pid) if pid.isdecimal() else 0, host


def _system_lock(handle: int) -> bool:
    """False where another process holds it. A file system without locks is asked for a living holder instead."""
    try:
        _ask_system(handle)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        pid, host = _holder(handle)
        return pid in (0, os.getpid()) or (host == socket.gethostname() and not is_alive(pid))
    return True


if sys.platform == "win32":
    import ctypes
    import msvcrt

    def _ask_system(handle: int) -> None:
        os.lseek(handle, 2**30, os.SEEK_SET)  # far behind the holder's name, which others must be able to read
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

    def is_alive(pid: int) -> bool:
        """Whether a process of this machine runs (os.kill would end it here)."""
        process = ctypes.windll.kernel32.OpenProcess(0x00100000, False, pid)
        alive = bool(process) and ctypes.windll.kernel32.WaitForSingleObject(process, 0) == 0x102
        ctypes.windll.kernel32.CloseHandle(process)
        return alive

else:
    import fcntl

    def _ask_system(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def is_alive(pid: int) -> bool:
        """Whether a process of this machine runs."""
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
        return True
