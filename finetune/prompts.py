"""Prompt formats: find them, fill them in with a conversation, say which stretches are trained, draw one per epoch.

Strings only. No token is made here (see masks), no text of a writer is changed, trimmed or checked (see lint), and no
format is guessed from a name. `native` is the base's own chat template, run in a sandbox.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic_core import ErrorDetails

from finetune import yamlfile
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import Problem, UserError, refuse
from finetune.format import Format, Marks, Rendered, Segment, Special
from finetune.masks import Vocabulary, encode
from finetune.template import from_template

Draw = Literal["each_epoch", "fixed", "all"]

SHELF = Path(__file__).parent / "formats"
NATIVE = Format("native", "native", "", "", "", "", "", source=("the base's own chat template",))
PROBE = Conversation(
    "probe",
    (
        Turn("user", "Is it raining?"),
        Turn("assistant", "A little."),
        Turn("user", "And now?"),
        Turn("assistant", "No."),
    ),
    Origin("probe"),
)

# Only these mean «the document ends (begins)» and become the base's own; a turn's end mark stays as written.
_DOCUMENT_ENDS = ("</s>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<eos>")
_DOCUMENT_STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>")
_DOCUMENT = re.compile("|".join(map(re.escape, _DOCUMENT_ENDS + _DOCUMENT_STARTS)))


# --- finding formats ---------------------------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    """The names of all formats on the shelf, in alphabetical order. `native` is not among them."""
    return tuple(sorted(path.stem for path in SHELF.glob("*.yaml")))


def load(names: Sequence[str], folder: Path = Path()) -> tuple[Format, ...]:
    """Formats by name, alias, `native`, or path to a file of the same shape (relative to `folder`).

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
    if name == NATIVE.name:
        return NATIVE
    if name.endswith((".yaml", ".yml")):
        return _of_user(folder / name)
    if name in shipped():
        return read(SHELF / f"{name}.yaml")
    if alias := _aliases().get(name.casefold()):
        return read(SHELF / f"{alias}.yaml")
    known = {one.casefold(): one for one in (*shipped(), NATIVE.name)} | _aliases()
    near = [known[key] for key in get_close_matches(name.casefold(), known, 1, 0.5)]
    remedy = f"Did you mean {near[0]}?" if near else "`sft ls formats` lists all; a path ends in .yaml."
    raise refuse(f"{name} is not a prompt format.", remedy)


@lru_cache(maxsize=1)
def _aliases() -> dict[str, str]:
    return {alias.casefold(): name for name in shipped() for alias in read(SHELF / f"{name}.yaml").aliases}


def _of_user(path: Path) -> Format:
    fmt = read(path)
    if fmt.name in (*shipped(), NATIVE.name):
        what = f"the name {fmt.name} belongs to another format."
        raise refuse(what, "Choose another `name`.", path, yamlfile.read(path).origin(("name",)).line)
    return fmt


@lru_cache(maxsize=256)
def read(path: Path) -> Format:
    """One format file. UserError with a line and a remedy for every fault."""
    document = yamlfile.read(path)
    try:
        fmt = Format(**_Shape.model_validate(document.data).model_dump())
    except ValidationError as error:
        told = [(_key(one), *_fault(one)) for one in error.errors()]
    else:
        told = list(_nonsense(fmt))
    for key, what, remedy in told:
        document.refuse((key,), what, remedy)
    if document.problems:
        raise UserError(document.problems)
    return fmt


def _shape() -> type[BaseModel]:
    """The model of a format file is the dataclass itself: one list of keys."""
    kinds = get_type_hints(Format)
    keys: dict[str, Any] = {
        one.name: (kinds[one.name], ... if one.default is MISSING else one.default) for one in fields(Format)
    }
    return create_model("FormatFile", __config__=ConfigDict(extra="forbid"), **keys)


_Shape = _shape()


def _key(error: ErrorDetails) -> str:
    return str(error["loc"][0]) if error["loc"] else ""


def _fault(error: ErrorDetails) -> tuple[str, str]:
    key, known = _key(error), list(_Shape.model_fields)
    if error["type"] == "extra_forbidden":
        near = get_close_matches(key, known, 1, 0.6)
        remedy = f"Did you mean {near[0]}?" if near else f"A format has: {', '.join(known)}."
        return f"{key} is not part of a format.", remedy
    if error["type"] == "missing":
        return f"{key} is missing.", 'Write it as a quoted string; "" where the format has nothing there.'
    return f"{key} is {json.dumps(error['input'], default=str)[:60]}: {error['msg'].lower()}.", "Put text in quotes."


