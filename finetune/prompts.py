"""Prompt formats: find them, fill them in with a conversation, say which stretches are trained, draw one per epoch.

Strings only. No token is made here (see masks), no text of a writer is changed, trimmed or checked (see lint), and no
format is guessed from a name. `native` is the base's own chat template, run in a sandbox.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from finetune import grammar, yamlfile
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import Problem, UserError, refuse
from finetune.filling import PROBE as PROBE
from finetune.filling import filled, mapped
from finetune.format import Format, Marks, Rendered, Segment, Special
from finetune.masks import Vocabulary, encode
from finetune.shelf import SHELF as SHELF
from finetune.shelf import aliases
from finetune.shelf import read as read
from finetune.shelf import shipped as shipped
from finetune.template import from_template

Draw = Literal["each_epoch", "fixed", "all"]

NATIVE = Format("native", "native", "", "", "", "", "", source=("the base's own chat template",))


# --- finding formats ---------------------------------------------------------------------------------------------


def load(names: Sequence[str], folder: Path = Path()) -> tuple[Format, ...]:
    """Formats by name, alias, `native`, or path to a file of the same shape (relative to `folder`).

    `sampled:1f3a9c` is drawn from the grammar; a slip may follow any other name or path, as in `chatml~blank-line`.
    UserError with every fault of every name and file at once.
    """
    found: list[Format] = []
    problems: list[Problem] = []
    for name in names:
        try:
            found.append(_one(name, folder))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return tuple(found)


def _one(name: str, folder: Path) -> Format:
    whole, _, slip = name.rpartition("~")
    if slip in grammar.SLIPS and whole:
        return _slipped(_one(whole, folder), slip)
    if name.startswith(grammar.PREFIX):
        return grammar.named(name)
    if name == NATIVE.name:
        return NATIVE
    if name.endswith((".yaml", ".yml")):
        return _of_user(folder / name)
    if name in shipped():
        return read(SHELF / f"{name}.yaml")
    if alias := aliases().get(name.casefold()):
        return read(SHELF / f"{alias}.yaml")
    known = {one.casefold(): one for one in (*shipped(), NATIVE.name)} | aliases()
    near = [known[key] for key in get_close_matches(name.casefold(), known, 1, 0.5)]
    remedy = f"Did you mean {near[0]}?" if near else "`sft ls formats` lists all; a path ends in .yaml."
    raise refuse(f"{name} is not a prompt format.", remedy)


def _slipped(fmt: Format, slip: str) -> Format:
    if (found := grammar.slipped(fmt, slip)) is None:
        raise refuse(f"{fmt.name} has nothing that {slip} could change.", f"Name {fmt.name} itself.")
    return found


def _of_user(path: Path) -> Format:
    fmt = read(path)
    if fmt.name in (*shipped(), NATIVE.name):
        what = f"the name {fmt.name} belongs to another format."
        raise refuse(what, "Choose another `name`.", path, yamlfile.read(path).origin(("name",)).line)
    return fmt


# --- filling them in -----------------------------------------------------------------------------------------------


def render(conversation: Conversation, fmt: Format, special: Special) -> Rendered:
    """The training text of a whole example: up to the mark that ends its last answer, nothing after.

    UserError, by the example's place, where no answer is in the loss or the base's template cannot carry it.
    """
    if not any(turn.loss for turn in conversation.turns if turn.role == "assistant"):
        what, place = f"{conversation.id}: no answer is in the loss.", conversation.origin
        raise refuse(what, "Take one `<!-- no-loss -->` away, or the example.", place.file, place.line)
    return Rendered(fmt.name, tuple(_segments(conversation.turns, fmt, special, conversation.origin)))


def render_prompt(turns: Sequence[Turn], fmt: Format, special: Special) -> Rendered:
    """What a client sends: turns that end in a question, and the generation prompt. Nothing in it is trained."""
    if not turns or turns[-1].role == "assistant":
        raise ValueError("a prompt ends with the user's turn")
    history = [replace(turn, loss=False) for turn in turns]
    return Rendered(fmt.name, tuple(_segments(history, fmt, special, None)))


def prompt_text(turns: Sequence[Turn], fmt: Format, special: Special | None = None) -> str:
    """The string a client sends, without BOS; with no `special`, byte for byte the source's."""
    if special is None:
        return "".join(segment.text for segment in filled(turns, fmt, None))
    return render_prompt(turns, fmt, special).text


