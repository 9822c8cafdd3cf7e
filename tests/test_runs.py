"""A run folder stays whole: through kills at any write, torn files, full disks and a second process."""

from __future__ import annotations

import errno
import getpass
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from finetune import disk, machine, runs, seals
from finetune.errors import UserError
from finetune.machine import Derived
from finetune.runs import RunFolder

CHANGES = ["open", "write", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate", "remove"]


class Killed(BaseException):
    """What a test raises in the place of a SIGKILL."""


@contextmanager
def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """From the given call on, nothing reaches the disk any more: cleaning up is not for the dead."""
    seen: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*args, **kwargs)
            seen.append(name)
            if len(seen) > calls:
                raise Killed
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield seen


def fill(folder: Path, step: int) -> None:
    disk.write_atomic(folder / "adapter_config.json", json.dumps({"r": 4}))
    disk.write_atomic(folder / "adapter_model.safetensors", f"weights of {step}".encode() * 20)
    os.mkdir(folder / "state")
    disk.write_atomic(folder / "state" / "optimizer.pt", f"moments of {step}".encode() * 50)


def save(run: RunFolder, step: int, full: bool = True) -> Path:
    with run.new_checkpoint(step, full) as folder:
        fill(folder, step)
    return run.checkpoint_at(step)


def steps(run: RunFolder) -> list[tuple[int, bool]]:
    return [(one.step, one.full) for one in run.checkpoints()]


def weights(folder: Path) -> str:
    return (folder / "adapter_model.safetensors").read_text()


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills lose nothing that was written, so these tests need not wait for the disk; a power cut has its own test."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


# files


def test_every_file_of_the_contract_has_a_path(run: RunFolder) -> None:
    names = "recipe.yaml source_recipe.yaml run.json split.json metrics.jsonl examples.jsonl tokens findings.jsonl "
    names += "verdict.json checkpoints adapter samples.jsonl report.html log.txt"
    assert {path.name for path in vars(run).values() if isinstance(path, Path)} - {"run"} == set(names.split())
    assert run.tokens_at(12).name == "step-0000012.safetensors"
    assert run.checkpoint_at(12).name == "step-0000012"


def test_killed_at_any_write_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "verdict.json"
    for calls in range(20):
        disk.write_atomic(path, "old")
        with suppress(Killed), killed_after(calls, monkeypatch) as seen:
            disk.write_atomic(path, "new")
        assert path.read_text() in ("old", "new")
        if len(seen) <= calls:
            assert path.read_text() == "new"
            return
    pytest.fail("the write never ended")


def test_what_json_cannot_say_is_null(run: RunFolder) -> None:
    runs.write_json(run.run_json, {"lr": Derived(1e-7, "as given"), "loss": math.nan, "where": [Path("a") / "b"]})
    assert runs.read_json(run.run_json) == {
        "lr": {"value": 1e-7, "reason": "as given"},
        "loss": None,
        "where": [str(Path("a") / "b")],
    }


def test_facts_are_merged_into_run_json(run: RunFolder) -> None:
    run.record(seed=1, steps=Derived(10, "2 epochs of 5"))
    run.record(seed=2)
    assert runs.read_json(run.run_json) == {"seed": 2, "steps": {"value": 10, "reason": "2 epochs of 5"}}


