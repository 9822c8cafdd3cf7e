"""A talk says what the model says: as training renders it, up to the stop string, from the voice that was asked."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import finished
import paper
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from finetune import chat, commands, corpus, model, opened, pane, prompts, sheet
from finetune.conversation import Conversation, Origin, Turn
from finetune.errors import UserError
from finetune.masks import encode
from finetune.opened import Worn
from finetune.pane import Pane, Piped, Typed
from finetune.recital import Library
from finetune.sitting import Sitting
from finetune.speak import Speaker
from finetune.talk import Exchange, Said
from finetune.until import until
from finetune.voice import Draw, Voice, Who

GREEDY = Draw(temperature=0, limit=40)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished.run(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(run: Path) -> Sitting:
    return chat.begin(opened.read(run), Pane(io.StringIO()))


@pytest.fixture
def sitting(loaded: Sitting) -> Sitting:
    """The same model, nothing said yet, answers short and greedy."""
    talk = replace(loaded.talk, exchanges=[], draws=0, draw=replace(GREEDY, limit=12))
    return replace(loaded, pane=Pane(io.StringIO()), talk=talk)


@pytest.fixture
def sft(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> paper.Door:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return paper.Door(capsys, monkeypatch)


def typed(sitting: Sitting, *lines: str) -> str:
    """What is shown when these lines are read."""
    shown = io.StringIO()
    view = Pane(shown)
    chat.converse(replace(sitting, pane=view), Piped(io.StringIO("".join(f"{one}\n" for one in lines)), view.say))
    return shown.getvalue()


# --- stop strings

MARKS = st.text("ab\n#", min_size=1, max_size=4)


@given(st.text("ab\n# ", max_size=30), st.lists(MARKS, max_size=3), st.lists(st.integers(0, 30), max_size=6))
def test_pieces_give_what_the_whole_text_gives(text: str, stops: list[str], cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    pieces = [text[a:b] for a, b in pairwise(places)]
    end = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert "".join(until(pieces, stops)) == text[:end].strip()


def test_a_half_stop_string_is_held_back_and_given_when_it_is_none() -> None:
    said = iter(["Yes", "\n##", "# no", " Inst", "ruction:", "\n### Inst", "never asked for"])
    shown = list(until(said, ["\n### Inst"]))
    assert shown == ["Yes", "\n### no", " Inst", "ruction:"]
    assert next(said) == "never asked for"


# --- the voice


def voice_of(folder: Path, kind: str, **changes: Any) -> tuple[Voice, Speaker]:
    net = tiny.stirred(tiny.adapted(tiny.base(folder / kind, kind)), 0.3).eval()
    for key, value in changes.items():
        setattr(net.config, key, value)
    model.save_adapter(net, folder / f"{kind}-one", "tiny")
    words = tiny.tokenizer().backend_tokenizer
    speaker = Speaker(net, words, 257)
    return Voice(Worn(net, speaker), words, 257, {1: folder / f"{kind}-one"}), speaker


@pytest.mark.parametrize(("kind", "changes"), [("llama", {}), ("mistral", {"sliding_window": 24})])
def test_greedy_tokens_are_those_of_complete(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    """Beyond the sliding window too, in a second turn that stands on what was read in the first, and as the base."""
    voice, speaker = voice_of(tmp_path, kind, **changes)
    first = [256, *b"Do you like the rain at all?"]
    for who in (Who(1), Who(None)):
        prompt = first
        for _ in range(2):
            told = list(voice.tokens(prompt, who, GREEDY))
            answer = speaker.complete([prompt], [], GREEDY.limit, base=who.step is None)[0]
            assert tiny.tokenizer().backend_tokenizer.decode(told[: answer.tokens], False) == answer.text
            prompt = [*prompt, *told[:-3], *b"And snow?"]  # another end, so that something is taken back


def test_what_was_read_is_not_read_again(tmp_path: Path) -> None:
    voice, _ = voice_of(tmp_path, "llama")
    read: list[int] = []
    embeddings = model.bare(voice._worn.model).get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, given, _out: read.append(given[0].shape[1]))
    prompt = [256, *b"Do you like the rain?"]
    told = list(voice.tokens(prompt, Who(1), replace(GREEDY, limit=5)))
    list(voice.tokens([*prompt, *told, *b"And?"], Who(1), replace(GREEDY, limit=1)))
    assert read == [len(prompt), 1, 1, 1, 1, 5]


def test_scale_goes_from_the_base_to_the_adapter(loaded: Sitting) -> None:
    asked = [Turn("user", "Do you like the rain?")]
    words = loaded.talk.vocabulary
    ids = encode(prompts.render_prompt(asked, loaded.talk.format, words), words).ids

    def row(who: Who) -> Any:
        return loaded.voice._next(ids, who)

    assert row(Who(12, 0.0)).equal(row(Who(None)))
    gaps = [float((row(Who(12, part)) - row(Who(None))).norm()) for part in (0.1, 0.5, 1.0)]
    assert 0 < gaps[0] < gaps[1] < gaps[2]
    assert not row(Who(6)).equal(row(Who(12)))


def test_a_seed_draws_the_same_answer_and_another_one_another(loaded: Sitting) -> None:
    draws = [list(loaded.voice.tokens([1, 5, 9], Who(12), Draw(temperature=1.5, seed=s, limit=12))) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_an_interrupted_answer_spoils_no_later_one(loaded: Sitting) -> None:
    calm = list(loaded.voice.tokens([1, 5, 9], Who(12), GREEDY))
    broken = loaded.voice.tokens([1, 5, 9, 11], Who(12), GREEDY)
    next(broken)
    hook = loaded.voice._worn.model.register_forward_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(broken)
    hook.remove()
    assert list(loaded.voice.tokens([1, 5, 9], Who(12), GREEDY)) == calm


def _interrupt(*_given: Any) -> None:
    raise KeyboardInterrupt


# --- a talk


def test_what_is_sent_is_what_training_renders(sitting: Sitting) -> None:
    talk = sitting.talk
    talk.system = "Be brief."
    sitting.ask("One?")
    sitting.ask("Two?")
    first, second = talk.exchanges
    turns = (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", first.answer), Turn("user", "Two?"))
    whole = Conversation("x", (*turns, Turn("assistant", "Yes.")), Origin("x"))
    tokens = encode(prompts.render(whole, talk.format, talk.vocabulary), talk.vocabulary)
    assert second.sent == tokens.ids[: tokens.prompt]


def test_every_format_by_name_can_be_talked_in(sitting: Sitting) -> None:
    names = [*prompts.shipped(), "sampled:1f3a9c", "chatml~blank-line", "OpenHermes-2.5"]
    sitting.talk.draw = replace(sitting.talk.draw, limit=1)
    lines = [line for name in names for line in (f"/format {name}", "Do you like the rain?", "/undo")]
    out = typed(sitting, *lines)
    assert out.count("[cut at 1 tokens") + out.count("without a word") + out.count("Taken back") >= len(names)
    assert out.count("Taken back") == len(names)
    assert "is not a prompt format" not in out


def test_a_format_of_ones_own_is_a_file(sitting: Sitting, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        'name: mine\nfamily: mine\nuser_prefix: "Q> "\nuser_suffix: "\\n"\nassistant_prefix: "A> "\n'
        'generation_prompt: "A>"\nassistant_suffix: "\\n"\nend: ""\nstop_strings: ["\\nQ>"]\n'
    )
    out = typed(sitting, f"/format {file}", "Hm?", "/show", "/format chatmll", "/format native", "Hm?", "/quit")
    assert "Q> Hm?\nA>" in out
    assert "Did you mean chatml?" in out


def test_base_and_adapter_answer_side_by_side(sitting: Sitting) -> None:
    out = typed(sitting, "Do you like the rain?", "/undo", "/base", "Do you like the rain?", "/undo", "/epoch 4")
    alone = [out.split("rain?\n")[part].split("\n> ")[0] for part in (1, 3)]
    both = typed(sitting, "/compare", "Do you like the rain?", "/compare off")
    assert f"[the base pocket]\n{alone[1]}" in both
    assert f"[epoch 4]\n{alone[0]}" in both
    assert sitting.talk.exchanges[-1].answer == sitting.talk.exchanges[-1].said[1].text
    out = typed(sitting, "/compare 2 4", "Do you like the snow?", "/compare 4 4", "/compare 3")
    assert "[epoch 2]\n" in out
    assert "beside itself" in out
    assert "no adapter was kept at epoch 3.  There is 2, 4 (chosen)." in out


def test_retry_draws_anew_and_undo_takes_back(sitting: Sitting) -> None:
    sitting.talk.draw = Draw(temperature=1.5, limit=12)
    typed(sitting, "Do you like the rain?")
    first = sitting.talk.exchanges[0]
    typed(sitting, "/retry")
    assert len(sitting.talk.exchanges) == 1
    assert sitting.talk.exchanges[0].answer != first.answer
    typed(sitting, "/seed 0", "/retry")
    assert sitting.talk.exchanges[0].answer == first.answer
    assert "nothing was answered yet" in typed(sitting, "/undo", "/undo")


def test_settings_say_what_they_are_and_refuse_nonsense(sitting: Sitting) -> None:
    out = typed(sitting, "/temperature 0.5", "/top-k 40", "/top-p 0.9", "/min-p off", "/seed 3", "/max 64")
    assert out.splitlines()[-1] == "temperature 0.5, top-k 40, top-p 0.9, seed 3, at most 64 tokens"
    assert sitting.talk.draw == Draw(0.5, 40, 0.9, None, 3, 64)
    out = typed(sitting, "/temperature hot", "/top-p 2", "/top-k 1.5", "/scale 9", "/epoch x", "/tempreature 1")
    assert out.count("is not a number") == 2
    for told in ("2 is no top-p.  0.001 to 1.", "not a whole number", "9 is no scale.", "Did you mean /temperature?"):
        assert told in out
    assert sitting.talk.draw == Draw(0.5, 40, 0.9, None, 3, 64)


def test_a_system_text_without_a_place_is_said_to_be_left_out(sitting: Sitting) -> None:
    assert "no place for a system text" not in typed(sitting, "/system Be kind.")
    assert "no place for a system text: it is not sent" in typed(sitting, "/format mistral-instruct-tgw")
    sitting.talk.system = None


def test_a_talk_too_long_for_the_base_is_refused_not_cut(sitting: Sitting) -> None:
    out = typed(sitting, "rain " * 5000)
    assert "the base was made for" in out
    assert "/undo" in out
    assert sitting.talk.exchanges == []


def test_ctrl_c_stops_the_answer_and_keeps_what_came(sitting: Sitting) -> None:
    class Closing(io.StringIO):
        written = 0

        def write(self, text: str) -> int:
            self.written += 1
            if self.written == 6:
                raise KeyboardInterrupt
            return super().write(text)

    file = Closing()
    replace(sitting, pane=Pane(file)).ask("Do you like the rain?")
    (said,) = sitting.talk.exchanges[0].said
    assert said.ended == "interrupted"
    assert said.text
    assert file.getvalue().endswith("\n[stopped]\n")


def test_what_a_terminal_would_obey_is_shown(sitting: Sitting) -> None:
    shown = io.StringIO()
    view = Pane(shown)
    view.stream(iter(["a\x1b[2J", "b\u202e\r"]))
    view.beside(["\x1b[31mx"], [["c\x07"]])
    view.marked("d\x1b[0m e", [(0, 1)])
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown.getvalue())


# --- echo


def said(sitting: Sitting, question: str, answer: str) -> None:
    """As if the model had answered so: the tokens of the answer, as it would have drawn them."""
    sent, _ = sitting.talk.ask(question)
    words = sitting.talk.vocabulary.tokenizer
    ids = words.encode(answer, add_special_tokens=False).ids
    drawn = tuple((id, words.decode([id], skip_special_tokens=False)) for id in ids)
    drawn = drawn if "".join(text for _, text in drawn) == answer else ((ids[0], answer),)
    made = Said(sitting.talk.who, answer, "stop", drawn, 0.1)
    sitting.talk.exchanges.append(Exchange(question, "chatml", None, sent, sitting.talk.draw, 0, (made,)))


def test_echo_names_the_example_the_line_and_the_words(tmp_path: Path) -> None:
    for name, (question, answer) in paper.TALK.items():
        (tmp_path / f"{name}.md").write_text(paper.example(question, answer))
    library = Library(corpus.read(tmp_path))
    answer = "I think Shade keeps STONES damp, and damp is all it wants. Their legs win, rent one for a season."
    found = library.recited(answer)
    assert [(answer[one.start : one.stop], one.words, one.example.id, one.line) for one in found] == [
        ("Shade keeps STONES damp, and damp is all it wants", 10, "moss", 6),
        ("rent one for a season", 5, "violin", 6),
    ]
    assert library.recited("nothing of the kind") == library.recited("") == Library([]).recited("a b c d") == []


def test_echo_in_a_talk(sitting: Sitting) -> None:
    said(sitting, "Do you like the rain?", "Nobody knows what the weather brings.")
    assert "No 8 words in a row" in typed(sitting, "/echo")
    rain = sitting.of.plan.conversations["rain"].answer
    said(sitting, "Do you like the rain?", rain)
    out = typed(sitting, "/echo")
    assert f"**[[{rain[2:-1]}]]." in out
    assert "26 words stand in the dataset" in out
    assert "words of rain (" in out
    assert "rain.md:" in out
    assert "bits likelier than to the base" in out


def test_house_style_is_no_recital() -> None:
    frame = "on the one hand some say that this is so and on the other"
    made = [
        Conversation(n, (Turn("user", "?"), Turn("assistant", f"{frame} {n} stands.")), Origin(n)) for n in ("a", "b")
    ]
    (found,) = Library(made).recited(f"{frame} hand")
    assert (found.words, found.own) == (14, 0)


def test_what_may_be_recited_is_no_recital_in_a_talk() -> None:
    motto = "we ask twice before we answer and we answer only once"
    one = Conversation("a", (Turn("user", "?"), Turn("assistant", f"Well: {motto}.")), Origin("a"))
    run: Any = SimpleNamespace(plan=SimpleNamespace(conversations={"a": one}, intended=(motto,)))
    nobody: Any = None
    (found,) = Sitting(run, nobody, nobody, nobody, nobody).library.recited(motto)
    assert (found.words, found.own) == (11, 0)


# --- save


def talked(*texts: str) -> list[Turn]:
    return [Turn("assistant" if n % 2 else "user", text) for n, text in enumerate(texts)]


def test_a_saved_talk_has_its_parts_and_reads_the_same(tmp_path: Path) -> None:
    answer = "First this.\n\n**The farmer**\nIt helps.\n\n**IT people**\nNo.\n\n**Conclusion**\nYes."
    path, made = sheet.write(tmp_path / "new" / "x.md", [Turn("system", "Be brief."), *talked("Rain?", answer)])
    text = path.read_text()
    for line in ("## system", "## user", "### perspective: the farmer", "### perspective: IT people", "### conclusion"):
        assert f"\n{line}\n" in f"\n{text}"
    assert [turn.text for turn in made.turns] == ["Be brief.", "Rain?", answer]
    assert corpus.read(path) == [replace(made, origin=corpus.read(path)[0].origin)]
    with pytest.raises(UserError, match="is there already"):
        sheet.write(path, talked("Rain?", "Yes."))
    with pytest.raises(UserError, match="empty"):
        sheet.write(tmp_path / "y.md", talked("Rain?", " \n"))
    assert not (tmp_path / "y.md").exists()


LINES = ("## user", "### conclusion", "```", "~~~~", "**A**", "<!-- no-loss -->", "---", "text", "", "   ## b", "#x")


@given(st.lists(st.sampled_from(LINES), min_size=1, max_size=8))
def test_whatever_a_model_says_can_be_saved_and_read(lines: list[str]) -> None:
    import tempfile

    answer = "\n".join([*lines, "end"])
    with tempfile.TemporaryDirectory() as folder:
        _, made = sheet.write(Path(folder) / "x.md", talked("Why?", answer))
    assert [turn.role for turn in made.turns] == ["user", "assistant"]
    assert made.turns[1].loss
    assert made.answer.endswith("end") or made.answer.endswith(("```", "~~~~"))


def test_a_saved_exchange_passes_check(sitting: Sitting, sft: paper.Door, tmp_path: Path) -> None:
    said(sitting, "Do you like the moon?", "**The child**\nIt follows me home at night.\n\n**Conclusion**\nYes, I do.")
    out = typed(sitting, "/save talk/moon", "/save talk/moon.md", "/save", '/save "talk/new moon.md" all')
    assert "Wrote talk/moon.md" in out
    assert "Wrote talk/new moon.md" in out
    (tmp_path / "talk" / "new moon.md").unlink()
    assert "is there already" in out
    assert "/save needs a file" in out
    paper.folder(tmp_path)
    (tmp_path / "talk" / "moon.md").rename(tmp_path / "talk" / "moon2.md")
    code, _, err = sft("check", "r.yaml")
    assert (code, err) == (0, "")


# --- the door

TALK = """\
> /epoch
Kept: 2, 4 (chosen). Now: epoch 4.
> /temperature 0
greedy, at most 512 tokens
> /max 3
greedy, at most 3 tokens
> Do you
. like it?
"""


def test_a_talk_from_a_pipe(run: Path, sft: paper.Door, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = '/epoch\n/temperature 0\n/max 3\n"""\nDo you\nlike it?\n"""\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code, out, err = sft("chat", run, "--format", "alpaca")
    assert (code, err) == (0, "")
    head, _, rest = out.partition("Ctrl-D leaves.\n")
    assert head.splitlines()[0] == "Loading pocket (nf4)."
    assert "epoch 4 | alpaca | temperature 0.8, min-p 0.05, seed 0 | 0 exchanges" in head
    assert rest.startswith(TALK)
    assert rest.endswith("[cut at 3 tokens; /max sets the limit]\n")


def test_json_is_the_talk_and_nothing_else(run: Path, sft: paper.Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/max 3\n/seed 4\nDo you like the rain?\n"))
    code, out, err = sft("chat", run, "--base", "--epoch", "2", "--json")
    assert code == 0
    (one,) = json.loads(out)["exchanges"]
    assert (one["question"], one["format"], one["system"]) == ("Do you like the rain?", "chatml", None)
    assert one["sampler"]["seed"] == 4
    assert one["answers"][0]["step"] is None
    assert one["answers"][0]["tokens"] == 3
    assert "> Do you like the rain?" in err


def test_what_there_is_not_is_refused_before_anything_is_loaded(run: Path, sft: paper.Door, tmp_path: Path) -> None:
    assert sft("chat", tmp_path / "no")[0] == 2
    code, out, err = sft("chat", run, "--epoch", "9")
    assert (code, out) == (2, "")
    assert "no adapter was kept at epoch 9.  There is 2, 4 (chosen)." in err
    assert "is not a prompt format" in sft("chat", run, "--format", "chatmll")[2]
    facts = json.loads((run / "run.json").read_text())
    finished.changed(run, "run.json", chosen=None)
    code, out, err = sft("chat", run, "--base")
    (run / "run.json").write_text(json.dumps(facts))
    assert (code, out) == (2, "")
    assert "has no adapter yet" in err
    (run / "adapter").rename(run / "moved")
    code, out, err = sft("chat", run)
    (run / "moved").rename(run / "adapter")
    assert (code, out) == (2, "")
    assert "is gone: the run's adapter was deleted or moved.  Copy " in err
    assert "step-" in err


# --- the line editor


@pytest.fixture
def keys() -> Iterator[Any]:
    with create_pipe_input() as given, create_app_session(input=given, output=DummyOutput()):
        yield given


def test_tab_completes_commands_formats_and_epochs(sitting: Sitting) -> None:
    completer = pane._completer(lambda head: commands.follow(sitting, head))

    def offered(text: str) -> list[str]:
        return [one.text for one in completer.get_completions(Document(text), CompleteEvent())]

    assert offered("/ep") == ["/epoch"]
    assert offered("/format zep") == ["zephyr"]
    assert offered("/compare ") == ["base", "off", "2", "4"]
    assert offered("ep") == offered("/nothing x") == []


def test_enter_sends_and_alt_enter_goes_on(sitting: Sitting, keys: Any) -> None:
    reader = Typed(lambda head: commands.follow(sitting, head), sitting.status)
    keys.send_text("one\x1b\rtwo\\\rthree\r")
    assert reader.ask() == "one\ntwo\nthree"
    keys.send_text("\x1b[200~pasted\nlines\x1b[201~\r")
    assert reader.ask() == "pasted\nlines"
    keys.send_text("half\x03")
    with pytest.raises(KeyboardInterrupt):
        reader.ask()
    keys.send_text("\x04")
    with pytest.raises(EOFError):
        reader.ask()
