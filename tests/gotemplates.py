"""The part of Go's text/template that Ollama templates are made of here, and Ollama's way of calling and reading it.

Semantics: pkg.go.dev/text/template; Ollama's template/template.go (`collate`, `Execute`) and parser/parser.go.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')


def rendered(template: str, messages: Sequence[Message]) -> str:
    """What Ollama sends for a chat: runs of one role are joined, `System` is all system texts."""
    system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
    joined: list[Message] = []
    for one in messages:
        if joined and joined[-1]["role"] == one["role"]:
            joined[-1] = {**one, "content": joined[-1]["content"] + "\n\n" + one["content"]}
        else:
            joined.append(dict(one))
    data = {"System": system, "Messages": [{"Role": m["role"], "Content": m["content"]} for m in joined]}
    nodes, rest = _parse(_lex(template), 0, ())
    assert rest == len(_lex(template))
    return "".join(_run(nodes, {"$": data, ".": data}))


def _lex(text: str) -> list[tuple[str, str]]:
    """("text" | "do", words) in order. An action may hold strings with braces in them; trim markers are not used."""
    found, at = [], 0
    for action in re.finditer(r'\{\{((?:"(?:[^"\\]|\\.)*"|[^"}]|\}(?!\}))*)\}\}', text):
        found += [("text", text[at : action.start()]), ("do", action[1].strip())]
        assert not action[1].startswith("-")
        assert not action[1].endswith("-")
        at = action.end()
    return [one for one in [*found, ("text", text[at:])] if one != ("text", "")]


@dataclass
class Branch:
    head: str
    then: list[Any]
    other: list[Any]


def _parse(parts: list[tuple[str, str]], at: int, ends: tuple[str, ...]) -> tuple[list[Any], int]:
    nodes: list[Any] = []
    while at < len(parts):
        kind, body = parts[at]
        if kind == "do" and body.split()[0] in ends:
            return nodes, at
        if kind == "do" and body.split()[0] in ("if", "range"):
            node, at = _branch(parts, at, body)
            nodes.append(node)
            continue
        nodes.append((kind, body))
        at += 1
    assert not ends, "no end"
    return nodes, at


def _branch(parts: list[tuple[str, str]], at: int, head: str) -> tuple[Branch, int]:
    then, at = _parse(parts, at + 1, ("else", "end"))
    word = parts[at][1]
    if word == "end":
        return Branch(head, then, []), at + 1
    if word.startswith("else if "):
        other, at = _branch(parts, at, word.removeprefix("else "))
        return Branch(head, then, [other]), at
    other_nodes, at = _parse(parts, at + 1, ("end",))
    return Branch(head, then, other_nodes), at + 1


def _run(nodes: list[Any], scope: dict[str, Any]) -> list[str]:
    out: list[str] = []
    for node in nodes:
        if isinstance(node, Branch):
            out += _run_branch(node, scope)
        elif node[0] == "text":
            out.append(node[1])
        elif declared := re.fullmatch(r"(\$\w+) :?= (.+)", node[1]):
            scope[declared[1]] = _value(declared[2], scope)
        else:
            out.append(str(_value(node[1], scope)))
    return out


def _run_branch(node: Branch, scope: dict[str, Any]) -> list[str]:
    word, rest = node.head.split(" ", 1)
    if word == "if":
        return _run(node.then if _value(rest, scope) else node.other, scope)
    names, _, what = rest.partition(" := ")
    index, item = names.split(", ")
    out: list[str] = []
    for number, value in enumerate(_value(what, scope)):
        scope |= {index: number, item: value, ".": value}
        out += _run(node.then, scope)
    return out


def _value(text: str, scope: dict[str, Any]) -> Any:
    words = _WORD.findall(text)
    value, at = _call(words, 0, scope)
    assert at == len(words), text
    return value


def _call(words: list[str], at: int, scope: dict[str, Any]) -> tuple[Any, int]:
    args: list[Any] = []
    name = words[at] if words[at] in FUNCTIONS else ""
    at += bool(name)
    while at < len(words) and words[at] != ")":
        if words[at] == "(":
            value, at = _call(words, at + 1, scope)
            assert words[at] == ")"
        else:
            value = _term(words[at], scope)
        args.append(value)
        at += 1
    if name:
        return FUNCTIONS[name](*args), at
    assert len(args) == 1, words
    return args[0], at


def _term(word: str, scope: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1].encode("latin-1", "backslashreplace").decode("unicode-escape")
    if word in ("true", "false"):
        return word == "true"
    if word.isdigit():
        return int(word)
    head, *path = word.split(".")
    value = scope[head or "."]
    for key in path:
        value = value[key]
    return value


FUNCTIONS: dict[str, Any] = {
    "eq": lambda one, *others: one in others,
    "not": lambda one: not one,
    "len": len,
    "slice": lambda items, start: items[start:],
    "printf": lambda form, text: form % text,
}


def parsed(modelfile: str) -> list[tuple[str, str]]:
    """(command, value) of a Modelfile, its quirks included: a value ends with the line that closes its quotes."""
    found: list[tuple[str, str]] = []
    at, text = 0, modelfile
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
            continue
        word = re.match(r"[A-Za-z]+", text[at:])
        assert word, text[at : at + 20]
        name, at = word[0].lower(), at + word.end() + 1
        if name == "parameter":
            key = re.match(r"[A-Za-z0-9_]+", text[at:])
            assert key
            name, at = key[0], at + key.end() + 1
        value = ""
        while True:
            closed = _unquoted(value.strip())
            if at >= len(text) or (text[at] in "\r\n" and closed is not None):
                break
            value += text[at] if text[at].isprintable() or text[at] in " \t\r\n" else ""
            at += 1
        assert closed is not None
        found.append((name, closed))
    return found


def _unquoted(text: str) -> str | None:
    if text.startswith('"""'):
        return text[3:-3] if len(text) >= 6 and text.endswith('"""') else None
    if text.startswith('"'):
        return text[1:-1] if len(text) >= 2 and text.endswith('"') else None
    return text
