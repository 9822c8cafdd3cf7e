"""A format as a Jinja chat template: what transformers, vLLM, llama.cpp and text-generation-webui render messages with.

Each template is run before it is handed out and must give, character for character, what training rendered. It knows
text messages of system, user and assistant: no tools, no pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune import clients, prompts
from finetune.clients import Phrases, phrases
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import refuse
from finetune.format import Format, Special

_SYSTEM = Turn("system", "Be brief.\n\nBe kind.")
_TALK = (
    Turn("user", "Is it raining?"),
    Turn("assistant", "A little.\n\nTake a coat."),
    Turn("user", "And now?\nStill?"),
    Turn("assistant", "No."),
)


def chat_template(fmt: Format, special: Special, bos: bool = True) -> str:
    """The template of a format on a base; the base's own for `native`. `bos`: it writes the BOS itself.

    Errors: UserError where the format cannot be written so.
    """
    if fmt.name == prompts.NATIVE.name:
        if not special.chat_template:
            what = "the base has no chat template of its own, so there is no format `native`."
            raise refuse(what, "Choose a trained format with --format.")
        return special.chat_template
    text = _written(phrases(fmt, special), bos)
    _prove(text, fmt, special)
    return text


def _written(said: Phrases, bos: bool) -> str:
    """One line each step; the dashes take the line ends out again."""
    show = f" | indent({_quoted(said.indent)})" if said.indent else ""
    lines = [
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set talk = messages[1:] -%}",
        "{%- else -%}",
        f"{{%- set system = {_quoted(said.default)} -%}}{{%- set talk = messages -%}}",
        "{%- endif -%}",
    ]
    if bos:
        lines.append("{%- if bos_token is defined and bos_token -%}{{- bos_token -}}{%- endif -%}")
    told = _system(said, show)
    lines += [told] if told and not said.inside else []
    lines += [
        "{%- for message in talk -%}",
        f"{{%- set text = message['content']{show} -%}}",
        "{%- if message['role'] == 'user' -%}",
        f"{{{{- {_choice('loop.first', said.first, said.user)} -}}}}",
        *([f"{{%- if loop.first -%}}{told}{{%- endif -%}}"] if told and said.inside else []),
        f"{{{{- text + {_quoted(said.user_end)} -}}}}",
        "{%- elif message['role'] == 'assistant' -%}",
        _opening(said),
        "{{- text -}}",
        f"{{{{- {_choice('loop.last and not add_generation_prompt', said.last, said.after)} -}}}}",
        "{%- else -%}",
        "{{- raise_exception('there is no place for a message of the role ' + message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {_quoted(said.ask)} -}}}}{{%- endif -%}}",
    ]
    return "\n".join(lines)


def _system(said: Phrases, show: str) -> str:
    if said.system is None:
        return ""
    before, after = map(_quoted, said.system)
    return f"{{%- if system -%}}{{{{- {before} + (system{show}) + {after} -}}}}{{%- endif -%}}"


def _opening(said: Phrases) -> str:
    """A model writes the lead itself, and programs give its answer back with it: then it is not written twice."""
    if not said.lead:
        return f"{{{{- {_quoted(said.answer)} -}}}}"
    return f"{{{{- {_choice(f'text.startswith({_quoted(said.lead)})', said.ask, said.answer)} -}}}}"


def _choice(when: str, one: str, other: str) -> str:
    return _quoted(one) if one == other else f"({_quoted(one)} if {when} else {_quoted(other)})"


def _quoted(text: str) -> str:
    """A Jinja string: JSON's escapes are read alike there."""
    return json.dumps(text, ensure_ascii=False)


def _prove(text: str, fmt: Format, special: Special) -> None:
    """Run it as transformers does, with and without a system text, questions and whole conversations."""
    for head in ((), (_SYSTEM,)):
        for count in range(1, len(_TALK) + 1):
            turns = (*head, *_TALK[:count])
            if _run(text, turns, special) != _own(turns, fmt, special).removeprefix(special.bos or ""):
                raise clients.cannot(fmt.name, "a Jinja template", "what it renders is not what training rendered")


def _own(turns: Sequence[Turn], fmt: Format, special: Special) -> str:
    if turns[-1].role == "user":
        return prompts.prompt_text(turns, fmt, special)
    return prompts.render(Conversation("proof", tuple(turns), Origin("proof")), fmt, special).text


def _run(text: str, turns: Sequence[Turn], special: Special) -> str | None:
    """None where the template raises."""
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    asks = turns[-1].role == "user"
    try:
        shown = sandbox.from_string(text).render(
            messages=messages, add_generation_prompt=asks, bos_token=special.bos or "", eos_token=special.eos or ""
        )
    except TemplateError:
        return None
    return shown.removeprefix(special.bos or "")
