"""The verbs of the morning after: one short function each, put behind the door by `cli`.

Each reads the words, calls a room and prints. No torch before a verb needs it.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune import disk, tables, terminal
from finetune.errors import refuse

if TYPE_CHECKING:
    from finetune.dial import Sweep
    from finetune.parcel import Parcel
    from finetune.shades import View

PROBES = ("echo", "leak", "formats", "drift")  # of `sft eval`
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
    """Talk to a run, in any prompt format.

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


def eval(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run; with --recipe an adapter's folder or Hub id.")],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="R", help="Base, data and formats of an adapter made elsewhere.")
    ] = None,
    only: Annotated[
        str, typer.Option("--only", metavar="|".join(PROBES), help="One probe, told whole; all of them otherwise.")
    ] = "",
    example: Annotated[
        str, typer.Option("--example", metavar="ID", help="One example's tokens, shaded by how surely it is recited.")
    ] = "",
    dial: Annotated[
        bool, typer.Option("--dial", help="Sweep how much of each kept adapter is used, 0 to 1.5; offer the best.")
    ] = False,
    gate: Annotated[bool, typer.Option("--gate", help="Exit 3 if the verdict is overfit; others pass.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Results of an adapter made elsewhere.")
    ] = None,
    as_json: terminal.AsJson = False,
) -> None:
    """Learned or memorised: every probe, and the verdict.

    Trained texts, unrelated prompts and neutral text are asked of adapter and base; rows and verdict go into the run's
    folder. Leaks are looked for in up to three adapters, and the best tested one becomes the run's.
    """
    if only and only not in PROBES:
        raise refuse(f"--only {only}: there is no such probe.", f"There is {', '.join(PROBES)}.")
    if ((example or dial) and (only or gate)) or (example and dial):
        raise refuse("--example and --dial give no verdict.", "Use each alone, without --only and --gate.")
    terminal.quiet_libraries()
    from finetune import examine, results, subject

    found = subject.of(target, recipe, out)
    for remark in found.remarks:
        _say(remark)
    if example:
        _show(examine.example(found, example, _say), as_json)
        return
    if dial:
        _show_dial(*examine.dialled(found, _say), as_json)
        return
    probes = (only,) if only else PROBES
    exam = examine.examine(found, probes, _say)
    if as_json:
        typer.echo(disk.to_json(results.document(exam, probes), indent=2))
    else:
        for title, lines in results.sections(exam, probes, terminal.width()):
            terminal.heading(title)
            terminal.lines(lines)
            typer.echo()
    raise typer.Exit(3 if gate and exam.verdict.verdict == "overfit" else 0)


def _say(text: str) -> None:
    typer.echo(tables.harmless(text), err=True)


def _show_dial(found: Sweep, folder: Path | None, as_json: bool) -> None:
    from finetune import dial

    if as_json:
        where = None if folder is None else str(folder)
        points = [one.as_dict() for one in found.points]
        told = {"reason": found.reason, "adapter": where, "base": found.base, "points": points}
        typer.echo(disk.to_json(told, indent=2))
        return
    terminal.lines(dial.lines(found, terminal.line_width(0)))
    terminal.lines(["", *tables.wrapped(found.reason, terminal.width())])
    if folder is not None:
        typer.echo(f"Written to {tables.harmless(str(folder))}, which plain PEFT loads; the run's own adapter stays.")


def _show(view: View, as_json: bool) -> None:
    from rich.console import Console

    from finetune import shades

    if as_json:
        typer.echo(disk.to_json(view.as_dict(), indent=2))
    else:
        shades.show(view, Console(highlight=False))


def push(
    run: Run,
    to: Annotated[
        str | None, typer.Option("--to", metavar="USER/NAME", help="The repository; hub.repo of the recipe otherwise.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it. Private otherwise.")] = False,
    with_texts: Annotated[bool, typer.Option("--with-texts", help="Send dataset, samples and report too.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a push that did not arrive.")] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Although the verdict is overfit; the card says so.")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the card; send nothing.")] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """Send adapter, card and report to the Hub.

    Private unless asked; no training text, secret or path of this machine goes with it. What did not arrive is sent
    by --resume, as often as need be.
    """
    terminal.quiet_libraries()
    from finetune import hub, parcel
    from finetune import report as page
    from finetune.runs import RunFolder

    folder = RunFolder(run)
    wish = hub.resumed(folder) if resume else parcel.wish(folder, to, public, with_texts, anyway)
    parcel.allowed(folder, wish)
    made = parcel.make(folder, wish, page.Writer(run).html(texts=wish.with_texts))
    for remark in made.remarks:
        typer.echo(tables.harmless(remark), err=True)
    if dry:
        _show_parcel(made, as_json)
        return
    with folder.lock():
        try:
            sent = hub.push(made, lambda line: typer.echo(line, err=True))
        except KeyboardInterrupt:
            typer.echo(f"Stopped; go on with: sft push {shlex.quote(str(run))} --resume", err=True)
            raise
    if as_json:
        typer.echo(json.dumps({"repo": wish.repo, **asdict(sent)}, indent=2))
    else:
        news = f"{sent.files} files" if sent.changed else "nothing new"
        typer.echo(f"{sent.url}  {'private' if sent.private else 'public'}, {news}, commit {sent.commit[:12]}")


