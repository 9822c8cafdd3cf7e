"""What every verb shares: an option, headings and lines, the terminal's width, quiet libraries. It decides nothing."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterable
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


def quiet_libraries() -> None:
    """Before the first heavy import: no telemetry, no progress bars, no advice meant for programmers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1" if not sys.stderr.isatty() else "0")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of one library to another
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it recommends optional kernels on import


def heading(text: str) -> None:
    typer.secho(text, bold=True)


def lines(lines: Iterable[str]) -> None:
    for line in lines:
        typer.echo(line)


def width() -> int:
    """Columns of the terminal; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def line_width(indent: int) -> int | None:
    """Where rows are cut; nowhere if another program reads them."""
    return width() - indent if sys.stdout.isatty() else None
