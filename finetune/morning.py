"""The verbs of the morning after: one short function each, put behind the door by `cli`.

Each reads the words, calls a room and prints. No torch before a verb needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune import terminal

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]


def chat(
    run: Run,
    fmt: Annotated[
        str | None, typer.Option("--format", metavar="F", help="A prompt format; the first trained one otherwise.")
    ] = None,
    epoch: Annotated[
        float | None, typer.Option("--epoch", metavar="N", help="The adapter of an epoch; the chosen one otherwise.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base alone, without the adapter.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Talk to a run in any prompt format; /compare shows base and adapter.

    Questions may come from a pipe. /help lists what else can be typed; nothing is written but what /save is told to.
    """
    terminal.quiet_libraries()
    from finetune import chat as talk
    from finetune import commands, opened
    from finetune.pane import Pane, Piped, Typed

    pane = Pane(sys.stderr if as_json else sys.stdout)
    sitting = talk.begin(opened.read(run), pane, fmt, epoch, base)
    if pane.is_terminal and sys.stdin.isatty():
        talk.converse(sitting, Typed(lambda head: commands.follow(sitting, head), sitting.status))
    else:
        talk.converse(sitting, Piped(sys.stdin, pane.say))
    if as_json:
        typer.echo(json.dumps(talk.as_dict(sitting), indent=2))


VERBS: tuple[tuple[Callable[..., Any], str], ...] = (  # (verb, example)
    (chat, "sft chat runs/quickstart --format alpaca"),
)
