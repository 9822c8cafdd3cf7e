"""The one error a user meets: where, what is wrong, what to do.

    UserError                 exit 2: the user must fix something
      └─ .problems            every problem found, each a Problem

Everything else that escapes is our fault (exit 1). This room prints nothing and knows no rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Problem:
    """One thing to fix. `line` counts from 1; None where the whole file, or no file, is meant.

    `key`: the setting to blame, such as `("formats", "train", 1)`, for rooms that do not know where it was written.
    """

    what: str
    remedy: str
    file: Path | str | None = None
    line: int | None = None
    key: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}:{self.line}  " if self.line else f"{self.file}  "
        return f"{place}{self.what}  {self.remedy}".rstrip()

    def as_dict(self) -> dict[str, str | int | None]:
        """For `--json`."""
        file = None if self.file is None else str(self.file)
        return {"file": file, "line": self.line, "what": self.what, "remedy": self.remedy}


class UserError(Exception):
    """Everything that is wrong, at once. The door prints it and exits 2; no traceback."""

    def __init__(self, problems: Problem | list[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(map(str, self.problems)))


def refuse(
    what: str,
    remedy: str,
    file: Path | str | None = None,
    line: int | None = None,
    key: tuple[str | int, ...] = (),
) -> UserError:
    """A UserError of one problem, to be raised by the caller."""
    return UserError(Problem(what, remedy, file, line, key))
