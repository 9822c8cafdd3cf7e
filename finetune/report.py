"""One self-contained page for a run: `report.html`, rewritten at every look, readable while the run goes on.

It joins what other rooms measured, drew and worded; it measures nothing, asks no network and needs no server.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune import gathered, heat, journey, pages, sections, tokenwise, untouched
from finetune.gathered import Run
from finetune.heat import Heat
from finetune.plots import Picture
from finetune.runs import RunFolder, write_atomic
from finetune.tokenwise import Reader, Texts

_TOKENS = 1_500_000  # bytes of a page that may be examples told token by token
_SHARE = 0.02  # of wall time that a run may spend on its page
_LOG = 300  # lines
_REFRESH = (15, 120)  # seconds between two glances of an open page


@dataclass
class Writer:
    """Writes the page of one run again and again; what never changes is read once. `verdicts`: known ones, by step."""

    folder: Path
    verdicts: dict[int, str] = field(default_factory=dict)
    _texts: Texts | str | None = None
    _took: float = 0.0
    _written: float = 0.0

    def write(self, verdicts: Mapping[int, str] | None = None, to: Path | None = None, texts: bool = True) -> Path:
        """Write the page, whole or not at all. `verdicts`: the word on each look, by step, spares judging them again.

        `to`: elsewhere than in the run. Without `texts` it has no training text, no answer, no path. Errors: UserError.
        """
        path = to or RunFolder(self.folder).report
        write_atomic(path, self.html(verdicts, texts))
        return path

    def keep_up(self, verdicts: Mapping[int, str] | None = None, last: bool = False) -> Path | None:
        """For a run's looks: `write`, unless the last one took more than 2 % of the time since. None: left out.

        The `last` page is always written.
        A page that cannot be written never ends a night; why is noted in log.txt.
        """
        began = time.monotonic()
        if not last and self._took > _SHARE * (began - self._written):
            return None
        try:
            return self.write(verdicts)
        except Exception:  # whatever it is, the run is worth more than its page
            RunFolder(self.folder).note(f"report.html was not written: {traceback.format_exc()}")
            return None
        finally:
            self._written = time.monotonic()
            self._took = self._written - began

    def html(self, verdicts: Mapping[int, str] | None = None, texts: bool = True) -> str:
        """The page as text."""
        run = gathered.read(self.folder, {**self.verdicts, **(verdicts or {})})
        page = pages.render("report.html", *self._about(run, texts))
        self.verdicts = dict(run.verdicts)
        return page

    def _about(self, run: Run, texts: bool) -> tuple[dict[str, Any], list[Picture]]:
        found = heat.heat(run)
        course, formats, drift = journey.picture(run), sections.formats(run), sections.drift(run)
        pictures = [one for _, _, one in course["drawn"]] if course else []
        pictures += [one for _, one in formats["drawn"]] if formats else []
        pictures += [one for _, one in drift["drawn"]] if drift else []
        about = {
            "verdict": sections.verdict(run),
            "chosen": sections.chosen(run),
            "course": course,
            "heat": found,
            "levels": heat.LEVELS,
            "formats": formats,
            "several": sections.several(run) if texts else (),
            "leaks": sections.leaks(run),
            "drift": drift,
            "words": sections.words(run),
            "answers": sections.answers(run) if texts else (),
            "moved": sections.moved(run),
            "adapter": untouched.told(run.folder) if run.elsewhere else (),
            "cost": sections.cost(run),
            "without_texts": not texts,
        }
        return {**_head(run, texts), **about, **self._examples(run, found, texts), **_papers(run, texts)}, pictures

    def _examples(self, run: Run, found: Heat | None, texts: bool) -> dict[str, Any]:
        """Those of the heat map as page.js wants them, the ones that recite most first, as far as there is room."""
        none = {"texts": {}, "texts_missing": "", "texts_cut": 0}
        if found is None:
            return none
        if not texts:
            return {**none, "texts_missing": "This page was written without texts."}
        if self._texts is None:
            self._texts = tokenwise.find(run)
        if isinstance(self._texts, str):
            return {**none, "texts_missing": self._texts}
        reader = Reader(run, self._texts, heat.firsts(run))
        kept, room, cut = {}, _TOKENS, 0
        for line in (*found.trained, *found.held_out):
            one = reader.packed(line.split, line.example)
            size = len(pages.packed(one).encode()) if one else 0
            if one and size <= room:
                kept[f"{line.split}/{line.example}"] = one
                room -= size
            elif one:
                cut += 1
        return {**none, "texts": kept, "texts_cut": cut}


def write(folder: Path | str) -> Path:
    """Write the page of a run, or of an adapter that was made elsewhere; returns where it lies. Errors: UserError."""
    return Writer(Path(folder)).write()


# the head and the papers


def _head(run: Run, texts: bool) -> dict[str, Any]:
    return {
        "title": f"{run.name}: {(run.verdict or {}).get('verdict', 'no verdict yet')}",
        "name": run.name,
        "folder": str(run.folder) if texts else run.name,
        "state": _state(run),
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "refresh": _refresh(run) if run.running else None,
        "elsewhere": run.elsewhere,
    }


def _state(run: Run) -> str:
    if run.elsewhere:
        return "an adapter made elsewhere"
    last = run.steps[-1]["epoch"] if run.steps else 0.0
    return f"{run.facts.get('state', 'unknown')} at epoch {last:.4g} of {run.facts.get('epochs', '?')}"


def _refresh(run: Run) -> int:
    """As often as a look comes, within bounds."""
    between = [b.step - a.step for a, b in zip(run.looks, run.looks[1:], strict=False)]
    seconds = run.steps[-1]["seconds"] * between[-1] if run.steps and between else _REFRESH[0]
    return round(min(max(seconds / 2, _REFRESH[0]), _REFRESH[1]))


def _papers(run: Run, texts: bool) -> dict[str, Any]:
    folder = RunFolder(run.folder)
    log = _lines(folder.log)
    return {
        "recipe": _recipe(folder.recipe, texts),
        "derived": run.facts.get("derived") or {},
        "environment": list(_environment(run.facts, texts)),
        "log": log[-_LOG:] if texts else [],
        "log_lines": len(log),
    }


def _lines(path: Path) -> Sequence[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _recipe(path: Path, texts: bool) -> str:
    """The resolved recipe; for strangers without the folders of this machine."""
    lines = _lines(path)
    if not texts:
        lines = [f"{line.split(':')[0]}: …" if ": /" in line or ":\\" in line else line for line in lines]
    return "\n".join(lines)


def _environment(facts: Mapping[str, Any], texts: bool) -> Iterator[tuple[str, str]]:
    for key in ("version", "seed", "python", "platform", "machine", "cpu_count", "memory_gib", "commit"):
        if facts.get(key) is not None:
            yield key.replace("_", " "), str(facts[key])
    if (parent := facts.get("refit_of")) is not None:
        yield "refit of", str(parent) if texts else Path(parent).name  # a folder of this machine
    for key in ("device", "versions", "fingerprints"):
        for name, value in (facts.get(key) or {}).items():
            yield f"{key.removesuffix('s')}: {name}", "–" if value is None else str(value)
