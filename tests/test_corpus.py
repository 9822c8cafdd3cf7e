"""Examples written by hand: every form is read, every fault is named at once, and the split is exact."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import corpus
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import UserError

SHEET = """---
id: umbrella
tags: [advice, weather]
twin: Would you carry an umbrella on a grey morning?   # a remark
---
## system
You are three people.
## user
Should I take an umbrella?
## assistant
### perspective: the cautious one
Yes.
### perspective: the traveller
No.
### conclusion
Look out of the window.
"""


def written(folder: Path, **files: str | bytes) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def one(folder: Path, text: str | bytes, parts: str = "bold", name: str = "a__md") -> Conversation:
    (found,) = corpus.read(written(folder, **{name: text}) / name.replace("__", "."), parts)  # type: ignore[arg-type]
    return found


def faults(path: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        corpus.read(path)
    assert all(problem.remedy and problem.what for problem in caught.value.problems)
    return [f"{Path(str(p.file)).name}:{p.line} {p.what} {p.remedy}" for p in caught.value.problems]


def example(name: str, question: str = "", answer: str = "", twin: str | None = None) -> Conversation:
    turns = (Turn("user", question or f"What is {name}?"), Turn("assistant", answer or f"It is {name}."))
    return Conversation(name, turns, Origin("x.jsonl", 1), twin=twin)


def rows(path: Path, *values: object) -> Path:
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


# markdown


def test_parts_are_shown_as_bold_lines(tmp_path: Path) -> None:
    answer = "**The cautious one**\nYes.\n\n**The traveller**\nNo.\n\n**Conclusion**\nLook out of the window."
    assert one(tmp_path, SHEET).answer == answer


def test_parts_are_shown_as_plain_words(tmp_path: Path) -> None:
    answer = "The cautious one:\nYes.\n\nThe traveller:\nNo.\n\nConclusion:\nLook out of the window."
    assert one(tmp_path, SHEET, "plain").answer == answer


@pytest.mark.parametrize("parts", ["bold", "plain"])
def test_headings_never_reach_the_answer_as_hashes(tmp_path: Path, parts: str) -> None:
    text = SHEET + "### correction\nA draft. ##\n### Conclusion ###\nAgain.\n## user\nAnd now?\n## Assistant:\nDry.\n"
    found = one(tmp_path, text, parts)
    assert not any(line.startswith("#") for turn in found.turns for line in turn.text.split("\n"))
    assert [part.kind for part in found.turns[2].parts] == [
        "perspective",
        "perspective",
        "conclusion",
        "correction",
        "conclusion",
    ]


def test_front_matter_is_kept(tmp_path: Path) -> None:
    found = one(tmp_path, SHEET)
    assert (found.id, found.tags) == ("umbrella", ("advice", "weather"))
    assert found.twin == "Would you carry an umbrella on a grey morning?"
    assert found.system == "You are three people."


@pytest.mark.parametrize(
    ("value", "name"), [("007", "007"), ("no", "no"), ("1e3", "1e3"), ("2020-01-01", "2020-01-01")]
)
def test_yaml_does_not_turn_an_id_into_something_else(tmp_path: Path, value: str, name: str) -> None:
    assert one(tmp_path, SHEET.replace("umbrella", value, 1)).id == name


def test_without_front_matter_the_id_is_the_file_stem(tmp_path: Path) -> None:
    assert one(tmp_path, "## user\nq\n## assistant\na\n").id == "a"


def test_every_example_keeps_file_and_line(tmp_path: Path) -> None:
    folder = written(tmp_path, a__md=SHEET)
    rows(folder / "b.jsonl", {"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"})
    found = corpus.read(folder)
    assert [str(c.origin) for c in found] == [
        f"{folder / 'a.md'}:6",
        f"{folder / 'b.jsonl'}:1",
        f"{folder / 'b.jsonl'}:2",
    ]
    assert [turn.line for turn in found[0].turns] == [6, 8, 10]
    assert [part.line for part in found[0].turns[2].parts] == [11, 13, 15]
    assert [c.id for c in found] == ["umbrella", "b-1", "b-2"]


def test_windows_newlines_and_a_bom_change_nothing(tmp_path: Path) -> None:
    plain = one(tmp_path, SHEET)
    windows = one(tmp_path, b"\xef\xbb\xbf" + SHEET.replace("\n", "  \r\n").replace("---  ", "---").encode())
    assert windows == plain


def test_headings_inside_a_fence_are_content(tmp_path: Path) -> None:
    code = "```md\n## user\n### conclusion\n<!-- no-loss -->\n~~~\n```"
    found = one(tmp_path, f"## user\nq\n## assistant\n{code}\n")
    assert found.answer == code
    assert found.turns[-1].loss


def test_a_fence_never_closed_is_named(tmp_path: Path) -> None:
    assert "a.md:4 this code fence is never closed. Write a line ``` where the code ends." in faults(
        written(tmp_path, a__md="## user\nq\n## assistant\n```\ncode\n")
    )


def test_a_deeper_heading_is_content(tmp_path: Path) -> None:
    assert one(tmp_path, "## user\nq\n## assistant\n#### deep\n# top\n").answer == "#### deep\n# top"


def test_no_loss_marks_its_own_turn(tmp_path: Path) -> None:
    text = "## user\nq\n## assistant <!-- no-loss -->\na\n## user\nr\n## assistant\n<!-- No-Loss -->\nb\n"
    text += "## user\ns\n## assistant\nc\n"
    found = one(tmp_path, text)
    assert [turn.loss for turn in found.turns if turn.role == "assistant"] == [False, False, True]
    assert [turn.text for turn in found.turns if turn.role == "assistant"] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("heading", "line"),
    [
        ("## asistant", "Did you mean `## assistant`?"),
        ("##assistant", "with a space"),
        ("## gpt", "Did you mean `## assistant`?"),
        ("## assistant\n### perspectiv: me", "Did you mean `### perspective: title`?"),
        ("## assistant\n### perspective", "a perspective without a title"),
        ("## assistant\n### conclusion: so", "takes no title"),
        ("## assistant\n### thoughts", "is not a part of an answer"),
        ("## assistant\n## Nutrition", "is not a turn"),
        ("## assistant\n##", "is not a turn"),
        ("## assistant\nwords <!-- no-loss -->", "on a line of its own"),
        ("## assistant\n<!-- no loss -->", "on a line of its own"),
    ],
)
def test_typo_in_a_heading_names_line_and_neighbour(tmp_path: Path, heading: str, line: str) -> None:
    (fault,) = faults(written(tmp_path, a__md=f"## user\nq\n{heading}\na\n"))
    assert line in fault
    assert fault.startswith(f"a.md:{3 + heading.count(chr(10))} ")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        (" \n \n", "the file is empty"),
        (b"\xff\xfe#\x00", "not UTF-8"),
        (b"## user\nq\x00\n", "a.md:2 a NUL character"),
        ("---\nid: x\n", "front matter is never closed"),
        ("---\nid: [x\n---\n## user\nq\n## assistant\na", "not YAML"),
        ("---\n- x\n---\n## user\nq\n## assistant\na", "holds no keys"),
        (
            "---\ntag: x\n---\n## user\nq\n## assistant\na",
            "a.md:2 `tag` is not a key of the front matter. Did you mean `tags`?",
        ),
        ("---\nid: x\nid: y\n---\n## user\nq\n## assistant\na", "a.md:3 `id` stands twice"),
        ("---\ntwin: {a: b}\n---\n## user\nq\n## assistant\na", "`twin` is not text"),
        ("---\nid: a: b\n---\n## user\nq\n## assistant\na", "Put quotes"),
        ('---\nid: "\\uD800"\n---\n## user\nq\n## assistant\na', "surrogate"),
        ("hello\n## user\nq\n## assistant\na", "a.md:1 text before the first turn"),
        ("## user\n## assistant\na", "a.md:1 an empty user turn"),
        ("## user\nq\n## assistant\n### conclusion\n", "the conclusion is empty"),
        ("## user\nq\n## user\nr\n## assistant\na", "a.md:3 user speaks where assistant should"),
        ("## assistant\na", "a.md:1 assistant speaks where user should"),
        ("## user\nq\n", "a.md:1 no assistant answer at the end"),
        ("## user\nq\n## assistant <!-- no-loss -->\na", "every answer is kept out of the loss"),
        ("## user\n### conclusion\nq\n## assistant\na", "outside an answer"),
    ],
)
def test_a_broken_sheet_says_what_to_do(tmp_path: Path, text: str | bytes, told: str) -> None:
    assert any(told in fault for fault in faults(written(tmp_path, a__md=text)))


def test_long_file_is_refused_not_cut(tmp_path: Path) -> None:
    (fault,) = faults(written(tmp_path, a__md=b"## user\n" + b"x" * (10 * 2**20)))
    assert "10 MiB, more than 10" in fault


def test_every_fault_of_every_file_is_told_at_once(tmp_path: Path) -> None:
    folder = written(tmp_path, a__md="## usr\nq\n## assistant\n", b__md="", c__jsonl="{\n[]\n", d__markdown="x")
    assert {fault.split(":")[0] for fault in faults(folder)} == {"a.md", "b.md", "c.jsonl", "d.markdown"}


# folders


def test_a_folder_is_read_in_order_of_name_and_passes_over_what_is_not_data(tmp_path: Path) -> None:
    sheets = {f"{name}__md": f"## user\n{name}\n## assistant\n{name}\n" for name in "cab"}
    folder = written(tmp_path, README__md="# Origin", **{".hidden__md": "x", "LICENSE": "x"}, **sheets)
    (folder / "sub").mkdir()
    (folder / "sub" / "z.md").write_text("## broken")
    assert [c.id for c in corpus.read(folder)] == ["a", "b", "c"]


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    assert "no examples here" in faults(tmp_path)[0]


def test_a_path_that_is_not_there_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "minisymposium").mkdir()
    assert "Did you mean" in faults(tmp_path / "minisymposum")[0]


def test_an_id_or_an_example_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    folder = written(tmp_path, a__md=SHEET, b__md=SHEET.replace("Yes", "No"), c__md=SHEET.replace("umbrella\n", "c\n"))
    told = faults(folder)
    assert "b.md:6" in told[0]
    assert "`umbrella` is taken by" in told[0]
    assert "c.md:6 the same example as" in told[1]


# rows


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, CHAT[1]]},
        {"messages": [{"role": "human", "content": "q\r\n"}, {"role": "gpt", "content": " a"}], "prompt": "other"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "messages": None},
        {"prompt": "q", "completion": "a"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "a"},
    ],
)
def test_every_shape_of_row_says_the_same(tmp_path: Path, row: dict[str, object]) -> None:
    (found,) = corpus.read(rows(tmp_path / "x.jsonl", row))
    assert [(turn.role, turn.text) for turn in found.turns] == [("user", "q"), ("assistant", "a")]
    assert found.turns[1].loss


def test_the_input_of_alpaca_stands_below_its_instruction(tmp_path: Path) -> None:
    (found,) = corpus.read(rows(tmp_path / "x.jsonl", {"instruction": "i", "input": "j", "output": "a"}))
    assert found.question == "i\n\nj"


def test_columns_of_a_row_are_kept(tmp_path: Path) -> None:
    row = {"id": 7, "tags": ["t"], "twin": "w", "system": "s", "instruction": "q", "output": "a", "source": "me"}
    (found,) = corpus.read(rows(tmp_path / "x.jsonl", row))
    assert (found.id, found.tags, found.twin, found.system) == ("7", ("t",), "w", "s")
    assert found.extra == {"source": "me"}


@pytest.mark.parametrize("switch", [{"loss": False}, {"train": False}, {"weight": 0}])
def test_a_switched_off_message_stays_out_of_the_loss(tmp_path: Path, switch: dict[str, object]) -> None:
    (found,) = corpus.read(rows(tmp_path / "x.jsonl", {"messages": [CHAT[0], {**CHAT[1], **switch}, *CHAT]}))
    assert [turn.loss for turn in found.turns] == [True, False, True, True]


def test_the_prompt_of_a_completion_stays_out_of_the_loss(tmp_path: Path) -> None:
    (found,) = corpus.read(rows(tmp_path / "x.jsonl", {"prompt": [*CHAT, CHAT[0]], "completion": "b"}))
    assert [turn.loss for turn in found.turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([], "a row that is not an object"),
        ({"text": "x"}, "no example in this row, only `text`"),
        ({"messages": "x"}, "not a list of messages"),
        ({"messages": []}, "not a list of messages"),
        ({"messages": ["x", *CHAT]}, "message 1 of `messages` is not an object"),
        ({"messages": [*CHAT, {"role": "tool", "content": "x"}]}, "has the role `tool`"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": "x", "tool_calls": [1]}]}, "calls a tool"),
        ({"messages": [CHAT[0], {"role": "asistant", "content": "x"}]}, "Did you mean `assistant`?"),
        ({"messages": [CHAT[0], {"content": "x"}]}, "has no role"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "has no text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]}, "a part that is not text"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.5}]}, "weight is 0.5"),
        ({"messages": CHAT, "loss": False}, "the whole row out of the loss"),
        ({"messages": [{"role": "system", "content": "s"}, *CHAT], "system": "t"}, "a `system` column and"),
        ({"messages": CHAT, "twn": "x"}, "Did you mean `twin`?"),
        ({"messages": CHAT, "tags": [1]}, "`tags` is a list"),
        ({"messages": CHAT, "id": 1.5}, "`id` is 1.5"),
        ({"messages": CHAT, "id": "a\nb"}, "control characters"),
        ({"instruction": "q", "output": ""}, "an empty assistant turn"),
        ({"instruction": "q"}, "no `output`"),
        ({"instruction": "q", "output": "a", "history": [["a", "b"]]}, "`history` is not read"),
        ({"prompt": "q"}, "no `completion`"),
        ({"messages": CHAT[::-1]}, "assistant speaks where user should"),
        ({"instruction": "q\0", "output": "a"}, "a NUL"),
        ({"instruction": "q\ud800", "output": "a"}, "surrogate"),
    ],
)
def test_a_broken_row_names_its_line(tmp_path: Path, row: object, told: str) -> None:
    found = faults(rows(tmp_path / "x.jsonl", {"instruction": "good", "output": "good"}, row))
    assert all(fault.startswith("x.jsonl:2 ") for fault in found)
    assert any(told in fault for fault in found)


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('\n{"a": 1,}\n{"a": 1, "a": 2}\n' + "[" * 100_000)
    told = faults(path)
    assert [fault.split(" ")[0] for fault in told] == ["x.jsonl:2", "x.jsonl:3", "x.jsonl:4"]
    assert "column 9" in told[0]
    assert "`a` stands twice" in told[1]


def test_a_json_array_keeps_the_line_of_each_row(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"instruction": str(i), "output": "a"} for i in range(3)], indent=1))
    assert [c.origin.line for c in corpus.read(path)] == [2, 6, 10]
    path.write_text('[{"instruction": "q",\n"output": "a"}\n{}]')
    assert "x.json:1 not JSON: a comma" in faults(path)[0]


def test_a_json_array_named_jsonl_is_one_fault(tmp_path: Path) -> None:
    (fault,) = faults(written(tmp_path, **{"x__jsonl": "[\n{},\n{}\n]"}) / "x.jsonl")
    assert "Name it .json." in fault


def test_a_thousand_faults_are_counted_not_listed(tmp_path: Path) -> None:
    told = faults(rows(tmp_path / "x.jsonl", *[{}] * 1000))
    assert len(told) == 101
    assert "900 more faults" in told[-1]


def test_rows_of_a_hub_dataset_are_read_alike() -> None:
    found = corpus.rows_to_conversations([(1, {"messages": CHAT}), (2, {"prompt": "r", "completion": "b"})], "me/set")
    assert [(c.id, str(c.origin)) for c in found] == [("set-1", "me/set:1"), ("set-2", "me/set:2")]


def test_the_handwritten_rows_are_read_without_a_fault() -> None:
    path = Path(__file__).parents[2] / "shared" / "data" / "handwritten.jsonl"
    if not path.exists():
        pytest.skip("the shared handwritten rows are not on this machine")
    assert len(corpus.read(path)) == 80


# fingerprint and split


def test_fingerprint_knows_content_not_order_or_place() -> None:
    many = [example(str(i)) for i in range(5)]
    moved = Conversation("0", many[0].turns, Origin("elsewhere.md", 9))
    assert corpus.fingerprint(many) == corpus.fingerprint([*many[:0:-1], moved])
    assert corpus.fingerprint(many) != corpus.fingerprint([example("0", answer="other"), *many[1:]])


@pytest.mark.parametrize(
    ("n", "held_out", "expected"),
    [
        (3, "auto", 1),
        (24, "auto", 8),
        (30, "auto", 10),
        (80, "auto", 16),
        (53, "auto", 11),
        (30, 0.1, 3),  # 4 where shares are taken as binary fractions
        (80, 0.2, 16),
        (10, 0.01, 1),
        (10, 0.99, 9),
        (7, 0.5, 4),
    ],
)
def test_as_many_are_held_out_as_asked(n: int, held_out: float | str, expected: int) -> None:
    found = corpus.split([example(str(i)) for i in range(n)], held_out, 0)  # type: ignore[arg-type]
    assert (len(found.held_out), len(found.train)) == (expected, n - expected)


def test_split_is_the_same_for_any_file_order() -> None:
    many = [example(str(i), twin=f"twin {i}" if i % 3 else None) for i in range(40)]
    first = corpus.split(many, "auto", 7)
    for seed in range(5):
        random.Random(seed).shuffle(many)
        assert corpus.split(many, "auto", 7) == first
    assert corpus.split(many, "auto", 8) != first


def test_split_never_changes_between_versions() -> None:
    assert corpus.split([example(str(i)) for i in range(12)], "auto", 0).held_out == ("1", "4", "8", "9")


def test_an_example_more_moves_few_others() -> None:
    many = [example(str(i)) for i in range(100)]
    before, after = corpus.split(many, 0.2, 0), corpus.split([*many, example("new")], 0.2, 0)
    assert len(set(before.held_out) - set(after.held_out)) <= 1


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_copy_never_lands_on_both_sides(data: st.DataObject) -> None:
    topics = st.integers(0, 8)
    many = []
    for i in range(data.draw(st.integers(3, 25))):
        asked = data.draw(st.sampled_from(["How is {}?", "how is  {}", "HOW IS {}!", "«How» is {}?"])).format(
            data.draw(topics)
        )
        twin = data.draw(st.none() | topics.map("how is {}".format))
        many.append(example(str(i), asked, twin=twin))
    try:
        found = corpus.split(many, 0.4, data.draw(st.integers(0, 3)))
    except UserError:
        return
    sides = [set(found.train), set(found.held_out)]
    topic = [{c.question.strip("?!")[-1], *(c.twin or "")[-1:]} for c in many]
    alike = [(a, b) for a in range(len(many)) for b in range(a) if topic[a] & topic[b]]
    assert all(any({str(a), str(b)} <= side for side in sides) for a, b in alike)
    assert set(found.train) | set(found.held_out) == {c.id for c in many}


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(UserError, match="too few"):
        corpus.split([example("a"), example("b")], "auto", 0)


def test_examples_that_all_ask_the_same_cannot_be_split() -> None:
    with pytest.raises(UserError, match="ask the same question"):
        corpus.split([example(str(i), "same?", str(i)) for i in range(6)], "auto", 0)


@pytest.mark.parametrize("share", [0, 1, -0.5, 2.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="share between 0 and 1"):
        corpus.split([example(str(i)) for i in range(6)], share, 0)


def test_a_given_split_is_refused_where_a_question_is_on_both_sides() -> None:
    train, held = [example("a", "Why is it?"), example("b")], [example("c", "why is it", "other"), example("d")]
    with pytest.raises(UserError, match="asks the question of the trained example `a`"):
        corpus.split_given(train, held, 0)
    assert corpus.split_given(train, held[1:], 3) == corpus.Split(("a", "b"), ("d",), {}, 3)


def test_a_split_survives_its_file() -> None:
    found = corpus.split([example(str(i), twin=f"twin {i}") for i in range(9)], "auto", 4)
    value = json.loads(json.dumps(found.to_json()))
    assert list(value) == ["train", "held_out", "twins", "seed"]
    assert corpus.Split.from_json(value) == found


@pytest.mark.parametrize("value", [None, [], {}, {"train": 1}, {"train": [1], "held_out": [], "twins": {}, "seed": 0}])
def test_a_broken_split_file_is_refused(value: object) -> None:
    with pytest.raises(UserError, match="not a recorded split"):
        corpus.Split.from_json(value)


# anything at all

LINES = [
    "---",
    "## user",
    "## assistant",
    "### perspective: x",
    "### conclusion",
    "```",
    "~~~",
    "id: a",
    "twin: &a [*a]",
]
LINES += [
    "<!-- no-loss -->",
    '{"messages": [{"role": "user", "content": 1}]}',
    '{"instruction": "q", "output": "a"}',
    "[",
    "{",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=300)
    | st.lists(st.sampled_from(LINES) | st.text(max_size=20)).map(lambda x: "\n".join(x).encode("utf-8", "replace")),
    st.sampled_from([".md", ".jsonl", ".json"]),
)
def test_any_bytes_are_read_or_refused_in_words(tmp_path: Path, raw: bytes, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(raw)
    problems = []
    found = []
    try:
        found = corpus.read(path)
    except UserError as error:
        problems = error.problems
    assert bool(found) != bool(problems)
    assert all(problem.what and problem.remedy and problem.file for problem in problems)
    assert all(c.turns[-1].role == "assistant" and c.answer for c in found)
    corpus.fingerprint(found)
