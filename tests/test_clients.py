"""Every format in other programs' words gives what training rendered, byte for byte, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import gotemplates
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune import clients, grammar, jinjaform, modelfile, presets, prompts, shelf
from finetune.conversation import Turn
from finetune.errors import UserError
from finetune.format import Format, Marks

ALL = [prompts.load([name])[0] for name in prompts.shipped()]
SAMPLED = list(islice(grammar.samples("elsewhere", 0), 30))
BASES = [Marks(), Marks(None, None), Marks("<|begin|>", "<|stop|>")]
SYSTEM = Turn("system", "Be brief.\n\nBe kind.")
TALK = [
    Turn("user", 'Is it {{ "raining" }}?\nSay so.'),
    Turn("assistant", "A little.\n\nTake a coat."),
    Turn("user", "And 'now'? \\n"),
    Turn("assistant", "{% if %} No."),
    Turn("user", "Thanks."),
]
names = pytest.mark.parametrize("fmt", [*ALL, *SAMPLED], ids=lambda fmt: fmt.name)


def messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def questions() -> list[list[Turn]]:
    return [[*head, *TALK[:count]] for head in ([], [SYSTEM]) for count in (1, 3, 5)]


# --- Jinja


@names
def test_jinja_renders_what_training_rendered(fmt: Format) -> None:
    for base in BASES:
        text = jinjaform.chat_template(fmt, base)
        for turns in questions():
            own = prompts.prompt_text(turns, fmt, base)
            assert jinja(text, turns, base, asks=True) == (base.bos or "") + own


def jinja(text: str, turns: Sequence[Turn], base: Marks, asks: bool) -> str:
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    shown = sandbox.from_string(text)
    return shown.render(messages=messages(turns), add_generation_prompt=asks, bos_token=base.bos, eos_token=base.eos)


def test_an_answer_given_back_with_its_leading_space_is_not_written_twice() -> None:
    (vicuna,) = prompts.load(["vicuna-v1.1"])
    turns = [TALK[0], Turn("assistant", " Yes."), TALK[2]]
    wanted = prompts.prompt_text([TALK[0], Turn("assistant", "Yes."), TALK[2]], vicuna, Marks())
    assert jinja(jinjaform.chat_template(vicuna, Marks(), bos=False), turns, Marks(), asks=True) == wanted
    assert gotemplates.rendered(modelfile.go_template(vicuna, Marks()), messages(turns)) == wanted


def test_a_template_refuses_a_role_it_has_no_place_for() -> None:
    text = jinjaform.chat_template(ALL[0], Marks())
    sandbox = ImmutableSandboxedEnvironment()
    sandbox.globals["raise_exception"] = pytest.fail
    with pytest.raises(pytest.fail.Exception, match="role tool"):
        sandbox.from_string(text).render(messages=[{"role": "tool", "content": ""}], bos_token="")


def test_native_is_the_bases_own_template_or_refused() -> None:
    own = Marks(chat_template="{{ messages[0].content }}")
    assert jinjaform.chat_template(prompts.NATIVE, own) == own.chat_template
    for make in (jinjaform.chat_template, modelfile.go_template, clients.phrases):
        with pytest.raises(UserError, match="native"):
            make(prompts.NATIVE, Marks())


# --- Go


@names
def test_ollama_renders_what_training_rendered(fmt: Format) -> None:
    for base in BASES:
        if fmt.indent:
            with pytest.raises(UserError, match=f"Ollama cannot write the format {fmt.name}: it indents"):
                modelfile.modelfile(fmt, base, "./x.gguf")
            continue
        read = gotemplates.parsed(modelfile.modelfile(fmt, base, "./x.gguf", "./lora.gguf"))
        assert read[:2] == [("from", "./x.gguf"), ("adapter", "./lora.gguf")]
        assert [stop for key, stop in read if key == "stop"] == list(prompts.stops(fmt, base))
        template = dict(read)["template"]
        for turns in questions():
            assert gotemplates.rendered(template, messages(turns)) == prompts.prompt_text(turns, fmt, base)


def test_only_the_indenting_format_is_beyond_ollama() -> None:
    assert [fmt.name for fmt in ALL if fmt.indent] == ["yaml-turns"]


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from('ab{}"\\ \n%$'), max_size=12), st.text(st.sampled_from('ab{}" \n'), max_size=8))
def test_whatever_strings_a_format_has_ollama_reads_them_or_it_is_refused(start: str, end: str) -> None:
    fmt = Format("odd", "odd", start + "U", end, start + "A: ", end + "|", start + "A:", stop_strings=("|" + start,))
    try:
        text = modelfile.modelfile(fmt, Marks(), "x")
    except UserError:
        assert '"""' in start + end
        return
    read = dict(gotemplates.parsed(text))
    assert read["stop"] in prompts.stops(fmt, Marks())
    for turns in questions():
        own = prompts.prompt_text(turns, fmt, Marks())
        assert gotemplates.rendered(read["template"], messages(turns)) == own
        assert jinja(jinjaform.chat_template(fmt, Marks(), bos=False), turns, Marks(), asks=True) == own


