"""A format as Ollama reads it: a Modelfile with a TEMPLATE in Go's template language and the strings to stop at.

Read from Ollama's template/template.go (which values a template sees) and parser/parser.go (quotes; characters that do
not print are dropped). It writes no weights and runs nothing.
"""

from __future__ import annotations

import re

from finetune import clients
from finetune.clients import Phrases, phrases
from finetune.format import Format, Special


def go_template(fmt: Format, special: Special) -> str:
    """What goes around messages, in Go; Ollama adds the BOS. Errors: UserError where it cannot be written so."""
    said = phrases(fmt, special)
    if said.indent:
        raise clients.cannot(fmt.name, "Ollama", "it indents every line of a text, and Go's templates cannot")
    for text in said.texts():
        _refuse_unwritable(fmt.name, text)
    told = _system(said)
    user = [
        _when("$first", _plain(said.first), _plain(said.user)) if said.first != said.user else _plain(said.user),
        _when("$first", told) if told and said.inside else "",
        "{{ $m.Content }}" + _plain(said.user_end),
        _when("$last", _plain(said.ask)),
    ]
    answer = [_opening(said), "{{ $m.Content }}", _when("not $last", _plain(said.after))]
    return "".join(
        [
            told if not said.inside else "",
            "{{ $first := true }}{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}",
            '{{ if eq $m.Role "user" }}',
            *user,
            "{{ $first = false }}",
            '{{ else if eq $m.Role "assistant" }}',
            *answer,
            "{{ $first = false }}{{ end }}{{ end }}",
        ]
    )


def modelfile(fmt: Format, special: Special, source: str, adapter: str | None = None) -> str:
    """The whole file. `source`: a GGUF file beside it or a model Ollama knows; `adapter`: a GGUF file beside it.

    Errors: UserError, as above.
    """
    stops = phrases(fmt, special).stops
    for stop in stops:
        _refuse_unwritable(fmt.name, stop)
    lines = [f"FROM {source}", *([f"ADAPTER {adapter}"] if adapter else [])]
    lines += [f"TEMPLATE {_quoted(go_template(fmt, special))}", *(f"PARAMETER stop {_quoted(stop)}" for stop in stops)]
    return "\n".join(lines) + "\n"


def _system(said: Phrases) -> str:
    if said.system is None:
        return ""
    before, after = map(_plain, said.system)
    return _when(
        "$.System", f"{before}{{{{ $.System }}}}{after}", before + _plain(said.default) + after if said.default else ""
    )


def _opening(said: Phrases) -> str:
    """A model writes the lead itself, and programs give its answer back with it: then it is not written twice."""
    if not said.lead:
        return _plain(said.answer)
    same = f'eq (printf "%.{len(said.lead)}s" $m.Content) {_string(said.lead)}'
    return _when(same, _plain(said.ask), _plain(said.answer))


def _when(test: str, one: str, other: str = "") -> str:
    if not one and not other:
        return ""
    return f"{{{{ if {test} }}}}{one}" + (f"{{{{ else }}}}{other}" if other else "") + "{{ end }}"


def _plain(text: str) -> str:
    """Text outside of actions stands for itself, but for what opens one, or would with what comes next."""
    return re.sub(r"\{(?=\{|\Z)", '{{ "{" }}', text)


def _string(text: str) -> str:
    """A string of Go's."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _quoted(text: str) -> str:
    """As the parser takes quotes off again, line ends included."""
    return f'"""{text}"""'


def _refuse_unwritable(name: str, text: str) -> None:
    if '"""' in text:
        raise clients.cannot(name, "Ollama", 'it contains """, which ends a text in a Modelfile')
    if lost := [sign for sign in text if not sign.isprintable() and sign not in "\n\t"]:
        raise clients.cannot(name, "Ollama", f"its Modelfile drops the character U+{ord(lost[0]):04X}")