def _show_parcel(made: Parcel, as_json: bool) -> None:
    items = [made.readme({}), *made.items]
    if as_json:
        rows = {item.name: item.size for item in items}
        typer.echo(json.dumps({"repo": made.wish.repo, "public": made.wish.public, "files": rows}, indent=2))
        return
    terminal.heading(f"{made.wish.repo}, {'public' if made.wish.public else 'private'}: nothing was sent")
    terminal.lines(tables.columns([(item.name, f"{item.size} bytes") for item in items]))
    typer.echo()
    typer.echo(tables.harmless(items[0].bytes().decode()))


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run; two or more are compared.")],
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where the page goes; else RUN/report.html.")
    ] = None,
    without_texts: Annotated[
        bool, typer.Option("--without-texts", help="No training text, no answers, no paths: a page to hand on.")
    ] = False,
    as_json: terminal.AsJson = False,
) -> None:
    """One self-contained page about a run, or several runs.

    Needs no server and no network. While a run goes on an open page looks again by itself; of an adapter made elsewhere
    it says what can be said.
    """
    from finetune import report as page
    from finetune import sidebyside

    if len(folders) == 1:
        path = page.Writer(folders[0]).write(to=out, texts=not without_texts)
    elif without_texts:
        raise refuse("--without-texts is for one run.", "A comparison shows no texts anyway.")
    else:
        path = sidebyside.write(folders, out)
    if as_json:
        typer.echo(json.dumps({"page": str(path), "bytes": path.stat().st_size}, indent=2))
    else:
        typer.echo(f"Wrote {tables.harmless(str(path))}, {path.stat().st_size / 2**20:.1f} MiB")
    if show and typer.launch(path.resolve().as_uri()) != 0:
        raise refuse("no browser could be opened.", "Open the file yourself.", path)


def export(
    run: Run,
    to: Annotated[str, typer.Option("--to", metavar="KIND", help="merged, gguf, ollama or presets.")],
    fmt: Annotated[
        str | None, typer.Option("--format", metavar="F", help="A trained format; the first one otherwise.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where it goes; RUN/export/KIND otherwise.")
    ] = None,
    onto: Annotated[
        str, typer.Option("--onto", metavar="BASE", help="base, as published, or dequantised, as it was trained on.")
    ] = "base",
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="D", help="f16, bf16, f32; for gguf and ollama q8_0 too.")
    ] = None,
    sets: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="only=adapter|model, from=NAME, converter=DIR, check=no."),
    ] = [],  # noqa: B006  # typer reads it, nothing writes it
    as_json: terminal.AsJson = False,
) -> None:
    """Files for other programs, read again once written.

    merged: safetensors for transformers and vLLM; gguf: for llama.cpp; ollama: a model for it; presets: instruct
    templates for SillyTavern, text-generation-webui and KoboldCpp. Weights are loaded again by transformers or, where
    xllamacpp is installed, by llama.cpp. `from` is a model Ollama knows, `converter` the folder of llama.cpp's scripts
    (else $LLAMA_CPP, PATH, or our own writer).
    """
    terminal.quiet_libraries()
    from finetune import errand, opened

    wish = errand.wish(to, fmt, out, onto, dtype, sets)
    from finetune import export as goods

    done = goods.export(opened.read(run), wish, lambda line: typer.echo(tables.harmless(line), err=True))
    if as_json:
        typer.echo(json.dumps(done.as_dict(), indent=2))
        return
    terminal.lines(tables.harmless(line) for line in goods.told(done, terminal.width()))


VERBS: tuple[tuple[Callable[..., Any], str], ...] = (  # (verb, example)
    (eval, "sft eval runs/quickstart --only echo"),
    (report, "sft report runs/quickstart --open"),
    (chat, "sft chat runs/quickstart --format alpaca"),
    (export, "sft export runs/quickstart --to gguf"),
    (push, "sft push runs/quickstart --to me/quickstart-lora"),
)
