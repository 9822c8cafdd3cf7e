"""All who are told of a run while it goes on: the screen, the page, the dashboards. It decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.loggers import Loggers
from finetune.report import Writer
from finetune.screen import Headline, Screen

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Audience:
    """What a run tells a screen, told to all. `page`: None where no page is wanted."""

    screen: Screen
    loggers: Loggers
    page: Writer | None

    def open(self, headline: Headline) -> None:
        """Training begins."""
        self.screen.open(headline)

    def close(self) -> None:
        """Training has ended."""
        self.screen.close()

    def step(self, row: Row) -> None:
        """After each step."""
        self.screen.step(row)
        self.loggers.rows([row])

    def look(self, rows: Sequence[Row], samples: Sequence[Row], judged: Row | None = None) -> None:
        """After each look, once its rows are in the run folder."""
        self.screen.look(rows, samples, judged)
        self.loggers.rows(rows)
        if self.page is not None:
            self.page.keep_up()

    def say(self, text: str) -> None:
        """A line of words."""
        self.screen.say(text)
