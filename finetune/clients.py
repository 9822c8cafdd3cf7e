"""A format as a client program writes it: the strings it puts around messages, and what no program can be told.

Programs add the BOS by themselves and know messages, not our segments. This room renders nothing and writes no file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune import prompts
from finetune.errors import UserError, refuse
from finetune.filling import mapped
from finetune.format import Format, Special


@dataclass(frozen=True)
class Phrases:
    """What goes around each message, in the base's words, BOS left out.

    `first`: opens the first user's turn, `user` every other. `answer`: opens an answer in the history; `ask` is what is
    sent last, and `lead` what `answer` has beyond it: the model writes that itself. `after` ends an answer in the
    history, `last` the very last one. `inside`: a system text stands in the first user's turn.
    """

    name: str
    system: tuple[str, str] | None  # before and after a system text; None: such a text is dropped
    default: str  # system text where none is given
    inside: bool
    first: str
    user: str
    user_end: str
    ask: str
    lead: str
    after: str
    last: str
    stops: tuple[str, ...]
    indent: str = ""

    @property
    def answer(self) -> str:
        return self.ask + self.lead

    def texts(self) -> tuple[str, ...]:
        """Every string that is written as it is."""
        told = (self.first, self.user, self.user_end, self.answer, self.after, self.last, self.default)
        return (*told, *(self.system or ()))


def phrases(fmt: Format, special: Special) -> Phrases:
    """Of a format on a base. Errors: UserError for `native`, which is a program and no strings."""
    if fmt.name == prompts.NATIVE.name:
        what = "the format `native` is the base's own program, not strings to put around messages."
        raise refuse(what, "Choose a trained format of strings with --format.")
    said = _without_bos(mapped(fmt, special.bos, special.eos), special.bos)
    before, mark, _ = said.assistant_suffix.partition(said.end) if said.end else ("", special.eos or "", "")
    return Phrases(
        name=fmt.name,
        system=None if said.system_mode == "none" else (said.system_prefix, said.system_suffix),
        default="" if said.system_mode == "none" else said.default_system,
        inside=said.system_mode == "inside_first_user",
        first=said.user_prefix if said.first_user_prefix is None else said.first_user_prefix,
        user=said.user_prefix,
        user_end=said.user_suffix,
        ask=said.generation_prompt,
        lead=said.assistant_prefix[len(said.generation_prompt) :],
        after=said.assistant_suffix,
        last=before + mark,
        stops=prompts.stops(fmt, special),
        indent=said.indent,
    )


def _without_bos(said: Format, bos: str | None) -> Format:
    """Where the format itself writes the BOS first, the program's own takes its place."""
    first = said.user_prefix if said.first_user_prefix is None else said.first_user_prefix
    if not bos or not (first.startswith(bos) or said.system_prefix.startswith(bos)):
        return said
    return replace(said, first_user_prefix=first.removeprefix(bos), system_prefix=said.system_prefix.removeprefix(bos))


def cannot(name: str, program: str, why: str) -> UserError:
    """A format that a program has no way to write."""
    return refuse(f"{program} cannot write the format {name}: {why}.", "Choose another trained format with --format.")
