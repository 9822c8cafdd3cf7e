"""What a talk looks like: lines read from a terminal or a pipe, answers as they come, two of them side by side.

Whatever a model says is shown, never obeyed. It knows no model and no command but their names, and keeps no history on
disk.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from finetune.tables import harmless

_NARROW = 70  # columns below which two answers stand below one another
_BLOCK = '"""'


class Reader(Protocol):
    """Where questions come from."""

    def ask(self) -> str:
        """The next question or command. EOFError at the end, KeyboardInterrupt where a line was given up."""
        ...


class Piped:
    """Lines of a file or a pipe, shown as they are read. A line ending in a backslash goes on, and so does `\"\"\"`."""

    def __init__(self, lines: IO[str], show: Callable[[str], None]) -> None:
        self._lines, self._show = lines, show

    def ask(self) -> str:
        """The next question or command."""
        text = joined(self._line)
        self._show(f"> {text}".replace("\n", "\n. "))
        return text

    def _line(self) -> str:
        line = self._lines.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def joined(line: Callable[[], str]) -> str:
    """One text of one or more lines: after a backslash, or between two lines of three quotes."""
    text = line()
    if text.strip() == _BLOCK:
        found: list[str] = []
        while (text := line()).strip() != _BLOCK:
            found.append(text)
        return "\n".join(found)
    while text.endswith("\\"):
        text = f"{text[:-1]}\n{line()}"
    return text


class Typed:
    """A line editor: Enter sends, Alt-Enter or a backslash before Enter goes on, what is pasted stays together."""

    def __init__(self, words: Callable[[str], Iterable[str]], status: Callable[[], str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        keys = KeyBindings()

        @keys.add("enter")
        def _send(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _go_on(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=". ",
            key_bindings=keys,
            completer=_completer(words),
            complete_while_typing=False,
            history=InMemoryHistory(),
            bottom_toolbar=lambda: harmless(status()),
        )

    def ask(self) -> str:
        """The next question or command."""
        return self._session.prompt()


def _completer(words: Callable[[str], Iterable[str]]) -> Any:
    """Completes the word before the cursor of a command; `words` are those that may follow what stands before it."""
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion
    from prompt_toolkit.document import Document

    class _Words(Completer):
        def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
            text = document.text_before_cursor
            if text.startswith("/") and "\n" not in text:
                head, _, begun = text.rpartition(" ")
                yield from (Completion(one, -len(begun)) for one in words(head) if one.startswith(begun))

    return _Words()


class Pane:
    """Where a talk is shown. Colours and columns only on a terminal."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self._file = file or sys.stdout
        self._console = Console(file=self._file, highlight=False, markup=False, emoji=False)
        self.is_terminal = self._console.is_terminal and not self._console.is_dumb_terminal

    def say(self, text: str = "", style: str = "") -> None:
        """A line of ours; on a terminal wrapped at words."""
        self._console.print(Text(harmless(text), style=style), soft_wrap=not self.is_terminal)

    def note(self, text: str) -> None:
        """A line beside the talk."""
        self.say(text, "dim")

    def rows(self, lines: Iterable[str]) -> None:
        """Lines already cut or aligned."""
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)

    def marked(self, text: str, stretches: Sequence[tuple[int, int]]) -> None:
        """A text with stretches of characters brought out: in bold, or in brackets where there is no terminal."""
        if self.is_terminal:
            shown = Text()
            at = 0
            for start, stop in stretches:
                shown.append(harmless(text[at:start])).append(harmless(text[start:stop]), "bold reverse")
                at = stop
            self._console.print(shown.append(harmless(text[at:])))
            return
        for start, stop in reversed(stretches):
            text = f"{text[:start]}[[{text[start:stop]}]]{text[stop:]}"
        self.say(text)

    def stream(self, pieces: Iterable[str]) -> None:
        """A text as it comes, and the end of its line also where it is given up."""
        try:
            for piece in pieces:
                self._file.write(harmless(piece))
                self._file.flush()
        finally:
            self._file.write("\n")
            self._file.flush()

    def beside(self, titles: Sequence[str], answers: Sequence[Iterable[str]]) -> None:
        """Texts side by side, one after the other as they come; below one another where it is narrow or no terminal."""
        if not self.is_terminal or self._console.width < _NARROW:
            for title, pieces in zip(titles, answers, strict=True):
                self.say(f"[{title}]", "bold")
                self.stream(pieces)
            return
        texts = [""] * len(titles)
        room = max(4, self._console.height - 5)
        try:
            with Live(console=self._console, transient=True, auto_refresh=False) as live:
                for number, pieces in enumerate(answers):
                    for piece in pieces:
                        texts[number] += harmless(piece)
                        live.update(self._columns(titles, texts, room), refresh=True)
        finally:
            self._console.print(self._columns(titles, texts))

    def _columns(self, titles: Sequence[str], texts: Sequence[str], room: int | None = None) -> Table:
        """`room`: at most so many lines, the last ones, while more may come."""
        table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
        for title in titles:
            table.add_column(harmless(title), ratio=1, overflow="fold", header_style="bold")
        width = (self._console.width - 2 * len(titles)) // len(titles)
        cells = []
        for text in texts:
            lines = Text(text).wrap(self._console, width)
            cells.append(Group(*(lines[-room:] if room else lines)))
        table.add_row(*cells)
        return table
