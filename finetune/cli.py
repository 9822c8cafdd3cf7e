"""The door: one short function per verb. It reads the words, calls a room, prints, and chooses the exit code.

0 done · 1 our fault · 2 the user must fix something · 130 Ctrl-C. It imports no torch before a verb needs it.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune import __version__, morning, tables, terminal
from finetune.errors import Problem, UserError, refuse

if TYPE_CHECKING:
    from finetune.ledger import Fact

app = typer.Typer(
    name="sft",
    help="Teach a model something from a few dozen handwritten examples, and know whether it learned or memorised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as a path.")]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as often as you like.")]
_MOST = 20  # warnings shown; a dataset of a few dozen may have hundreds


@app.callback(invoke_without_command=True)
def _door(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: sft ls formats")
def ls(
    kind: Annotated[str, typer.Argument(metavar="[recipes|formats|datasets|runs]", help="Only these.")] = "",
    as_json: terminal.AsJson = False,
) -> None:
    """What there is: recipes, formats, datasets, runs."""
    from finetune import inventory

    if kind and kind not in inventory.KINDS:
        raise refuse(f"sft ls {kind}: there is no such list.", f"There is {', '.join(inventory.KINDS)}.")
    found = {name: rows() for name, rows in inventory.KINDS.items() if kind in ("", name)}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for name, rows in found.items():
        indent = "" if kind else "  "
        if not kind:
            terminal.heading(f"{name} ({len(rows)})")
        if not rows:
            typer.echo(f"{indent}{inventory.NONE[name]}")
        elif name == "formats" and not kind:
            terminal.lines(tables.wrapped(", ".join(row["name"] for row in rows), terminal.width(), indent))
        else:
            lines = tables.columns([inventory.cells(name, row) for row in rows], terminal.line_width(len(indent)))
            terminal.lines(indent + line for line in lines)


@app.command(epilog="Example: sft new mine.yaml --from quickstart --with-data")
def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the recipe goes; nothing is overwritten.")],
    starter: Annotated[
        str, typer.Option("--from", metavar="STARTER", help="Its name; sft ls recipes lists them.")
    ] = "",
    with_data: Annotated[bool, typer.Option("--with-data", help="Copy its dataset beside it, to be changed.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Copy a starter recipe. Its paths keep working, from wherever it goes."""
    from finetune import starters

    if not starter:
        names = ", ".join(one.stem for one in starters.starters("recipes"))
        raise refuse("sft new needs --from and the name of a starter.", f"There is {names or 'none installed'}.")
    written = starters.copy(starters.find(starter), file, with_data)
    if as_json:
        typer.echo(json.dumps({"written": [str(path) for path in written]}, indent=2))
        return
    for path in written:
        typer.echo(f"Wrote {tables.harmless(str(path))}")
    typer.echo(f"Next: edit it (`sft explain` says what each line means), then sft check {shlex.quote(str(file))}")


@app.command(epilog="Example: sft explain lora.rank")
def explain(
    key: Annotated[str, typer.Argument(metavar="[KEY]", help="A setting or a section; all of them otherwise.")] = "",
    schema: Annotated[
        bool, typer.Option("--schema", help="The JSON schema instead: save it beside a recipe, for your editor.")
    ] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """What each setting means, with its type and bounds."""
    from finetune import recipe

    if schema:
        typer.echo(json.dumps(recipe.json_schema(), indent=2))
        return
    found = [one for one in recipe.settings() if key in ("", one.key) or one.key.startswith(f"{key}.")]
    if not found:
        raise refuse(f"{tables.harmless(key)[:80]} is not a setting.", recipe.SHAPE.near(key))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    for one in found:
        terminal.heading(f"{one.key}: {one.default if one.default is not None else '(yours to write)'}")
        terminal.lines(tables.wrapped("; ".join(filter(None, (one.type, one.bounds))), terminal.width(), "  "))
        terminal.lines(tables.wrapped(one.meaning, terminal.width(), "  "))


@app.command(epilog="Example: sft check recipes/minisymposium.yaml --gpu 12GB")
def check(
    recipe: RecipeFile,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Memory of the card it is meant for, such as 12GB.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Measure this machine, kept for the next check; minutes for a 7B on a CPU."),
    ] = False,
    sets: Sets = [],  # noqa: B006  # typer reads it, nothing writes it
    as_json: terminal.AsJson = False,
) -> None:
    """Before the night: all faults, then the plan.

    Every fault of recipe and dataset is told at once; else every number of the run, with its reason. Loads no weights
    and asks no network; memory and minutes are estimates.
    """
    from finetune import outlook

    found = outlook.look(recipe, sets, gpu, calibrate)
    for problem in found.problems:
        typer.echo(_safe(problem), err=True)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        _show_outlook(found.warnings, found.facts)
        count = len(found.problems)
        typer.echo(f"{count} to mend." if count else f"Nothing to mend. Next: sft train {shlex.quote(str(recipe))}")
    raise typer.Exit(2 if found.problems else 0)