@pytest.mark.parametrize("sign", ['"""', "\u200b", "\u00a0"])
def test_what_a_modelfile_would_lose_is_refused(sign: str) -> None:
    fmt = Format("odd", "odd", f"{sign}U:", "\n", "A:", "\n", "A:")
    with pytest.raises(UserError, match="Ollama cannot write the format odd"):
        modelfile.go_template(fmt, Marks())


# --- presets: what each program does with its fields


def tavern(preset: dict[str, Any], context: dict[str, Any], system: str, talk: Sequence[Turn]) -> str:
    """SillyTavern's prompt of a plain chat (public/scripts/instruct-mode.js, power-user.js `renderStoryString`)."""

    def macro(text: str) -> str:
        return text.replace("{{noop}}", "")

    story = system.rstrip("\n") if system and "{{system}}" in context["story_string"] else ""
    out = macro(preset["story_string_prefix"]) + story + macro(preset["story_string_suffix"]) if story else ""
    assert not preset["wrap"]
    for at, turn in enumerate(talk):
        user = turn.role == "user"
        prefix = preset["input_sequence"] if user else preset["output_sequence"]
        if user and at == 0:
            prefix = preset["first_input_sequence"] or prefix
        out += macro(prefix) + turn.text + macro(preset["input_suffix"] if user else preset["output_suffix"])
    return out + macro(preset["last_output_sequence"] or preset["output_sequence"])


def kobold(adapter: dict[str, str], turns: Sequence[Turn]) -> str:
    """KoboldCpp's prompt of a chat completion (`transform_genparams`)."""
    out = "".join(adapter[f"{turn.role}_start"] + turn.text + adapter[f"{turn.role}_end"] for turn in turns)
    return out + adapter["assistant_gen"]


@names
def test_presets_render_what_training_rendered(fmt: Format) -> None:
    base = Marks()
    found = presets.presets(fmt, base, "mine")
    files = dict(presets.list_of(found))
    refused = set(found.refused)
    template = yaml.safe_load(files["text-generation-webui/mine.yaml"])["instruction_template"]
    said = clients.phrases(fmt, base)
    for turns in questions():
        own = prompts.prompt_text(turns, fmt, base)
        talk = [turn for turn in turns if turn.role != "system"]
        given = turns[0].text if turns[0].role == "system" else ""
        assert jinja(template, turns, base, asks=True) == own
        if "SillyTavern" not in refused and (given or said.default or not said.inside):
            preset, context = (json.loads(files[f"SillyTavern/{kind}/mine.json"]) for kind in ("instruct", "context"))
            assert tavern(preset, context, given or said.default, talk) == own
        if "KoboldCpp" not in refused and not (given and (said.inside or said.system is None)):
            adapter = json.loads(files["KoboldCpp/mine.json"])
            whole = [Turn("system", said.default), *talk] if said.default and not given else turns
            assert kobold(adapter, whole) == own


def test_what_a_program_cannot_hold_is_said() -> None:
    told = {fmt.name: presets.presets(fmt, Marks(), "x") for fmt in ALL}
    assert set(told["yaml-turns"].refused) == {"SillyTavern", "KoboldCpp"}
    assert "<user> as a macro" in str(told["xml-tags"].refused["SillyTavern"])
    limits = {made.program: made.limits for made in told["llama-2-chat"].made}
    assert limits["KoboldCpp"] == ("it cannot put a system text into the first turn: send none",)
    assert "keep a system prompt" in limits["SillyTavern"][0]
    assert any("send the format's own system text" in limit for limit in told["alpaca"].made[2].limits)
    assert not any(made.limits for made in told["chatml"].made)


def test_presets_have_every_field_of_the_programs_own_ones() -> None:
    files = dict(presets.list_of(presets.presets(prompts.load(["chatml"])[0], Marks(), "x")))
    instruct = json.loads(files["SillyTavern/instruct/x.json"])
    # SillyTavern:default/content/presets/instruct/Gemma 4.json@7acda07138, context/Gemma 4.json@3654462561
    assert set(instruct) == {
        *("input_sequence", "output_sequence", "last_output_sequence", "system_sequence", "stop_sequence", "wrap"),
        *("macro", "names_behavior", "activation_regex", "first_output_sequence", "skip_examples", "output_suffix"),
        *("input_suffix", "system_suffix", "user_alignment_message", "system_same_as_user", "last_system_sequence"),
        *("first_input_sequence", "last_input_sequence", "sequences_as_stop_strings", "story_string_prefix"),
        *("story_string_suffix", "name"),
    }
    assert instruct["stop_sequence"].splitlines()[0] == "<|im_end|>"
    context = json.loads(files["SillyTavern/context/x.json"])
    assert context["story_string"].endswith("{{trim}}")


def test_a_users_own_format_goes_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        'name: mine\nfamily: mine\nuser_prefix: "Q> "\nuser_suffix: "\\n"\nassistant_prefix: "A> "\n'
        'generation_prompt: "A>"\nassistant_suffix: "</s>"\nend: "</s>"\n'
        'system_mode: none\nfirst_user_prefix: "<s>Q> "\n'
    )
    fmt = shelf.read(tmp_path / "mine.yaml")
    text = jinjaform.chat_template(fmt, Marks())
    assert jinja(text, TALK[:1], Marks(), asks=True).startswith("<s>Q> ")  # one BOS, not two
