"""A base's tokenizer as llama.cpp reads it: tokens, their kinds, scores or merges, and how text is cut beforehand.

Byte-level BPE and SentencePiece's BPE, both from tokenizer.json. What llama.cpp would cut in another way is refused
with the reason: a wrong tokenizer is not seen until answers are bad.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from finetune.errors import UserError, refuse
from finetune.masks import Vocabulary

_GPT2 = "the GPT-2 pattern"
# Patterns of tokenizer.json and llama.cpp's names for them (src/llama-vocab.cpp); whether whole words go before merges
_CUTS: dict[str, tuple[str, bool]] = {
    _GPT2: ("gpt-2", False),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("llama-bpe", True),
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": ("qwen2", False),
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": ("tekken", True),
}
_REMEDY = "Convert with llama.cpp's own script (--set converter=DIR), or use the `merged` export."


@dataclass(frozen=True)
class Wordlist:
    """`model`: "gpt2" (byte-level) or "llama" (SentencePiece). `pre`: the name of how text is cut.

    One entry a row of the embedding: `tokens`, `kinds`, and `scores` where SentencePiece orders merges by them; else
    `merges`, in order. `spaced`: a space goes before a text.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[TokenType, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    spaced: bool = False


def read(folder: Path, rows: int) -> Wordlist:
    """Of the base in a folder, filled up to `rows` tokens. Errors: UserError where llama.cpp would cut otherwise."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise refuse("there is no tokenizer.json.", "Is this the folder of a base?", folder)
    state = json.loads(path.read_text(encoding="utf-8"))
    model = state["model"]
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise _cannot(f"its tokenizer is of the kind {model.get('type')}")
    return _sentencepiece(state, rows) if model.get("byte_fallback") else _byte_level(state, rows)


def _cannot(why: str) -> UserError:
    return refuse(f"the tokenizer cannot be written for llama.cpp: {why}.", _REMEDY)


def _byte_level(state: Mapping[str, Any], rows: int) -> Wordlist:
    if state["normalizer"] is not None and state["normalizer"]["type"] != "NFC":
        raise _cannot(f"it normalises text ({state['normalizer']['type']})")
    pre, whole_words = _CUTS.get(_pattern(state), ("", False))
    if not pre:
        raise _cannot("llama.cpp knows no name for how it cuts text")
    if bool(state["model"].get("ignore_merges")) != whole_words:
        raise _cannot(f"it treats whole words otherwise than llama.cpp's {pre}")
    tokens, kinds = _tokens(state, rows)
    merges = tuple(" ".join(pair) for pair in _merges(state))
    if not merges:
        raise _cannot("it merges nothing, and llama.cpp loads no such file")
    return Wordlist("gpt2", pre, tokens, kinds, merges=merges)


def _pattern(state: Mapping[str, Any]) -> str:
    """The pattern words are cut by, where bytes follow; "" where it is cut in any other way."""
    step = state["pre_tokenizer"] or {"type": ""}
    steps = step["pretokenizers"] if step["type"] == "Sequence" else [step]
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return ""
    if not before:
        return _GPT2 if last.get("use_regex", True) else ""
    cut = before[0]
    if len(before) > 1 or last.get("use_regex", True) or cut["type"] != "Split" or cut["behavior"] != "Isolated":
        return ""
    return str(cut["pattern"].get("Regex", "")) if not cut.get("invert") else ""


def _sentencepiece(state: Mapping[str, Any], rows: int) -> Wordlist:
    """SentencePiece merges whatever pair makes the token of the highest score; tokenizer.json lists pairs in order."""
    tokens, kinds = _tokens(state, rows)
    ranks: dict[str, int] = {}
    pairs = _merges(state)
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, rank)
    _prove_complete(tokens, kinds, set(pairs))
    scores = tuple(-float(ranks.get(text, len(pairs) + at)) for at, text in enumerate(tokens))
    spaced = _spaced(state)
    return Wordlist("llama", "default", tokens, kinds, scores=scores, spaced=spaced)


def _spaced(state: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front, and that spaces become the word mark. Errors: UserError."""
    given, cut = state["normalizer"], state["pre_tokenizer"]
    steps = [] if given is None else given["normalizers"] if given["type"] == "Sequence" else [given]
    kinds = [step["type"] for step in steps]
    if cut is not None and cut["type"] == "Metaspace" and not steps and not cut.get("split"):
        return bool(cut.get("prepend_scheme", "always") != "never")
    if cut is not None or kinds not in (["Prepend", "Replace"], ["Replace"]):
        raise _cannot("it prepares text in a way SentencePiece does not")
    return "Prepend" in kinds


def _prove_complete(tokens: Sequence[str], kinds: Sequence[TokenType], pairs: set[tuple[str, str]]) -> None:
    normal = {text for text, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    for text in normal:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in pairs and pair[0] in normal and pair[1] in normal:
                raise _cannot(f"it never joins {pair[0]} and {pair[1]}, and llama.cpp would")


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = state["model"]["merges"]
    pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in found)
    return [(left, right) for left, right in pairs]


def _tokens(state: Mapping[str, Any], rows: int) -> tuple[tuple[str, ...], tuple[TokenType, ...]]:
    """Every token by id, unused names where the embedding has more rows. Errors: UserError where it has fewer."""
    words = {at: text for text, at in state["model"]["vocab"].items()}
    kinds = {at: _kind(text, state) for at, text in words.items()}
    for one in state["added_tokens"]:
        words[one["id"]] = one["content"]
        kinds[one["id"]] = TokenType.CONTROL if one["special"] else TokenType.USER_DEFINED
    unknown = state["model"].get("unk_token")
    kinds |= {at: TokenType.UNKNOWN for at, text in words.items() if text == unknown and unknown is not None}
    if max(words) >= rows:
        raise _cannot(f"it has {max(words) + 1} tokens and the base's embedding {rows} rows")
    tokens = tuple(words.get(at, f"[PAD{at}]") for at in range(rows))
    return tokens, tuple(kinds.get(at, TokenType.UNUSED) for at in range(rows))


def _kind(text: str, state: Mapping[str, Any]) -> TokenType:
    byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if byte and state["model"].get("byte_fallback") else TokenType.NORMAL


def write(writer: GGUFWriter, words: Wordlist, vocabulary: Vocabulary, end: str | None, template: str | None) -> None:
    """Into a file's head. `end`: the mark that ends a turn, where it is one token; `template`: Jinja."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.spaced)
    else:
        writer.add_token_merges(words.merges)
    named = {text: at for at, text in enumerate(words.tokens)}
    special = vocabulary.special_tokens
    for key, add in (("bos_token", writer.add_bos_token_id), ("eos_token", writer.add_eos_token_id)):
        if special.get(key) in named:
            add(named[special[key]])
    for key, add in (("unk_token", writer.add_unk_token_id), ("pad_token", writer.add_pad_token_id)):
        if special.get(key) in named:
            add(named[special[key]])
    if end in named and end != vocabulary.eos:
        writer.add_eot_token_id(named[end])
    writer.add_add_bos_token(vocabulary.bos_id is not None)
    writer.add_add_eos_token(False)
    if template:
        writer.add_chat_template(template)
