"""The door: one short function per verb. It reads the words, calls a room, prints, and chooses the exit code.

0 done · 1 our fault · 2 the user must fix something · 130 Ctrl-C. It imports no torch before a verb needs it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune import __version__
from finetune.errors import UserError

app = typer.Typer(
    name="sft",
    help="Teach a model something from a few dozen handwritten examples, and know whether it learned or memorised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.callback(invoke_without_command=True)
def _door(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


@app.command(epilog="Example: sft train recipes/quickstart.yaml --set epochs=20 --out runs/short")
def train(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run to go on with.")
    ],
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as often as you like.")
    ] = [],  # noqa: B006  # typer reads it, nothing writes it
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
    as_json: AsJson = False,
) -> None:
    """Train an adapter from a recipe. An unfinished run of the same recipe goes on by itself."""
    from rich.console import Console

    from finetune import orders, runs

    task = orders.read(orders.Order(target, tuple(sets), out, fresh, more, refit))
    console = Console(stderr=True) if as_json else Console()
    if fresh and (old := runs.fresh(task.run.path)):
        console.print(f"The old run is now {old}.", highlight=False)
    _quiet_libraries()
    from finetune import night
    from finetune.screen import Screen

    outcome = night.run(task, Screen(console))
    if as_json:
        typer.echo(json.dumps(outcome.as_dict(), indent=2))
    else:
        typer.echo(outcome.text)
    raise typer.Exit(130 if outcome.interrupted else 0)


def _quiet_libraries() -> None:
    """Before the first heavy import: no telemetry, no progress bars, no advice meant for programmers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends optional kernels on import


def _tell(error: UserError, as_json: bool) -> None:
    if as_json:
        problems: list[dict[str, Any]] = [
            {"file": None if p.file is None else str(p.file), "line": p.line, "what": p.what, "remedy": p.remedy}
            for p in error.problems
        ]
        typer.echo(json.dumps({"problems": problems}, indent=2))
    for problem in error.problems:
        typer.echo(str(problem), err=True)


def main() -> None:
    """Run the door; a user's mistake is a list of lines and exit 2, never a traceback."""
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
