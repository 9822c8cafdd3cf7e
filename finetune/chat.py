"""Talk to a run in a terminal: questions, and commands that begin with `/`.

It opens the run and reads line after line. It renders as training does, writes nothing but what /save asks for, and
changes no run.
"""

from __future__ import annotations

import difflib
import warnings
from typing import Any

from finetune import commands, opened
from finetune.errors import UserError, refuse
from finetune.opened import Opened
from finetune.pane import Pane, Reader
from finetune.sitting import Kept, Sitting
from finetune.talk import Talk
from finetune.voice import Voice, Who


def begin(of: Opened, pane: Pane, fmt: str | None = None, epoch: float | None = None, base: bool = False) -> Sitting:
    """Load the model and sit down. Errors: UserError, before anything is loaded, where there is no such adapter."""
    kept = Kept.by(of)
    format_ = commands.find_format(of, fmt or of.plan.first_format)
    step = kept.chosen if epoch is None else kept.at(epoch)
    pane.note(f"Loading {of.base.name} ({of.recipe.quantization}).")
    vocabulary = of.plan.vocabulary
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries advise programmers; a night keeps that in its log
        worn = opened.wear(of, kept.folders[step])
    voice = Voice(worn, vocabulary.tokenizer, vocabulary.eos_id, kept.folders)
    return Sitting(of, pane, Talk(voice, vocabulary, format_, Who(None if base else step)), voice, kept)


def converse(sitting: Sitting, reader: Reader) -> None:
    """Until the input ends or /quit. What goes wrong with a line is said, and the next one is read."""
    sitting.pane.note(f"{sitting.of.run.path}: {sitting.status()}")
    sitting.pane.note("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.")
    while True:
        try:
            if not _carry_out(sitting, reader.ask()):
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            sitting.pane.note("Ctrl-D or /quit leaves.")
        except UserError as fault:
            for problem in fault.problems:
                sitting.pane.say(str(problem), "red")


def as_dict(sitting: Sitting) -> dict[str, Any]:
    """The talk, for `--json`."""
    return {"run": str(sitting.of.run.path), "exchanges": [one.as_dict() for one in sitting.talk.exchanges]}


def _carry_out(sitting: Sitting, line: str) -> bool:
    """One question or command; False to leave."""
    if not line.startswith("/") or line.startswith("//"):
        if line.strip():
            sitting.ask(line.removeprefix("/"))
        return True
    name, _, words = line[1:].partition(" ")
    if name in ("quit", "exit"):
        return False
    if name not in commands.COMMANDS:
        near = difflib.get_close_matches(name, commands.COMMANDS, 1)
        remedy = f"Did you mean /{near[0]}?" if near else "/help lists them; // begins a text with a slash."
        raise refuse(f"/{name} is no command.", remedy)
    commands.COMMANDS[name].does(sitting, words.strip())
    return True
