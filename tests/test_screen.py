"""What a run looks like: live on a terminal, plain lines anywhere else, and text shown as it was written."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from finetune.screen import BLOCKS, Headline, Screen, sparkline


def row(step: int, loss: float = 2.345678) -> dict[str, Any]:
    where = {"kind": "step", "step": step, "epoch": step / 3, "lr": 1.5e-7, "travel": 1.5e-7 * step}
    return {**where, "loss": loss, "grad_norm": 0.5, "tokens": 600, "seconds": 0.5, "gib": 3.25}


def look(step: int, nll: float, split: str = "held_out") -> dict[str, Any]:
    where = {"kind": "look", "look": "full", "step": step, "epoch": step / 3, "travel": 1.5e-7 * step}
    about = {"split": split, "format": "chatml", "nll": nll, "nll_tstar": nll - 0.1, "accuracy": 0.4567}
    return {**where, **about, "bpb": 1.23456, "moved": 0.987, "distance": 0.0123, "tokens": 50, "seconds": 1.0}


SAMPLE = {"epoch": 1.0, "format": "chatml", "prompt": "Is [bold]rain[/bold] good?", "answer": "Yes, [red]it is.\nDry."}


def shown(screen: Screen, console: Console, then: Any = None) -> str:
    """A short run told to a screen; what the console has seen."""
    screen.open(Headline("my-run", epochs=4, steps=12, per_epoch=3))
    screen.look([look(0, 3.111111), look(0, 9.999999, "train")], [])
    for step in range(1, 5):
        screen.step(row(step, 2.345678 - step / 10))
    screen.look([look(3, 2.987654), look(3, 9.999999, "train")], [SAMPLE])
    if then is not None:
        then()
    screen.close()
    return flat(console.export_text()) if console.is_terminal else console.export_text()


def flat(text: str) -> str:
    """A picture's words in one line: without its frame, and whole where a line was folded."""
    return " ".join(word for word in text.split() if word.strip("╭╮╰╯│─"))


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), record=True, force_terminal=True, width=width, height=60)


def paper(width: int = 100) -> Console:
    return Console(file=io.StringIO(), record=True, force_terminal=False, width=width)


# --- sparkline


def test_a_sparkline_rises_and_falls_with_its_values() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0, 1.0]) == BLOCKS[0] * 3
    assert sparkline([0.0, 7.0]) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline(list(range(8))) == BLOCKS
    assert sparkline([3.0, 2.0, 1.0])[0] == BLOCKS[-1]


def test_a_long_sparkline_fits_and_forgets_no_value() -> None:
    line = sparkline([0.0] * 500 + [1.0] * 500, width=40)
    assert len(line) == 40
    assert line == BLOCKS[0] * 20 + BLOCKS[-1] * 20
    assert len(sparkline([float(i) for i in range(41)], width=40)) == 40


# --- a terminal


def test_a_live_screen_shows_where_the_run_is_and_how_it_goes() -> None:
    console = terminal()
    text = shown(Screen(console), console)
    for wanted in (
        "sft · my-run",
        "epoch 1.3 of 4",
        "step 4 of 12",
        "left",
        "1.94568",  # train loss of the epoch that has begun, five digits
        "2.98765",  # held-out loss
        "1.50e-07",
        "travel 6.000e-07",
        "1,200",
        "tokens/s · 3.25 GiB",
        "accuracy 45.7%",
        "1.2346 bits/byte",
        "99% of lora_A moved",
        "distance 0.0123",
        "base 3.11111",
        "Yes, [red]it is.",
    ):
        assert wanted in text, wanted
    assert "9.99999" not in text  # the train split of a look is not the held-out loss


def test_markup_in_a_prompt_is_shown_as_written() -> None:
    for console in (terminal(), paper()):
        assert "Is [bold]rain[/bold] good?" in shown(Screen(console), console)


def test_a_live_screen_fits_a_narrow_terminal() -> None:
    console = terminal(60)
    console.begin_capture()
    shown(Screen(console), console)
    lines = Text.from_ansi(console.end_capture()).plain.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("2.98765" in line for line in lines)


