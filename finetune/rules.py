"""The thresholds of a verdict, read from `eval/verdict.yaml`. No number of it is written anywhere else.

It judges nothing; what the numbers mean is said in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import starters, yamlfile
from finetune.errors import UserError

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
STOPS = {"overfit": ("overfit",), "watch": ("overfit", "watch"), "never": ()}  # verdicts that `watch.stop_at` ends at


class Rules(BaseModel):
    """Every threshold; shares are of 1, counts of examples, looks or checkpoints."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    heavy_examples: Count
    heavy_share: Share
    chance: Share
    windows: Share
    standard_errors: Annotated[float, Field(gt=0)]
    relative: Share
    accuracy: Share
    apart: Share
    looks: Count
    enough: Count
    leak_tests: Count


def read(path: Path | None = None) -> Rules:
    """Of a file, by default the shipped one. UserError naming line and key of every fault."""
    document = yamlfile.read(path or starters.find("verdict", "suites"))
    try:
        found = Rules.model_validate(document.data)
    except ValidationError as error:
        for one in error.errors():
            key = str(one["loc"][0])
            document.refuse((key,), f"{key}: {one['msg'].lower()}.", "See the file that is shipped.")
    if document.problems:
        raise UserError(document.problems)
    return found
