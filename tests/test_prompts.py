"""Prompt formats: byte for byte their source's, refused with a line where they are wrong, drawn evenly."""

import json
import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import UserError
from finetune.format import Format, Marks
from finetune.prompts import NATIVE, PROBE, SHELF, clashes, draw, load, prompt_text, read, render, shipped, stops

FACTS = Path(__file__).parents[2] / "shared" / "data" / "formats.json"
SYSTEM, ONE, ANSWER, TWO = Turn("system", "SYS"), Turn("user", "U1"), Turn("assistant", "A1"), Turn("user", "U2")
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# What a client sends for U1, A1, U2; then the same with a system text. Written out by hand from each source.
SENT = {
    "chatml": (
        "<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nSYS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n"
        "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\n",
    ),
    "alpaca": (
        ALPACA + "### Instruction:\nU1\n\n### Response:\nA1\n\n### Instruction:\nU2\n\n### Response:\n",
        "SYS\n\n### Instruction:\nU1\n\n### Response:\nA1\n\n### Instruction:\nU2\n\n### Response:\n",
    ),
    "vicuna-v1.1": (
        VICUNA + "\n\nUSER: U1\nASSISTANT: A1</s>\nUSER: U2\nASSISTANT:",
        "SYS\n\nUSER: U1\nASSISTANT: A1</s>\nUSER: U2\nASSISTANT:",
    ),
    "vicuna-v1.1-singleline": (
        VICUNA + " USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
        "SYS USER: U1 ASSISTANT: A1</s>USER: U2 ASSISTANT:",
    ),
    "guanaco": (
        "### Human: U1\n### Assistant: A1</s>\n### Human: U2\n### Assistant:",
        "SYS### Human: U1\n### Assistant: A1</s>\n### Human: U2\n### Assistant:",
    ),
    "user-assistant-plain": (
        "User: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant:",
        "SYS\n\nUser: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant:",
    ),
    "md-bold-role": (
        "**User:** U1\n\n**Assistant:** A1\n\n**User:** U2\n\n**Assistant:**",
        "**System:** SYS\n\n**User:** U1\n\n**Assistant:** A1\n\n**User:** U2\n\n**Assistant:**",
    ),
    "zephyr": (
        "<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
        "<|system|>\nSYS</s>\n<|user|>\nU1</s>\n<|assistant|>\nA1</s>\n<|user|>\nU2</s>\n<|assistant|>\n",
    ),
    "mistral-v1": (
        " [INST] U1 [/INST] A1</s> [INST] U2 [/INST]",
        " [INST] SYS\n\nU1 [/INST] A1</s> [INST] U2 [/INST]",
    ),
    "mistral-v3": ("[INST] U1[/INST] A1</s>[INST] U2[/INST]", "[INST] SYS\n\nU1[/INST] A1</s>[INST] U2[/INST]"),
    "mistral-v3-tekken": ("[INST]U1[/INST]A1</s>[INST]U2[/INST]", "[INST]SYS\n\nU1[/INST]A1</s>[INST]U2[/INST]"),
    "mistral-instruct-tgw": ("[INST] U1 [/INST]A1</s>[INST] U2 [/INST]",) * 2,
    "llama-2-chat": (
        "[INST] U1 [/INST] A1 </s><s>[INST] U2 [/INST] ",
        "[INST] <<SYS>>\nSYS\n<</SYS>>\n\nU1 [/INST] A1 </s><s>[INST] U2 [/INST] ",
    ),
    "llama-3": (
        "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "A1<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\nSYS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU1"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nU2<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "gemma": (
        "<start_of_turn>user\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
        "<start_of_turn>user\nSYS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
        "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\n",
    ),
    "openchat-3.5": (
        "GPT4 Correct User: U1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>"
        "GPT4 Correct User: U2<|end_of_turn|>GPT4 Correct Assistant:",
        "SYS<|end_of_turn|>GPT4 Correct User: U1<|end_of_turn|>GPT4 Correct Assistant: A1<|end_of_turn|>"
        "GPT4 Correct User: U2<|end_of_turn|>GPT4 Correct Assistant:",
    ),
    "xml-tags": (
        "<user>\nU1\n</user>\n<assistant>\nA1\n</assistant>\n<user>\nU2\n</user>\n<assistant>\n",
        "<system>\nSYS\n</system>\n<user>\nU1\n</user>\n<assistant>\nA1\n</assistant>\n<user>\nU2\n</user>\n<assistant>\n",
    ),
    "falcon-instruct": (
        "\n\nUser: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant:",
        "SYS\n\nUser: U1\n\nAssistant: A1\n\nUser: U2\n\nAssistant:",
    ),
}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{% for m in messages %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {% endif %}
    {% if m['role'] == 'user' %}
        {{- '[INST] ' + m['content'] | trim + ' [/INST]' -}}
    {% else %}
        {% generation %}{{- ' ' + m['content'] | trim + eos_token -}}{% endgeneration %}
    {% endif %}
{% endfor %}"""
PLAIN = (  # no mark after an answer
    "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)
FORGETFUL = (  # shows only the last answer's thoughts, as reasoning models' templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def example(*turns: Turn) -> Conversation:
    return Conversation("umbrella", turns, Origin("data/umbrella.md", 7))


def fmt(name: str) -> Format:
    return load([name])[0]


# --- the shelf


@pytest.mark.parametrize("name", SENT)
def test_a_client_sends_exactly_this(name: str) -> None:
    bare, told = SENT[name]
    assert prompt_text((ONE, ANSWER, TWO), fmt(name)) == bare
    assert prompt_text((SYSTEM, ONE, ANSWER, TWO), fmt(name)) == told


def test_every_shipped_format_matches_its_source_byte_for_byte() -> None:
    if not FACTS.is_file():
        pytest.skip(f"{FACTS} is not beside this checkout; the hand-written table above still holds")
    facts = {one["name"]: one for one in json.loads(FACTS.read_text(encoding="utf-8"))["formats"]}
    assert set(facts) == set(shipped())
    same = [one.name for one in fields(Format) if one.name in facts["chatml"] and one.name != "notes"]
    assert len(same) == 16  # all that a format file and the facts both say
    for name, fact in facts.items():
        ours = fmt(name)
        turns = (Turn("system", "SYSTEXT"), Turn("user", "UONE"))
        assert prompt_text(turns, ours) == fact["example_prompt"], name
        for key in same:
            said = getattr(ours, key)
            assert (list(said) if isinstance(said, tuple) else said) == fact[key], (name, key)
        assert ours.notes == " ".join(fact["notes"].split()), name
        assert ours.end in ("", fact["eos_token"], "</assistant>"), name


@pytest.mark.parametrize("name", shipped())
def test_every_format_file_is_named_as_it_says_and_names_its_source(name: str) -> None:
    one = read(SHELF / f"{name}.yaml")
    assert one.name == name
    assert one.source
    assert one.end in one.assistant_suffix
    assert one.assistant_prefix.startswith(one.generation_prompt)


def test_no_two_formats_share_a_name_or_alias() -> None:
    names = [word for one in load(shipped()) for word in {w.casefold() for w in (one.name, *one.aliases)}]
    assert len(names) == len(set(names))


def test_a_format_is_found_by_its_alias() -> None:
    assert [one.name for one in load(["Galactica", "gpt4x", "native"])] == ["question-answer", "openchat-3.5", "native"]


def test_unknown_formats_are_told_at_once_with_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        load(["chatlm", "alpaca", "zzz", "zefyr"])
    assert [problem.what for problem in caught.value.problems] == [
        "chatlm is not a prompt format.",
        "zzz is not a prompt format.",
        "zefyr is not a prompt format.",
    ]
    assert [problem.remedy for problem in caught.value.problems] == [
        "Did you mean chatml?",
        "`sft ls formats` lists all; a path ends in .yaml.",
        "Did you mean zephyr?",
    ]


# --- formats of one's own

MINE = """\
name: mine
family: home
user_prefix: "Q> "
user_suffix: "\\n"
assistant_prefix: "A> "
assistant_suffix: " /over\\n"
generation_prompt: "A>"
end: "/over"
"""


def test_a_format_of_ones_own_is_read_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(MINE)
    (mine,) = load(["mine.yaml"], tmp_path)
    assert prompt_text((ONE, ANSWER, TWO), mine) == "Q> U1\nA> A1 /over\nQ> U2\nA>"
    assert render(example(ONE, ANSWER), mine, Marks()).text == "Q> U1\nA> A1 /over"


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "remedy"),
    [
        ("user_suffix", "user_sufix", 4, "user_sufix is not part of a format.", "Did you mean user_suffix?"),
        ('user_suffix: "\\n"\n', "", None, "user_suffix is missing.", "Write it as a quoted string"),
        ('"Q> "', "7", 3, "user_prefix is 7: input should be a valid string.", "Put text in quotes."),
        ('end: "/over"', 'end: "/out"', 8, "end '/out' is not in assistant_suffix.", "Write the mark"),
        ('prompt: "A>"', 'prompt: "B>"', 7, "generation_prompt 'B>' does not begin", "let assistant_prefix begin"),
        ("name: mine", "name: chatml", 1, "the name chatml belongs to another format.", "Choose another"),
        ("family: home", "family: home\nfamily: away", 3, "family is written twice", "Keep one"),
        ("family: home", "system_mode: after", 2, "system_mode is \"after\": input should be 'before'", ""),
        ("family: home", "family: [", 4, "this is not YAML", "Check"),
    ],
)
def test_a_bad_format_file_is_refused_with_its_line_and_a_remedy(
    tmp_path: Path, old: str, new: str, line: int | None, what: str, remedy: str
) -> None:
    assert old in MINE
    (tmp_path / "mine.yaml").write_text(MINE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load(["mine.yaml"], tmp_path)
    hit = next(problem for problem in caught.value.problems if problem.what.startswith(what))
    assert remedy in hit.remedy
    assert (Path(str(hit.file)), hit.line) == (tmp_path / "mine.yaml", line)


def test_all_faults_of_all_format_files_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(MINE.replace("family", "famly").replace('"Q> "', "7"))
    with pytest.raises(UserError) as caught:
        load(["a.yaml", "gone.yaml", "chatlm"], tmp_path)
    assert len(caught.value.problems) == 5  # unknown key, missing key, number for text; no such file; no such name


# --- filling in


def test_the_default_system_text_stands_in_for_none_and_yields_to_an_empty_one() -> None:
    alpaca = fmt("alpaca")
    assert prompt_text((ONE,), alpaca).startswith("Below is")
    assert prompt_text((SYSTEM, ONE), alpaca).startswith("SYS\n\n###")
    assert prompt_text((Turn("system", ""), ONE), alpaca).startswith("### Instruction")


def test_document_tokens_become_the_bases_own_and_turn_marks_stay() -> None:
    qwen = Marks(bos=None, eos="<|endoftext|>")
    sent = prompt_text((ONE, ANSWER, TWO), fmt("zephyr"), qwen)
    assert "</s>" not in sent
    assert sent.count("<|endoftext|>") == 3
    assert "A1 <|endoftext|>[INST]" in prompt_text((ONE, ANSWER, TWO), fmt("llama-2-chat"), qwen)
    assert prompt_text((ONE,), fmt("gemma"), qwen) == prompt_text((ONE,), fmt("gemma"))
    assert render(example(ONE, ANSWER), fmt("chatml"), qwen).text.endswith("A1<|im_end|>")


def test_rendered_history_is_what_a_client_sends() -> None:
    for one in load(shipped()):
        for turns in (PROBE.turns, (SYSTEM, *PROBE.turns)):
            rendered = render(replace(PROBE, turns=turns), one, Marks())
            assert rendered.text[: rendered.prompt] == prompt_text(turns[:-1], one, Marks()), one.name


def test_the_words_of_an_answer_are_trained_and_the_question_is_not() -> None:
    for one in load(shipped()):
        rendered = render(PROBE, one, Marks())
        assert [s.text for s in rendered.segments if s.role == "answer" and s.trained] == ["A little.", "No."], one.name
        assert [s.text for s in rendered.segments if s.role == "text"] == ["Is it raining?", "And now?"], one.name
        assert not any(s.trained for s in rendered.segments if s.role in ("text", "scaffold")), one.name


@pytest.mark.parametrize(
    ("name", "earlier", "last"),
    [
        ("chatml", "<|im_end|>", "<|im_end|>"),
        ("alpaca", "\n\n#", "</s>"),
        ("vicuna-v1.1", "</s>", "</s>"),
        ("llama-2-chat", " </s>", " </s>"),
        ("deepseek-coder", "\n<|EOT|>", "\n<|EOT|>"),
        ("metharme", "<", "</s>"),
        ("raw", "\n\n", "</s>"),
        ("xml-tags", "\n</assistant>", "\n</assistant>"),
    ],
)
def test_an_answer_ends_in_its_mark_or_in_the_bases_end_of_text(name: str, earlier: str, last: str) -> None:
    ends = [s.text for s in render(PROBE, fmt(name), Marks()).segments if s.role == "end"]
    assert ends == [earlier, last]


def test_further_lines_are_indented_where_the_format_says_so() -> None:
    text = prompt_text((Turn("user", "one\n\ntwo"),), fmt("yaml-turns"))
    assert text == "- user: |\n    one\n\n    two\n- assistant: |\n    "


def test_an_example_without_a_trained_answer_is_refused_by_its_place() -> None:
    with pytest.raises(UserError, match=r"data/umbrella\.md:7  umbrella: no answer is in the loss"):
        render(example(ONE, replace(ANSWER, loss=False)), fmt("chatml"), Marks())


def test_a_held_out_format_that_renders_like_a_trained_one_is_named() -> None:
    llama, pythia, chatml, qwen = load(["openassistant-llama", "openassistant", "chatml", "qwen2.5-default-system"])
    (problem,) = clashes([chatml, llama], [pythia, qwen])  # </s> and <|endoftext|> are the same token of one base
    assert problem.what == "held-out format openassistant renders exactly like the trained openassistant-llama."
    assert [p.what for p in clashes([chatml], [qwen], system="SYS")]  # its default is all that tells it apart
    assert not clashes(load(FIVE), load(["zephyr", "guanaco", "mistral-v1", "openchat-3.5", "xml-tags"]))


def test_stops_name_the_mark_the_stop_strings_and_the_bases_end() -> None:
    assert stops(fmt("chatml"), Marks(None, "<|endoftext|>")) == ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    assert stops(fmt("zephyr"), Marks(None, "<|endoftext|>")) == ("<|endoftext|>", "<|user|>")
    assert stops(fmt("alpaca"), Marks()) == ("### Instruction:", "\n###", "</s>")
    assert stops(NATIVE, Marks(eos="<|endoftext|>", chat_template=CHATML)) == ("<|im_end|>", "<|endoftext|>")


# --- the base's own template


def own(template: str) -> Marks:
    return Marks("<s>", "</s>", template, {"unk_token": "<unk>"})


@pytest.mark.parametrize("template", [CHATML, MISTRAL, PLAIN, FORGETFUL], ids=["chatml", "mistral", "plain", "forgets"])
@pytest.mark.parametrize("count", [1, 3], ids=["one-question", "two-questions"])
def test_native_template_renders_as_transformers_does(template: str, count: int) -> None:
    turns = PROBE.turns[:count]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    theirs, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **names)
    assert prompt_text(turns, NATIVE, own(template)) == theirs[0].removeprefix("<s>")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["A little.<|im_end|>", "No.<|im_end|>"]),
        (MISTRAL, [" A little.</s>", " No.</s>"]),
        (PLAIN, [" A little.\n\nQ", " No.</s>"]),
    ],
    ids=["chatml", "mistral", "plain"],
)
def test_native_template_answers_are_located(template: str, ends: list[str]) -> None:
    rendered = render(PROBE, NATIVE, own(template))
    assert [rendered.text[one.start : one.stop] for one in rendered.answers] == ends
    assert rendered.text.endswith(ends[-1])
    assert rendered.text[: rendered.prompt] == prompt_text(PROBE.turns[:-1], NATIVE, own(template))
    assert [s.text for s in rendered.segments if s.role == "text"] == ["Is it raining?", "And now?"]


def test_native_template_that_rewrites_earlier_answers_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"probe:1  .*rewrites earlier turns, so answer 1 cannot be located"):
        render(PROBE, NATIVE, own(FORGETFUL))
    single = render(example(*PROBE.turns[:2]), NATIVE, own(FORGETFUL))
    assert single.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nA little.<|im_end|>")


def test_native_template_that_refuses_or_changes_a_text_is_told() -> None:
    with pytest.raises(UserError, match="roles must alternate"):
        prompt_text((SYSTEM, ONE), NATIVE, own(MISTRAL))
    with pytest.raises(UserError, match="it changes the texts"):
        prompt_text((Turn("user", "Hello"),), NATIVE, own("{{ messages[0].content | upper }}"))
    with pytest.raises(UserError, match="the base has no chat template"):
        prompt_text((ONE,), NATIVE, Marks())


def test_native_template_runs_in_a_sandbox() -> None:
    with pytest.raises(UserError, match=r"chat template cannot carry this: .*unsafe"):
        prompt_text((ONE,), NATIVE, own("{{ messages.__class__.__mro__ }}{{ ''.__class__ }}"))


def test_native_template_sees_the_same_day_every_day() -> None:
    assert (
        prompt_text((ONE,), NATIVE, own("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")) == "26 Jul 2024U1"
    )


def test_native_template_trims_and_the_trimmed_text_is_trained() -> None:
    turns = (ONE, Turn("assistant", "  A1\n"))
    assert render(example(*turns), NATIVE, own(MISTRAL)).text == "[INST] U1 [/INST] A1</s>"


# --- the draw

FIVE = ["chatml", "alpaca", "vicuna-v1.1", "user-assistant-plain", "md-bold-role"]


def drawn(example_id: str, epochs: int, mode: str = "each_epoch", seed: int = 0) -> list[str]:
    return [draw(seed, epoch, example_id, FIVE, mode)[0] for epoch in range(epochs)]  # type: ignore[arg-type]


def test_each_format_is_met_once_per_block() -> None:
    for example_id in map(str, range(40)):
        row = drawn(example_id, 50)
        assert all(sorted(row[at : at + 5]) == sorted(FIVE) for at in range(0, 50, 5))


def test_draw_does_not_depend_on_epochs_or_other_examples_or_the_process() -> None:
    assert drawn("umbrella", 7) == drawn("umbrella", 600)[:7]
    # A pinned row: it changes only if every run that could be resumed changes with it.
    assert [name[:2] for name in drawn("umbrella", 10)] == ["ch", "al", "md", "us", "vi", "al", "md", "us", "ch", "vi"]


def test_examples_blocks_and_seeds_draw_differently() -> None:
    assert len({tuple(drawn(str(at), 5)) for at in range(60)}) > 30
    assert len({tuple(drawn("umbrella", 500)[at : at + 5]) for at in range(0, 500, 5)}) > 30
    assert drawn("umbrella", 50) != drawn("umbrella", 50, seed=1)


def test_fixed_keeps_an_examples_format_and_all_gives_every_one() -> None:
    assert len(set(drawn("umbrella", 50, "fixed"))) == 1
    assert {drawn(str(at), 1, "fixed")[0] for at in range(60)} == set(FIVE)
    assert draw(0, 3, "umbrella", FIVE, "all") == tuple(FIVE)


def test_formats_travel_to_other_processes() -> None:
    formats = load(shipped())
    assert pickle.loads(pickle.dumps(formats)) == formats