def _nonsense(fmt: Format) -> Iterator[tuple[str, str, str]]:
    """(key, what, remedy) where the strings contradict each other."""
    if not fmt.assistant_prefix.startswith(fmt.generation_prompt):
        what = f"generation_prompt {fmt.generation_prompt!r} does not begin assistant_prefix."
        yield "generation_prompt", what, "History shows what was sent: let assistant_prefix begin with it."
    if fmt.end not in fmt.assistant_suffix:
        what = f"end {fmt.end!r} is not in assistant_suffix."
        yield "end", what, 'Write the mark as it stands there, or "" to end answers with the base\'s EOS.'
    if not fmt.name or "/" in fmt.name:
        yield "name", f"{fmt.name!r} is no name for a format.", "Use letters, digits and dashes."


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
        return "".join(segment.text for segment in _filled(turns, fmt, None))
    return render_prompt(turns, fmt, special).text


def stops(fmt: Format, special: Special) -> tuple[str, ...]:
    """The strings that end a generation: the format's end mark and stop strings as the base says them, its EOS."""
    mapped = _mapped(fmt, special.bos, special.eos)
    end = render(_probe(fmt), fmt, special).segments[-1].text.strip() if fmt.name == NATIVE.name else mapped.end
    return tuple(dict.fromkeys(stop for stop in (end, *mapped.stop_strings, special.eos) if stop))


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
    if vocabulary.bos_id is not None and tokens.ids[:2] == (vocabulary.bos_id,) * 2:
        problems.append(Problem(f"{what}: two BOS begin the text.", "Take the BOS out of the format's first prefix."))
    return problems


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
    return _filled(turns, _mapped(fmt, special.bos, special.eos), special.eos)


@lru_cache(maxsize=256)
def _mapped(fmt: Format, bos: str | None, eos: str | None) -> Format:
    """The format with its document tokens in the base's words: an EOS the base lacks stays, a BOS goes."""

    def own(found: re.Match[str]) -> str:
        return bos or "" if found.group() in _DOCUMENT_STARTS else eos or found.group()

    frame = [one.name for one in fields(Format) if one.name.endswith(("_prefix", "_suffix", "_prompt", "end"))]
    changed: dict[str, Any] = {key: _DOCUMENT.sub(own, getattr(fmt, key) or "") for key in frame}
    if fmt.first_user_prefix is None:
        changed["first_user_prefix"] = None
    return replace(fmt, **changed, stop_strings=tuple(_DOCUMENT.sub(own, stop) for stop in fmt.stop_strings))


def _filled(turns: Sequence[Turn], fmt: Format, eos: str | None) -> list[Segment]:
    """A conversation in a format of strings. An empty system text means none, not the default one."""
    told = [_text(turn.text, fmt) for turn in turns if turn.role == "system"] or [Segment(fmt.default_system)]
    shown = told[0].text and fmt.system_mode != "none"
    opening = [Segment(fmt.system_prefix), told[0], Segment(fmt.system_suffix)] if shown else []
    talk = [turn for turn in turns if turn.role != "system"]
    rows = [*opening] if fmt.system_mode == "before" else []
    for at, turn in enumerate(talk):
        if turn.role == "assistant":
            rows += _answer(turn, fmt, eos, last=at == len(talk) - 1)
        else:
            inside = opening if at == 0 and fmt.system_mode == "inside_first_user" else []
            rows += [Segment(_prefix(fmt, at)), *inside, _text(turn.text, fmt), Segment(fmt.user_suffix)]
    if talk and talk[-1].role == "user":
        rows.append(Segment(fmt.generation_prompt))
    return [row for row in rows if row.text or row.role in ("lead", "answer", "end")]


def _prefix(fmt: Format, at: int) -> str:
    """What opens a user turn; where answers have no mark, its first character already stands in the answer's ending."""
    if at == 0:
        return fmt.user_prefix if fmt.first_user_prefix is None else fmt.first_user_prefix
    return fmt.user_prefix if fmt.end else fmt.user_prefix[1:]


def _answer(turn: Turn, fmt: Format, eos: str | None, last: bool) -> list[Segment]:
    """The scaffold before an answer, its three segments, the scaffold after."""
    before, mark, after = fmt.assistant_suffix.partition(fmt.end) if fmt.end else ("", "", "")
    ending = before + mark
    if not fmt.end:
        # The loss covers each token that *begins* in a trained stretch: one character stands for a first token.
        ending = eos or "" if last else fmt.assistant_suffix + fmt.user_prefix[:1]
    return [
        Segment(fmt.generation_prompt),
        Segment(fmt.assistant_prefix[len(fmt.generation_prompt) :], "lead", turn.loss),
        Segment(_text(turn.text, fmt).text, "answer", turn.loss),
        Segment(ending, "end", turn.loss),
        Segment("" if last else after),
    ]


def _text(text: str, fmt: Format) -> Segment:
    return Segment(re.sub(r"\n(?=[^\n])", "\n" + fmt.indent, text) if fmt.indent else text, "text")


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