def test_a_missing_or_torn_json_is_named(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split\.json  cannot be read"):
        runs.read_json(run.split)
    (tmp_path / "x.json").write_text('{"a"')
    with pytest.raises(UserError, match="is not JSON"):
        runs.read_json(tmp_path / "x.json")


# lines


def test_lines_survive_any_text(run: RunFolder) -> None:
    rows = [{"step": 1, "answer": "line\u2028one\nline two \ud800 «é»"}, {"step": 2}]
    runs.append_lines(run.samples, rows[:1])
    runs.append_lines(run.samples, rows[1:], sync=True)
    assert runs.read_lines(run.samples) == rows
    assert len(run.samples.read_bytes().splitlines()) == 2


def test_no_file_is_no_rows(run: RunFolder) -> None:
    assert runs.read_lines(run.metrics) == []
    assert runs.cut_back(run.metrics, 3) == 0


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\0\0\0\0", '{"step"', "3"])
def test_a_torn_last_line_is_no_row_and_is_cut_by_the_next(run: RunFolder, torn: str) -> None:
    runs.append_lines(run.metrics, [{"step": 1}, {"step": 2}])
    with run.metrics.open("a") as file:
        file.write(torn)
    assert runs.read_lines(run.metrics) == [{"step": 1}, {"step": 2}]
    runs.append_lines(run.metrics, [{"step": 3}])
    assert run.metrics.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_row_that_lacks_its_newline_only_is_kept(run: RunFolder) -> None:
    runs.append_lines(run.metrics, [{"step": 1, "text": "x" * 70_000}])
    run.metrics.write_bytes(run.metrics.read_bytes().rstrip())
    runs.append_lines(run.metrics, [{"step": 2}])
    assert [row["step"] for row in runs.read_lines(run.metrics)] == [1, 2]


def test_a_torn_line_in_the_middle_is_an_error(run: RunFolder) -> None:
    runs.append_lines(run.metrics, [{"step": 1}])
    with run.metrics.open("a") as file:
        file.write('{"st\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2  is not a JSON object"):
        runs.read_lines(run.metrics)
    with pytest.raises(UserError, match=r"metrics\.jsonl:2"):
        runs.cut_back(run.metrics, 2)
    assert runs.cut_back(run.metrics, 1) == 2
    assert runs.read_lines(run.metrics) == [{"step": 1}]


def test_metrics_are_cut_back_to_the_checkpoint(run: RunFolder) -> None:
    for path in run.line_files:
        runs.append_lines(path, [{"note": "no step"}, *({"step": i} for i in range(10))])
        with path.open("a") as file:
            file.write('{"step": 5, "to')
    run.cut_back(4)
    for path in run.line_files:
        assert runs.read_lines(path) == [{"note": "no step"}, *({"step": i} for i in range(5))]
        assert path.read_bytes().endswith(b"}\n")
    assert runs.cut_back(run.metrics, 4) == 0


# checkpoints


def test_a_checkpoint_is_complete_or_absent(run: RunFolder) -> None:
    with run.new_checkpoint(7) as folder:
        fill(folder, 7)
        assert folder.parent == run.checkpoint_folder
        assert run.checkpoints() == []
    (one,) = run.checkpoints()
    assert (one.step, one.full, one.folder) == (7, True, run.checkpoint_at(7))
    assert set(one.files) == {"adapter_config.json", "adapter_model.safetensors", "state/optimizer.pt"}
    assert one.size == sum((one.folder / name).stat().st_size for name in one.files)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_checkpoint_leaves_nothing(run: RunFolder, error: type[BaseException]) -> None:
    save(run, 1)

    def fail() -> None:
        with run.new_checkpoint(2) as folder:
            fill(folder, 2)
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in run.checkpoint_folder.iterdir()] == ["step-0000001"]


def test_checkpoints_are_listed_newest_first(run: RunFolder) -> None:
    for step in (9, 100, 20, 12345678):
        save(run, step, full=step != 100)
    assert steps(run) == [(12345678, True), (100, False), (20, True), (9, True)]
    assert [one.step for one in run.checkpoints(verify=False)] == [12345678, 100, 20, 9]


def test_an_empty_checkpoint_is_our_fault(run: RunFolder) -> None:
    with pytest.raises(ValueError, match="nothing was written"), run.new_checkpoint(1):
        pass
    assert run.newest_valid() is None


@pytest.mark.parametrize("seed", range(12))
def test_a_torn_checkpoint_is_skipped(run: RunFolder, seed: int) -> None:
    chance = random.Random(seed)
    save(run, 1)
    folder = save(run, 2)
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    raw = bytearray(path.read_bytes())
    if chance.random() < 0.4:
        del raw[chance.randrange(len(raw)) :]
    elif path.name == seals.NAME:
        raw[raw.index(b"sha256") + 12] ^= 1
    else:
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    path.write_bytes(raw)
    said: list[str] = []
    found = run.newest_valid(tell=said.append)
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "step-0000002" in said[0]


def test_a_flipped_manifest_names_nothing_wrong_or_is_skipped(run: RunFolder) -> None:
    folder = save(run, 1)
    raw = (folder / seals.NAME).read_bytes()
    for at in range(0, len(raw), 7):
        (folder / seals.NAME).write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        for one in run.checkpoints(tell=lambda _: None):
            assert (one.step, one.full, len(one.files)) == (1, True, 3)


def test_a_checkpoint_under_another_step_is_skipped(run: RunFolder) -> None:
    save(run, 1).rename(run.checkpoint_at(5))
    said: list[str] = []
    assert run.checkpoints(tell=said.append) == []
    assert "its manifest is of step 1" in said[0]


def test_a_manifest_is_needed(run: RunFolder) -> None:
    (save(run, 1) / seals.NAME).unlink()
    assert run.checkpoints(tell=lambda _: None) == []


@pytest.mark.parametrize("what", ["first", "next", "same", "demote", "prune", "install", "append"])
def test_killed_at_any_write_leaves_a_valid_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Every write of every act is once the last one of the process; the next process goes on from something whole."""
    acts: dict[str, Callable[[RunFolder], object]] = {
        "first": lambda run: save(run, 3),
        "next": lambda run: save(run, 4),
        "same": lambda run: save(run, 3),
        "demote": lambda run: run.demote(2),
        "prune": lambda run: run.prune(max_gib=2200 / 2**30, full=1),
        "install": lambda run: run.install_adapter(run.checkpoint_at(3)),
        "append": lambda run: runs.append_lines(run.metrics, [{"step": 4}], sync=True),
    }
    before = RunFolder(tmp_path / "before")
    before.path.mkdir()
    for step in (1, 2, 3) if what != "first" else ():
        runs.append_lines(before.metrics, [{"step": step}])
        save(before, step)
        if step == 2:
            before.install_adapter(before.checkpoint_at(2))
    for calls in range(200):
        run = RunFolder(shutil.copytree(before.path, tmp_path / str(calls)))
        with suppress(Killed), killed_after(calls, monkeypatch) as seen:
            acts[what](run)
        ended = len(seen) <= calls
        check_after_kill(run, what, ended)
        if ended:
            return
    pytest.fail("the act never ended")


def check_after_kill(dead: RunFolder, what: str, ended: bool) -> None:
    run = RunFolder(dead.path)
    told: list[str] = []
    before = run.newest_valid()  # a reader, while nobody has repaired anything
    run.checkpoints(tell=told.append)
    with run.lock():
        after = run.newest_valid()
        run.checkpoints(tell=told.append)
        left = [path for path in run.path.rglob(".*") if path.name != ".lock"]
        assert left == []
        if what == "first":
            assert (after is not None and weights(after.folder) == "weights of 3" * 20) or (after is None and not ended)
            return
        assert before is not None
        assert after is not None
        assert before.step == after.step == (4 if what == "next" and after.step == 4 else 3)
        assert after.full
        assert told == []
        assert weights(after.folder) == f"weights of {after.step}" * 20
        assert weights(run.adapter) in [f"weights of {step}" * 20 for step in ((2, 3) if what == "install" else (2,))]
        assert len(runs.read_lines(run.metrics)) in (3, 4)
        assert all(set(one.files) == files_of(one.folder) for one in run.checkpoints())
        save(run, 5)
        assert steps(run)[0] == (5, True)


def files_of(folder: Path) -> set[str]:
    return set(disk.files_below(folder)) - {seals.NAME}


def test_what_was_not_synced_is_not_needed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut loses every write that was not synced before the rename; the writer of the files need not know."""
    synced: set[int] = set()
    real = os.fsync

    def fsync(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    runs.append_lines(run.metrics, [{"step": 1}])
    with run.new_checkpoint(1) as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"plainly written")
        (folder / "deep").mkdir()
        (folder / "deep" / "optimizer.pt").write_bytes(b"plainly written")
    needed = [run.metrics, run.checkpoint_folder, *run.checkpoint_at(1).rglob("*"), run.checkpoint_at(1)]
    if os.name == "nt":
        needed = [path for path in needed if path.is_file()]
    assert {path.stat().st_ino for path in needed} <= synced


def test_a_process_killed_for_real_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    writer = """
        import sys, itertools
        sys.path.insert(0, sys.argv[2])
        from finetune import runs
        run = runs.RunFolder(sys.argv[1])
        with run.lock():
            newest = run.newest_valid()
            first = newest.step + 1 if newest else 1
            for step in itertools.count(first):
                runs.append_lines(run.metrics, [{"step": step}])
                with run.new_checkpoint(step) as folder:
                    for name in ("adapter_model.safetensors", "optimizer.pt"):
                        (folder / name).write_bytes(bytes([step % 256]) * 3_000_000)
                run.prune(max_gib=0.01, full=1)
                print(step, flush=True)
    """
    root = str(Path(runs.__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(writer), str(tmp_path / "run"), root]
    said = 0
    for wait in (0.0, 0.013, 0.029):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = int(process.stdout.readline())
        time.sleep(wait)
        process.kill()
        said = max(
            [said, *(int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n"))]
        )
        process.wait()
        process.stdout.close()
        found = RunFolder(tmp_path / "run").newest_valid()
        assert found is not None
        assert found.step >= said
        assert len(runs.read_lines(tmp_path / "run" / "metrics.jsonl")) >= said


def test_leftovers_of_dead_processes_are_cleaned_at_start(run: RunFolder) -> None:
    save(run, 1)
    (run.checkpoint_folder / ".step-0000002.tmp-99999999").mkdir()
    (run.path / ".run.json.tmp-99999999-0").write_text("half")
    with run.lock():
        assert [path.name for path in run.path.rglob(".*")] == [".lock"]
        with run.new_checkpoint(2) as folder:
            run.repair()
            fill(folder, 2)
    assert steps(run) == [(2, True), (1, True)]


def test_a_folder_put_away_is_put_back_where_nothing_took_its_place(run: RunFolder) -> None:
    save(run, 1).rename(run.checkpoint_folder / ".step-0000001.old")
    with run.lock():
        assert steps(run) == [(1, True)]
        assert run.checkpoint_at(1).exists()


def test_the_two_newest_keep_optimizer_state(run: RunFolder) -> None:
    for step in range(1, 6):
        save(run, step, full=step != 4)
    said = run.prune()
    assert steps(run) == [(5, True), (4, False), (3, True), (2, False), (1, False)]
    assert said == ["step 2: optimizer state dropped", "step 1: optimizer state dropped"]
    assert files_of(run.checkpoint_at(1)) == {"adapter_config.json", "adapter_model.safetensors"}
    assert run.prune() == []


def test_a_torn_full_checkpoint_does_not_count_as_one_of_the_two(run: RunFolder) -> None:
    for step in range(1, 5):
        save(run, step)
    (run.checkpoint_at(4) / "adapter_model.safetensors").write_bytes(b"?" * len("weights of 4" * 20))
    run.prune()
    assert [(one.step, one.full) for one in run.checkpoints(tell=lambda _: None)] == [(3, True), (2, True), (1, False)]


def test_the_oldest_go_first_and_the_protected_never(run: RunFolder) -> None:
    for step in range(1, 8):
        save(run, step, full=step in (5, 6))
    said = run.prune(protected=[2], max_gib=0)
    assert [step for step, _ in steps(run)] == [7, 6, 5, 2]
    assert "more than watch.keep.max_gib 0" in said[-1]
    assert [line.split(":")[0] for line in said[:-1]] == ["step 1", "step 3", "step 4"]


def test_pruning_stops_when_the_limit_holds(run: RunFolder) -> None:
    for step in range(1, 5):
        save(run, step, full=False)
    total = sum(path.stat().st_size for path in run.checkpoint_folder.rglob("*") if path.is_file())
    run.prune(max_gib=(total - 1) / 2**30)
    assert [step for step, _ in steps(run)] == [4, 3, 2]


def test_nothing_is_left_of_a_reduced_checkpoint_is_refused(run: RunFolder) -> None:
    save(run, 1)
    with pytest.raises(ValueError, match="nothing of step 1"):
        run.demote(1, ["*.gguf"])
    assert steps(run) == [(1, True)]


# the chosen adapter


def test_the_adapter_is_the_checkpoints_and_its_configuration_ours(run: RunFolder) -> None:
    save(run, 1)
    save(run, 2)
    run.install_adapter(run.checkpoint_at(1))
    run.install_adapter(run.checkpoint_at(2), {"adapter_config.json": '{"base": "a/b"}'})
    assert weights(run.adapter) == "weights of 2" * 20
    assert {path.name for path in run.adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((run.adapter / "adapter_config.json").read_text()) == {"base": "a/b"}


def test_a_damaged_adapter_is_not_installed(run: RunFolder) -> None:
    run.install_adapter(save(run, 1))
    (save(run, 2) / "adapter_model.safetensors").write_text("damaged")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is damaged"):
        run.install_adapter(run.checkpoint_at(2))
    with pytest.raises(UserError, match="holds no adapter"):
        run.install_adapter(run.path)
    assert weights(run.adapter) == "weights of 1" * 20


# one writer, full disks, old runs


def test_second_process_is_refused(run: RunFolder) -> None:
    holder = """
        import sys
        sys.path.insert(0, sys.argv[2])
        from finetune import runs
        with runs.RunFolder(sys.argv[1]).lock():
            print("held", flush=True)
            sys.stdin.read()
    """
    root = str(Path(runs.__file__).parents[1])
    command = [sys.executable, "-c", textwrap.dedent(holder), str(run.path), root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {process.pid} on .* is writing this run"), run.lock():
            pass
        run.recipe.write_text("")
        with pytest.raises(UserError, match="is writing this run"):
            runs.fresh(run.path)
        process.kill()
        process.wait()
    with run.lock():
        pass  # a dead process's lock blocks nobody


def test_the_same_process_cannot_write_a_run_twice(run: RunFolder) -> None:
    with run.lock(), pytest.raises(UserError, match=f"process {os.getpid()}"), RunFolder(run.path).lock():
        pass
    with run.lock():
        pass


def test_without_system_locks_a_living_holder_is_asked_for(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(handle: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk, "_ask_system", no_locks)
    run.path.mkdir()
    lock = run.path / ".lock"
    with run.lock():
        pid, host = lock.read_text().split()
    assert int(pid) == os.getpid()
    lock.write_text(f"{os.getppid()} {host}\n")
    with pytest.raises(UserError, match=f"process {os.getppid()} on {host}"), run.lock():
        pass
    lock.write_text(f"99999999 {host}\n")
    with run.lock():
        pass


def test_disk_full_keeps_the_last_good_state(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes a few bytes more and then none, for every number of bytes."""
    real = os.write
    runs.append_lines(run.metrics, [{"step": 1}])
    runs.write_json(run.verdict, {"verdict": "ok"})
    save(run, 1)
    run.install_adapter(run.checkpoint_at(1))
    for room in (0, 1, 10, 100, 400, 1000):
        left = [room]

        def write(handle: int, data: Any, left: list[int] = left) -> int:
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            some = bytes(data)[: left[0]]
            left[0] -= len(some)
            return real(handle, some)

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(UserError, match=r"the disk is full\. The checkpoint of step 2 was not written"):
                save(run, 2)
            left[0] = min(room, 10)
            with pytest.raises(UserError, match=r"Rows of metrics\.jsonl were not written.*max_gib"):
                runs.append_lines(run.metrics, [{"step": 2, "loss": 1.5}])
            left[0] = min(room, 10)
            with pytest.raises(UserError, match=r"verdict\.json was not written"):
                runs.write_json(run.verdict, {"verdict": "overfit"})
        assert steps(run) == [(1, True)]
        assert run.metrics.read_text() == '{"step": 1}\n'
        assert runs.read_json(run.verdict) == {"verdict": "ok"}
        assert sorted(path.name for path in run.path.rglob(".*")) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_known_behind_a_librarys_own_error(run: RunFolder, error: Exception) -> None:
    with pytest.raises(UserError, match="disk is full"), run.new_checkpoint(1):
        raise RuntimeError("could not save") from error
    assert run.checkpoints() == []


def test_torch_keeps_the_reason_back_so_the_disk_is_asked(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    for free, expected in ((2**20, UserError), (2**40, RuntimeError)):
        monkeypatch.setattr(disk, "_free", lambda path, free=free: free)
        with pytest.raises(expected), run.new_checkpoint(1):
            raise error


def test_other_errors_stay_what_they_are(run: RunFolder) -> None:
    with pytest.raises(OSError, match="no"), run.new_checkpoint(1):
        raise OSError(errno.EIO, "no")


def test_a_place_that_may_not_be_written_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file, where a folder was meant")
    with pytest.raises(UserError, match="cannot be written"):
        runs.write_atomic(tmp_path / "file" / "page.html", "x")

    def forbidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(disk, "locked", forbidden)
    told = r"cannot be written \(Permission denied\). The run was not begun.  Make it writable for you"
    with pytest.raises(UserError, match=told), RunFolder(tmp_path / "run").lock():
        pass


def test_an_old_run_is_renamed_never_deleted(run: RunFolder) -> None:
    assert runs.fresh(run.path) is None
    for number in (1, 2):
        run.path.mkdir()
        run.recipe.write_text(f"run {number}")
        assert runs.fresh(run.path) == run.path.with_name(f"run.old-{number}")
    assert not run.path.exists()
    assert (run.path.with_name("run.old-1") / "recipe.yaml").read_text() == "run 1"


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("mine")
    for path in (tmp_path, tmp_path / "letters"):
        with pytest.raises(UserError, match="is no run folder"):
            runs.fresh(path)
    assert (tmp_path / "letters").read_text() == "mine"


def test_the_environment_names_no_host_no_user_no_home() -> None:
    found = machine.environment()
    assert set(found) == {"python", "platform", "machine", "cpu_count", "memory_gib", "versions"}
    assert "torch" in found["versions"]
    text = json.dumps(found)
    assert str(Path.home()) not in text
    assert getpass.getuser() not in re.split(r"\W+", text)


def test_recording_the_environment_imports_no_library() -> None:
    asked = "import sys; sys.path.insert(0, sys.argv[1]); from finetune import machine; machine.environment(); "
    asked += "print({'torch', 'transformers', 'yaml'} & set(sys.modules))"
    root = str(Path(runs.__file__).parents[1])
    said = subprocess.run([sys.executable, "-c", asked, root], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"
