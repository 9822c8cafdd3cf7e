"""The screen of a run: live on a terminal, plain lines anywhere else. It shows what it is told and knows no model.

Losses are shown to the fifth digit: at a learning rate of 1e-7 that is where a night happens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune.tables import harmless

BLOCKS = "▁▂▃▄▅▆▇█"
_STYLE = {"ok": "green", "watch": "yellow", "overfit": "bold red"}
_BESIDES = ("formats", "drift")
_PLAIN_EVERY = 10.0  # seconds between two plain lines; looks are always told


def _figures(judged: Mapping[str, Any]) -> str:
    """Who recites, and what became of held-out loss, in a few words."""
    told = []
    for key, how in (("recited", "recite 50 tokens"), ("whole", "whole")):
        if judged[key] is not None:
            told.append(f"{judged[key][0]} of {judged[key][1]} {how}")
    if judged["change"] is not None:
        told.append(f"held-out {judged['change']:+.5f}")
    return " · ".join(told) or "nothing measured yet"


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Values as a row of blocks, at most `width` of them, each the mean of its stretch; scaled to their own range."""
    if not values:
        return ""
    bins = min(width, len(values))
    cuts = [round(i * len(values) / bins) for i in range(bins + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


@dataclass(frozen=True)
class Headline:
    """What stays the same during a run."""

    name: str
    epochs: int
    steps: int
    per_epoch: int
    done: int = 0  # steps behind us when this screen opened


@dataclass
class _State:
    """What was told so far."""

    row: Mapping[str, Any] | None = None
    epoch_losses: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    look: Mapping[str, Any] | None = None
    judged: Mapping[str, Any] | None = None
    besides: dict[str, str] = field(default_factory=dict)  # of the newest look that said something of it
    base: float | None = None
    sample: Mapping[str, Any] | None = None
    note: str = ""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Screen:
    """Tell it steps, looks and notes between `open` and `close`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._head = Headline("", 1, 1, 1)
        self._state = _State()
        self._live: Live | None = None
        self._told = 0.0
        self._began = time.monotonic()

    def open(self, head: Headline) -> None:
        """Begin to show a run."""
        self._head, self._began, self._state.note = head, time.monotonic(), ""
        if self._console.is_terminal:
            self._live = Live(self._draw(), console=self._console, refresh_per_second=2, transient=False)
            self._live.start()

    def close(self) -> None:
        """Leave the last picture standing and give the terminal back."""
        if self._live is not None:
            self._live.update(self._draw())
            self._live.stop()
            self._live = None

    def step(self, row: Mapping[str, Any]) -> None:
        """One optimizer step, a row as in metrics.jsonl."""
        state = self._state
        state.row = row
        state.steps += 1
        state.tokens += int(row["tokens"])
        state.seconds += float(row["seconds"])
        state.running.append(float(row["loss"]))
        if row["step"] % self._head.per_epoch == 0:
            state.epoch_losses.append(sum(state.running) / len(state.running))
            state.running.clear()
            self._plain()
        self._refresh()

    def look(
        self,
        rows: Sequence[Mapping[str, Any]],
        samples: Sequence[Mapping[str, Any]],
        judged: Mapping[str, Any] | None = None,
    ) -> None:
        """One look: its rows, and answers written at it. The first row of the held-out split is the one drawn.

        `judged`: the run's `verdict` so far, `recited` and `whole` (how many, of how many trained answers that are long
        enough) and `change` of held-out loss against the base, nats per token; `formats` and `drift` in a few words,
        "" where a look says nothing of them. None before the first step.
        """
        samples = [{**one, **{key: harmless(one[key]) for key in ("prompt", "answer")}} for one in samples]
        row = next((row for row in rows if row["split"] == "held_out"), None)
        if row is not None:
            self._state.look = row
            self._state.held.append(float(row["nll"]))
            self._state.base = float(row["nll"]) if row["step"] == 0 else self._state.base
        self._state.sample = samples[0] if samples else self._state.sample
        self._state.judged = judged or self._state.judged
        said = {key: harmless(text) for key in _BESIDES if (text := (judged or {}).get(key))}
        self._state.besides |= said
        if self._live is None:
            self._tell_look(row or next(iter(rows), None), samples, judged)
            for key, text in said.items():
                self._console.print(escape(f"    {key}: {text}"), highlight=False, soft_wrap=True)
        self._refresh()

    def say(self, text: str) -> None:
        """One line that matters."""
        self._state.note = text = harmless(text)
        if self._live is None:
            self._console.print(escape(text), highlight=False, soft_wrap=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._draw())

    def _plain(self) -> None:
        now, row = time.monotonic(), self._state.row
        if self._live is not None or row is None or now - self._told < _PLAIN_EVERY:
            return
        self._told = now
        where = f"epoch {row['epoch']:.0f}/{self._head.epochs}  step {row['step']}"
        how = f"loss {self._state.epoch_losses[-1]:.5f}  lr {row['lr']:.2e}  travel {row['travel']:.2e}"
        pace = f"{self._speed():,.0f} tokens/s  left {self._left()}"
        self._console.print(f"{where}  {how}  {pace}", highlight=False, soft_wrap=True)

    def _tell_look(
        self,
        row: Mapping[str, Any] | None,
        samples: Sequence[Mapping[str, Any]],
        judged: Mapping[str, Any] | None,
    ) -> None:
        if row is not None:
            said = f"{judged['verdict']} · {_figures(judged)} · " if judged else ""
            self._console.print(
                f"look at epoch {row['epoch']:.0f}: {said}{'held-out' if row['split'] == 'held_out' else row['split']} "
                f"{row['nll']:.5f} nats/token, "
                f"accuracy {row['accuracy']:.1%}, {row['bpb']:.4f} bits/byte, {row['moved']:.0%} of lora_A moved",
                highlight=False,
                soft_wrap=True,
            )
        for sample in samples[:1]:
            answer = " / ".join(sample["answer"].split("\n"))
            self._console.print(f"    {escape(sample['prompt'])} -> {escape(answer)}", highlight=False, soft_wrap=True)

    def _speed(self) -> float:
        return self._state.tokens / self._state.seconds if self._state.seconds else 0.0

    def _left(self) -> str:
        row = self._state.row
        if row is None or not self._state.steps:
            return "?"
        pace = (time.monotonic() - self._began) / self._state.steps  # looks and saves included
        return str(timedelta(seconds=round(pace * (self._head.steps - int(row["step"])))))

    def _draw(self) -> Panel:
        row = self._state.row
        step = int(row["step"]) if row else self._head.done
        bar = ProgressBar(total=self._head.steps, completed=step)
        parts: list[RenderableType] = [self._where(step), bar, Text(), self._figures()]
        if self._state.sample is not None:
            parts += [Text(), self._quote(self._state.sample)]
        if self._state.note:
            parts += [Text(), Text(self._state.note, style="yellow")]
        return Panel(
            Group(*parts), title=Text(f"sft · {self._head.name}", style="bold"), border_style="dim", padding=(1, 2)
        )

    def _where(self, step: int) -> Text:
        elapsed = timedelta(seconds=round(time.monotonic() - self._began))
        text = f"epoch {step / self._head.per_epoch:.1f} of {self._head.epochs} · step {step:,} of {self._head.steps:,}"
        text += f" · {elapsed} gone · {self._left()} left"
        return Text(text + self._until())

    def _until(self) -> str:
        row = self._state.row
        if row is None or not self._state.steps:
            return ""
        pace = (time.monotonic() - self._began) / self._state.steps
        end = datetime.now() + timedelta(seconds=pace * (self._head.steps - int(row["step"])))
        return f" · ready about {end:%H:%M}"

    def _figures(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_column()
        state, row = self._state, self._state.row
        losses = [*state.epoch_losses, *([sum(state.running) / len(state.running)] if state.running else [])]
        table.add_row("train loss", f"{losses[-1]:.5f}" if losses else "…", Text(sparkline(losses), style="cyan"))
        table.add_row("held-out loss", self._held(), Text(sparkline(state.held), style="magenta"))
        if row is not None:
            table.add_row("learning rate", f"{row['lr']:.2e}", f"travel {row['travel']:.3e}")
            table.add_row("speed", f"{self._speed():,.0f}", f"tokens/s · {row['gib']:.2f} GiB")
        if state.look is not None:
            table.add_row("last look", f"epoch {state.look['epoch']:.0f}", self._looked(state.look))
        if state.judged is not None:
            word = str(state.judged["verdict"])
            table.add_row("so far", Text(word, style=_STYLE.get(word, "")), _figures(state.judged))
        for key, text in state.besides.items():
            table.add_row(key, "", Text(text))
        return table

    def _held(self) -> str:
        return f"{self._state.held[-1]:.5f}" if self._state.held else "…"

    def _looked(self, look: Mapping[str, Any]) -> str:
        base = "" if self._state.base is None else f" · base {self._state.base:.5f}"
        return (
            f"accuracy {look['accuracy']:.1%} · {look['bpb']:.4f} bits/byte · {look['moved']:.0%} of lora_A moved, "
            f"distance {look['distance']:.3g}{base}"
        )

    def _quote(self, sample: Mapping[str, Any]) -> Panel:
        title = Text(f"epoch {sample['epoch']:.0f}, {sample['format']}", style="dim")
        body = Text(f"{sample['prompt']}\n", style="italic") + Text(sample["answer"], style="not italic")
        return Panel(body, title=title, title_align="left", border_style="dim")