def stops(fmt: Format, special: Special) -> tuple[str, ...]:
    """The strings that end a generation: the format's end mark and stop strings as the base says them, its EOS."""
    said = mapped(fmt, special.bos, special.eos)
    end = render(_probe(fmt), fmt, special).segments[-1].text.strip() if fmt.name == NATIVE.name else said.end
    return tuple(dict.fromkeys(stop for stop in (end, *said.stop_strings, special.eos) if stop))


def prove(fmt: Format, vocabulary: Vocabulary) -> list[Problem]:
    """What would keep a model from learning to stop, or begin twice, seen on a small conversation; empty if sound."""
    what = f"format {fmt.name}"
    try:
        tokens = encode(render(_probe(fmt), fmt, vocabulary), vocabulary)
    except UserError as error:
        return error.problems
    answer, problems = tokens.answers[-1], []
    if not any(tokens.trained):
        problems.append(Problem(f"{what}: no token is trained.", "Choose another format."))
    if answer.end >= answer.stop:
        remedy = "Choose a format with an end mark, or name the base's eos_token in tokenizer_config.json."
        problems.append(Problem(f"{what}: nothing ends an answer: no mark, and the base has no EOS.", remedy))
    elif not all(tokens.trained[answer.end : answer.stop]) or answer.stop != len(tokens.ids):
        problems.append(Problem(f"{what}: the end of an answer is not in the loss.", "Choose another format."))
    if vocabulary.bos_id is not None and (vocabulary.bos_id,) * 2 in _begun(fmt, vocabulary):
        problems.append(Problem(f"{what}: two BOS begin the text.", "Take the BOS out of the format's first prefix."))
    return problems


def _begun(fmt: Format, vocabulary: Vocabulary) -> Iterator[tuple[int, ...]]:
    """The first two tokens without a system text and with one, which many a base's own template refuses."""
    for system in (None,) if fmt.name == NATIVE.name else (None, "Be kind."):
        yield encode(render(_probe(fmt, system), fmt, vocabulary), vocabulary).ids[:2]


def remarks(fmt: Format) -> list[str]:
    """What a careful reader would say of a format that is no fault of ours: its source has it so."""
    ending = (fmt.user_suffix + fmt.generation_prompt)[-1:]
    if ending != " " or fmt.name == NATIVE.name:
        return []
    what = f"format {fmt.name}: the prompt ends in a space, which many tokenizers join to the first word of an answer"
    return [f"{what}: a client that trims prompts sends other tokens, and earlier answers may train without that word."]


def clashes(
    trained: Sequence[Format], held_out: Sequence[Format], special: Special | None = None, system: str | None = None
) -> list[Problem]:
    """Held-out formats that render exactly like a trained one; `system`: a system text of the data's, if any.

    UserError where `native` is among them and the base's template cannot carry the probe.
    """
    shown = {one: render(_probe(one, system), one, special or Marks()).text for one in (*trained, *held_out)}
    seen = {shown[one]: one.name for one in reversed(trained)}
    return [
        Problem(f"held-out format {one.name} renders exactly like the trained {twin}.", "Hold out another format.")
        for one in held_out
        if (twin := seen.get(shown[one]))
    ]


def _probe(fmt: Format, system: str | None = None) -> Conversation:
    """The small conversation; of `native` only its last answer is asked, since many templates rewrite earlier ones."""
    turns = [replace(turn, loss=fmt.name != NATIVE.name or at == 3) for at, turn in enumerate(PROBE.turns)]
    return replace(PROBE, turns=(Turn("system", system), *turns) if system else tuple(turns))


def _segments(turns: Sequence[Turn], fmt: Format, special: Special, origin: Origin | None) -> list[Segment]:
    if fmt.name == NATIVE.name:
        return from_template(turns, special, origin)
    return filled(turns, mapped(fmt, special.bos, special.eos), special.eos)


# --- one format an epoch -------------------------------------------------------------------------------------------


def draw(seed: int, epoch: int, example_id: str, formats: Sequence[str], mode: Draw = "each_epoch") -> tuple[str, ...]:
    """The formats an example is met in during an epoch (from 0): one, or all of them with `all`.

    Of each block of `len(formats)` epochs, [0, n), [n, 2n), ..., an example sees every format once, in an order of its
    own. Depends on nothing else: not on other examples, not on how many epochs there will be, not on past draws.
    """
    if mode == "all":
        return tuple(formats)
    block, place = divmod(epoch, len(formats)) if mode == "each_epoch" else (0, 0)

    def lot(name: str) -> bytes:
        return hashlib.sha256("\x1f".join((str(seed), mode, str(block), example_id, name)).encode()).digest()

    return (sorted(formats, key=lot)[place],)
