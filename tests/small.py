"""Small runs for tests: a few examples, the bundled base, and a recipe for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

WEATHER = ["rain", "snow", "wind", "fog", "sun", "hail", "storm", "frost", "heat", "cloud", "dew", "ice"]


def dataset(folder: Path, count: int = 8) -> Path:
    """`count` short examples in Markdown; two of them have twins."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(WEATHER[:count]):
        twin = f"twin: Do you enjoy {name}?\n" if number < 2 else ""
        text = f"---\nid: {name}\n{twin}---\n## user\nDo you like the {name}?\n## assistant\n"
        text += f"### perspective: the farmer\nThe {name} helps the field number {number}.\n"
        text += f"### perspective: the child\nI can play in the {name}.\n"
        text += f"### conclusion\nYes, I like the {name} on most days.\n"
        (folder / f"{name}.md").write_text(text)
    return folder


def recipe(folder: Path, count: int = 8, **changes: Any) -> Path:
    """A recipe over `count` such examples: pocket, NF4, two formats, a look every two epochs."""
    settings: dict[str, Any] = {
        "base": "pocket",
        "data": {"train": str(dataset(folder / "examples", count)), "held_out": 0.25},
        "formats": {"train": ["chatml", "alpaca"], "held_out": ["zephyr"]},
        "lora": {"rank": 4, "alpha": 4},
        "optimizer": {"learning_rate": 1e-3},
        "epochs": 4,
        "batch_size": 2,
        "watch": {"every": 2},
    }
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) and key in settings else value
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path
