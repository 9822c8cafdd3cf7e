"""A format as instruct presets of three programs: SillyTavern, text-generation-webui, KoboldCpp.

Shapes as of 2026-11: SillyTavern's default/content/presets/{instruct,context,sysprompt} and instruct-mode.js,
text-generation-webui's user_data/instruction-templates, KoboldCpp's kcpp_adapters. What a program cannot hold is said
beside its files or refused. It writes no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from finetune import clients, jinjaform
from finetune.clients import Phrases, phrases
from finetune.disk import to_json
from finetune.errors import UserError
from finetune.format import Format, Special

_NOTHING = "{{noop}}"  # SillyTavern's macro for nothing: an empty field falls back to another one
_MACROS = re.compile(r"\{\{|<(user|bot|char|charifnotgroup|group)>", re.IGNORECASE)  # its old spelling too
_CARD = ("wiBefore", "description", "personality", "scenario", "wiAfter", "persona")  # fields of a character


@dataclass(frozen=True)
class Preset:
    """Files for one program: by path, text or what becomes JSON. `where`: what to do with them; `limits`: in words."""

    program: str
    files: Mapping[str, Any]
    where: str
    limits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Presets:
    """All that could be made, and why the others could not."""

    made: tuple[Preset, ...]
    refused: Mapping[str, UserError] = field(default_factory=dict)


def presets(fmt: Format, special: Special, name: str) -> Presets:
    """For every program that can hold the format; `name`: what they list it under. Errors: UserError where none can."""
    makers = {"SillyTavern": silly_tavern, "text-generation-webui": webui, "KoboldCpp": kobold}
    made, refused = [], {}
    for program, make in makers.items():
        try:
            made.append(make(fmt, special, name))
        except UserError as error:
            refused[program] = error
    if not made:
        raise UserError([problem for error in refused.values() for problem in error.problems])
    return Presets(tuple(made), refused)


def silly_tavern(fmt: Format, special: Special, name: str) -> Preset:
    """An instruct template, its context template, and a system prompt where the format has one of its own."""
    said = phrases(fmt, special)
    _refuse_indent(said, "SillyTavern")
    if macro := next((found for text in said.texts() if (found := _MACROS.search(text))), None):
        raise clients.cannot(fmt.name, "SillyTavern", f"it reads {macro[0]} as a macro of its own")
    files: dict[str, Any] = {
        f"SillyTavern/instruct/{name}.json": _instruct(said, name),
        f"SillyTavern/context/{name}.json": _context(said, name),
    }
    if said.default:
        files[f"SillyTavern/sysprompt/{name}.json"] = {"name": name, "content": said.default, "post_history": ""}
    where = "Advanced Formatting (the A): import the files under Context Template, Instruct Template, System Prompt."
    return Preset("SillyTavern", files, where, tuple(_limits_of_tavern(said)))


def _instruct(said: Phrases, name: str) -> dict[str, Any]:
    before, after = said.system or ("", "")
    opens = said.first if said.inside else ""
    first = _NOTHING if said.inside else said.first if said.first != said.user else ""
    return {
        "input_sequence": said.user,
        "output_sequence": said.answer,
        "last_output_sequence": (said.ask or _NOTHING) if said.lead else "",
        "system_sequence": before if not said.inside else "",
        "stop_sequence": "\n".join(stop.strip("\n") for stop in said.stops),
        "wrap": False,
        "macro": True,
        "names_behavior": "none",
        "activation_regex": "",
        "first_output_sequence": "",
        "skip_examples": False,
        "output_suffix": said.after,
        "input_suffix": said.user_end,
        "system_suffix": after if not said.inside else "",
        "user_alignment_message": "",
        "system_same_as_user": said.inside or said.system is None,
        "last_system_sequence": "",
        "first_input_sequence": first,
        "last_input_sequence": "",
        "sequences_as_stop_strings": True,
        "story_string_prefix": opens + before,
        "story_string_suffix": after,
        "name": name,
    }


def _context(said: Phrases, name: str) -> dict[str, Any]:
    parts = [
        f"{{{{#if {one}}}}}{{{{{one}}}}}\n{{{{/if}}}}" for one in ("anchorBefore", "system", *_CARD, "anchorAfter")
    ]
    return {
        "story_string": "".join(parts) + "{{trim}}" if said.system else "",
        "example_separator": "",
        "chat_start": "",
        "use_stop_strings": False,
        "names_as_stop_strings": False,
        "story_string_position": 0,
        "story_string_depth": 1,
        "story_string_role": 0,
        "always_force_name2": False,
        "trim_sentences": False,
        "single_line": False,
        "name": name,
    }


def _limits_of_tavern(said: Phrases) -> Iterator[str]:
    if said.system is None:
        yield "the format has no place for a system text: character cards are left out"
    if said.inside:
        yield "the first turn is opened by the system text, so keep a system prompt or a card"
    if said.default:
        yield "the format's own system text is in the sysprompt file: choose it, or your own takes its place"


def webui(fmt: Format, special: Special, name: str) -> Preset:
    """An instruction template: Jinja in YAML. The program adds the BOS."""
    text = jinjaform.chat_template(fmt, special, bos=False)
    body = yaml.dump({"instruction_template": text}, Dumper=_Block, allow_unicode=True, width=10**6)
    where = "copy it to user_data/instruction-templates, then Parameters > Instruction template."
    return Preset("text-generation-webui", {f"text-generation-webui/{name}.yaml": body}, where)


class _Block(yaml.SafeDumper):
    """Several lines as a block, where YAML can write them so."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Block.add_representer(str, _Block.represent_str)


def kobold(fmt: Format, special: Special, name: str) -> Preset:
    """A chat completions adapter: what KoboldCpp puts around messages, in its Lite page too."""
    said = phrases(fmt, special)
    _refuse_indent(said, "KoboldCpp")
    if not said.user.strip():
        raise clients.cannot(fmt.name, "KoboldCpp", "it stops at what opens a user's turn, and nothing does")
    before, after = said.system or ("", "")
    adapter = {
        "system_start": (said.first if said.inside else "") + before,
        "system_end": after,
        "user_start": said.user,
        "user_end": said.user_end,
        "assistant_start": said.answer,
        "assistant_gen": said.ask,
        "assistant_end": said.after,
    }
    start = f"koboldcpp --model model.gguf --chatcompletionsadapter {name}.json"
    where = f"{start}, and on its Lite page the Instruct Tag Preset KoboldCppAutomatic."
    return Preset("KoboldCpp", {f"KoboldCpp/{name}.json": adapter}, where, tuple(_limits_of_kobold(said)))


def _limits_of_kobold(said: Phrases) -> Iterator[str]:
    if said.system is None:
        yield "the format has no place for a system text: send none"
    if said.inside:
        yield "it cannot put a system text into the first turn: send none"
    if said.default:
        yield f"send the format's own system text yourself: {said.default}"
    if said.first != said.user:
        yield "every turn is opened as the second one is"


def _refuse_indent(said: Phrases, program: str) -> None:
    if said.indent:
        raise clients.cannot(said.name, program, "it indents every line of a text")


def list_of(found: Presets) -> Iterator[tuple[str, str]]:
    """(path, text) of every file."""
    for preset in found.made:
        for path, body in preset.files.items():
            yield path, body if isinstance(body, str) else to_json(body, indent=4) + "\n"