def _show_outlook(warnings: Sequence[Problem], facts: Sequence[Fact]) -> None:
    """Warnings first and the plan last, where the eye is."""
    if warnings:
        terminal.heading(f"Worth a look ({len(warnings)}; none keeps a run from starting)")
        for one in warnings[:_MOST]:
            terminal.lines(tables.wrapped(_safe(one), terminal.width(), "  "))
        if len(warnings) > _MOST:
            typer.echo(f"  ... and {len(warnings) - _MOST} more: --json has them all.")
        typer.echo()
    for section in dict.fromkeys(fact.section for fact in facts):
        terminal.heading(section)
        rows = [(fact.name, fact.shown, fact.reason) for fact in facts if fact.section == section]
        terminal.lines(tables.told(rows, terminal.width()))
        typer.echo()


@app.command(epilog="Example: sft preview recipes/quickstart.yaml --format chatml -n 2")
def preview(
    recipe: RecipeFile,
    formats: Annotated[
        list[str], typer.Option("--format", metavar="F", help="A format, a .yaml file, or all; as often as you like.")
    ] = [],  # noqa: B006  # typer reads it, nothing writes it
    count: Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many examples.")] = 1,
    sets: Sets = [],  # noqa: B006
    as_json: terminal.AsJson = False,
) -> None:
    """The exact tokens of an example, trained ones marked."""
    from finetune import preview as shown

    found = shown.views(recipe, sets, formats, count)
    if as_json:
        typer.echo(json.dumps([view.as_dict() for view in found], indent=2))
        return
    from rich.console import Console

    shown.show(found, Console(highlight=False))


@app.command(epilog="Example: sft train recipes/quickstart.yaml --set epochs=20 --out runs/short")
def train(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run to go on with.")
    ],
    sets: Sets = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The run folder; runs/<recipe> otherwise.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an old run folder is renamed, never deleted.")
    ] = False,
    more: Annotated[int, typer.Option("--more", metavar="N", min=0, help="N more epochs on a finished run.")] = 0,
    refit: Annotated[
        bool, typer.Option("--refit", help="Train on every example, held-out included, as far as RUN's adapter went.")
    ] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Train an adapter from a recipe. An unfinished run of the same recipe goes on by itself."""
    from rich.console import Console

    from finetune import orders, runs

    task = orders.read(orders.Order(target, tuple(sets), out, fresh, more, refit))
    console = Console(stderr=True) if as_json else Console()
    if fresh and (old := runs.fresh(task.run.path)):
        console.print(f"The old run is now {old}.", highlight=False)
    terminal.quiet_libraries()
    from finetune import night
    from finetune.screen import Screen

    with _blaming(target, sets):
        outcome = night.run(task, Screen(console))
    if as_json:
        typer.echo(json.dumps(outcome.as_dict(), indent=2))
    else:
        typer.echo(outcome.text)
    raise typer.Exit(130 if outcome.interrupted else 0)


@contextmanager
def _blaming(target: str, sets: list[str]) -> Iterator[None]:
    """What blames a setting names the line where it was written, in the recipe or in the run's own."""
    from finetune import recipe

    try:
        yield
    except UserError as error:
        file = Path(target) / "recipe.yaml" if Path(target).is_dir() else Path(target)
        raise UserError(recipe.placed(error.problems, file, sets)) from error


def _safe(problem: Problem) -> str:
    """As a line for a terminal; what lies below the working folder is named from there."""
    file = problem.file
    if file is not None and os.path.isabs(file) and Path(file).is_relative_to(Path.cwd()):
        problem = replace(problem, file=Path(file).relative_to(Path.cwd()))
    return tables.harmless(str(problem))


def _tell(error: UserError, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"problems": [one.as_dict() for one in error.problems]}, indent=2))
    for problem in error.problems:
        typer.echo(_safe(problem), err=True)


def _tell_our_fault(error: Exception) -> None:
    """One line, and where the rest is: a traceback says nothing to whoever only wanted to train."""
    with tempfile.NamedTemporaryFile("w", prefix="sft-fault-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    what = tables.harmless(f"{type(error).__name__}: {error}").splitlines()[0][:200]
    typer.echo(f"This is a fault of sft, not yours: {what}  The traceback is in {file.name}.", err=True)


for _verb, _example in morning.VERBS:
    app.command(epilog=f"Example: {_example}")(_verb)


def main() -> None:
    """Run the door; a user's mistake is a list of lines and exit 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without ≤ or é is no reason to fall over
    try:
        app()
    except UserError as error:
        _tell(error, "--json" in sys.argv)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:  # whatever got here is a fault of ours, and exit 1
        _tell_our_fault(error)
        sys.exit(1)