@pytest.mark.parametrize("console", [terminal(), paper()])
def test_what_a_terminal_would_obey_is_shown_instead(console: Console) -> None:
    console.begin_capture()
    screen = Screen(console)
    screen.open(Headline("my-run", epochs=4, steps=12, per_epoch=3))
    screen.look([look(0, 3.1)], [{**SAMPLE, "prompt": "\x1b[2Jwhy?", "answer": "\x1b]0;title\x07 because"}])
    screen.say("\x1b[2Jstop")
    screen.close()
    told = console.end_capture()
    assert "\x1b[2J" not in told
    assert "\x1b]0;" not in told
    assert "\\x1b[2Jwhy?" in told


def test_what_matters_is_said_on_a_live_screen() -> None:
    console = terminal()
    screen = Screen(console)
    assert "Stopping after this step [now]." in shown(
        screen, console, lambda: screen.say("Stopping after this step [now].")
    )


# --- anything else


def test_without_a_terminal_there_are_plain_lines() -> None:
    console = paper()
    text = shown(Screen(console), console)
    lines = text.splitlines()
    assert lines[0].startswith("look at epoch 0: held-out 3.11111 nats/token, accuracy 45.7%, 1.2346 bits/byte")
    step = next(line for line in lines if line.startswith("epoch 1/4"))
    assert "step 3" in step
    assert "loss 2.14568" in step  # the mean of the epoch's three steps
    assert "lr 1.50e-07" in step
    assert "travel 4.50e-07" in step
    assert "1,200 tokens/s" in step
    assert "    Is [bold]rain[/bold] good? -> Yes, [red]it is. / Dry." in lines
    assert "\x1b" not in text
    assert not any(line.startswith("╭") for line in lines)


JUDGED = {"verdict": "watch", "recited": (3, 34), "whole": (1, 40), "change": -0.12345}


@pytest.mark.parametrize("console", [terminal(), terminal(72), paper()], ids=["live", "narrow", "plain"])
def test_a_look_says_its_verdict_who_recites_and_what_became_of_held_out_loss(console: Console) -> None:
    screen = Screen(console)
    text = flat(shown(screen, console, lambda: screen.look([look(6, 2.9)], [], JUDGED)))
    for wanted in ("watch", "3 of 34 recite 50 tokens", "1 of 40 whole", "held-out -0.12345"):
        assert wanted in text, wanted
    unknown = {"verdict": "underpowered", "recited": None, "whole": None, "change": None}
    again = type(console)(file=io.StringIO(), record=True, force_terminal=False)
    Screen(again).look([look(6, 2.9, "train")], [], unknown)
    assert "underpowered · nothing measured yet · train 2.90000" in flat(again.export_text())


FORMATS = "kept 0.93 median, least 0.81 (guanaco) · sampled 0.88"
DRIFT = "neutral text +0.0123 bits/byte · 70 of 71 facts kept · no cuts for this base"


@pytest.mark.parametrize("console", [terminal(), terminal(72), paper()], ids=["live", "narrow", "plain"])
def test_a_full_look_says_what_formats_keep_and_what_drifted_and_a_light_one_leaves_it_standing(
    console: Console,
) -> None:
    def then() -> None:
        screen.look([look(6, 2.9)], [], {**JUDGED, "formats": FORMATS, "drift": DRIFT})
        screen.look([look(9, 2.8)], [], {**JUDGED, "formats": "", "drift": ""})

    screen = Screen(console)
    text = flat(shown(screen, console, then))
    for name, told in (("formats", FORMATS), ("drift", DRIFT)):
        assert f"{name} {told}" in text.replace(":", "")
        assert text.count(told) == 1


def test_plain_lines_are_told_now_and_then_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("finetune.screen.time.monotonic", lambda: clock[0])
    console = paper()
    screen = Screen(console)
    screen.open(Headline("my-run", epochs=40, steps=120, per_epoch=3))
    for step in range(1, 61):
        clock[0] += 1.0
        screen.step(row(step))
    screen.close()
    told = [line for line in console.export_text().splitlines() if line.startswith("epoch")]
    assert 4 <= len(told) <= 7


def test_a_long_line_is_not_folded_for_a_log() -> None:
    console = paper(40)
    screen = Screen(console)
    screen.say("word " * 30)
    assert len(console.export_text().splitlines()) == 1


def test_a_screen_that_saw_nothing_can_be_closed() -> None:
    for console in (terminal(), paper()):
        screen = Screen(console)
        screen.close()
        screen.open(Headline("my-run", epochs=4, steps=12, per_epoch=3, done=6))
        screen.close()
        screen.close()
