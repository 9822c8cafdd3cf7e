"""A run's rows for other people's dashboards: TensorBoard, trackio, Weights & Biases; the same numbers, the same names.

What goes out is numbers, never texts. Programs that are not installed are refused before a night, and one that fails in
it is dropped, with a line in log.txt. TensorBoard writes files; the others reach out to where their own settings say.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from finetune.errors import UserError, refuse

Row = Mapping[str, Any]
PROJECT = "sft"
FOLDER = "tensorboard"  # below a run
_STEP = ("loss", "lr", "grad_norm", "travel", "tokens", "seconds", "gib", "epoch")
_LOOK = ("nll", "nll_tstar", "accuracy", "bpb", "seconds")
_ONCE = (
    "moved",
    "distance",
    "per_travel",
    "gradient_over_eps",
    "change",
    "change_fp32",
)  # of a look, whatever its split


class Logger(Protocol):
    """One dashboard."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


def numbers(row: Row) -> dict[str, float]:
    """A row of metrics.jsonl as numbers: `train/loss`, `held_out/chatml/nll_tstar`, `adapter/moved`."""
    if row["kind"] == "step":
        return dict(_known(row, _STEP, "train"))
    found = dict(_known(row, _LOOK, f"{row['split']}/{row['format']}"))
    return {**found, **dict(_known(row, _ONCE, "adapter"))}


def _known(row: Row, keys: Iterable[str], under: str) -> Iterator[tuple[str, float]]:
    for key in keys:
        if isinstance(row.get(key), int | float):
            yield f"{under}/{key}", float(row[key])


def shared(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """Of a recipe what is a number: no path, no question of the user's, no name leaves the machine."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from shared(value, f"{above}{key}.")
        elif isinstance(value, int | float):
            yield f"{above}{key}", float(value)


class Loggers:
    """All that a recipe names. Rows of a step are sent once; a run that goes on begins where it was. Use `with`."""

    def __init__(self, named: Mapping[str, Logger], note: Callable[[str], object]) -> None:
        self._named, self._note = dict(named), note

    def rows(self, rows: Iterable[Row]) -> None:
        """Send what a step or a look wrote into metrics.jsonl."""
        steps: dict[int, dict[str, float]] = {}
        for row in rows:
            steps.setdefault(int(row["step"]), {}).update(numbers(row))
        for step, told in steps.items():
            self._each(lambda one, told=told, step=step: one.log(told, step))  # type: ignore[misc]

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, one in list(self._named.items()):
            try:
                act(one)
            except Exception as fault:  # a dashboard's trouble, whatever it is, must not end a night
                self._note(f"report_to: {name} is left out from here on ({type(fault).__name__}: {fault})")
                del self._named[name]

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_about: object) -> None:
        self._each(lambda one: one.close())


def missing(names: Iterable[str]) -> Iterator[UserError]:
    """What would keep these from being used; `check` and a run ask before they begin."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            remedy = f"Install it: pip install 'minisymposium[{name}]', or leave it out."
            yield refuse(f"report_to: {name} is not installed.", remedy, key=("report_to",))


def start(
    names: Iterable[str], folder: Path, settings: Mapping[str, Any], note: Callable[[str], object] = print
) -> Loggers:
    """Begin with a run folder's name. `settings`: the recipe; its numbers are sent. Errors: UserError."""
    names = list(names)
    problems = [problem for error in missing(names) for problem in error.problems]
    if problems:
        raise UserError(problems)
    made: dict[str, Logger] = {}
    for name in names:
        try:
            made[name] = _Board(folder / FOLDER) if name == "tensorboard" else _Cloud(name, folder, settings)
        except Exception as fault:  # no login, no network: said, and the night goes on
            note(f"report_to: {name} could not begin ({type(fault).__name__}: {fault})")
    return Loggers(made, note)


class _Board:
    """TensorBoard's own event files."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Cloud:
    """trackio and wandb, which share three calls: init, log and finish. The run folder's name finds a run again."""

    def __init__(self, module: str, folder: Path, settings: Mapping[str, Any]) -> None:
        self._module: Any = importlib.import_module(module)
        name = folder.resolve().name
        own: dict[str, Any] = {}
        if module == "wandb":  # it would also send what is printed, and code
            quiet = {"console": "off", "disable_code": True, "disable_git": True, "silent": True}
            own = {"id": name, "settings": self._module.Settings(**quiet)}
        with redirect_stdout(io.StringIO()):  # trackio talks there, where --json prints its document
            self._module.init(project=PROJECT, name=name, config=dict(shared(settings)), resume="allow", **own)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._module.finish()
