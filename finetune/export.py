"""A run as files for other programs: merged weights, llama.cpp's files, an Ollama model, instruct presets.

Every folder is whole or not there, and says what was checked of it, by which program, and what was not. It trains
nothing and changes nothing else in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune import bundle, llamafiles, mergedfiles, modelfile, presets, tables
from finetune.bundle import Bundle
from finetune.errand import Errand, Wish
from finetune.errand import errand as errand_of
from finetune.errors import refuse
from finetune.merge import Merge
from finetune.opened import Opened

Tell = Callable[[str], None]
_ADAPTER = 2**28  # bytes that an adapter's file stays below


@dataclass(frozen=True)
class Done:
    """An export that lies in `folder`."""

    folder: Path
    about: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {"folder": str(self.folder), **self.about}


def told(done: Done, width: int) -> Iterator[str]:
    """For a terminal so wide: what lies where, what was verified, what to mind, what to do next."""
    yield f"Wrote {done.folder}"
    for name, count in done.about["files"].items():
        yield f"  {name}  {bundle.size(count)}"
    for title, rows in (("Verified", done.about["verified"]), ("Mind", done.about["warnings"])):
        if rows:
            yield title
            yield from (line for row in rows for line in tables.wrapped(row, width, "  "))
    yield "Next"
    for one in done.about["next"]:
        yield from tables.wrapped(f"{one['program']}: {one['do']}", width, "  ")


def export(run: Opened, wish: Wish, tell: Tell = lambda _line: None) -> Done:
    """Write one kind of export. Errors: UserError, and then nothing is left of it."""
    errand = errand_of(run, wish)
    fill, needs = _WAYS[wish.kind](errand)
    with bundle.bundle(errand.folder, needs, errand.secrets) as made:
        fill(made, tell)
    return Done(errand.folder, made.as_dict())


Fill = Callable[[Bundle, Tell], None]


def _merged(errand: Errand) -> tuple[Fill, float]:
    plan = mergedfiles.planned(errand, errand.wish.dtype)
    return lambda made, tell: mergedfiles.to_merged(errand, plan, made, tell), plan.bytes()


def _gguf(errand: Errand) -> tuple[Fill, float]:
    plan, size = _llama_plan(errand)
    needs = size * (errand.wish.only != "adapter") + _ADAPTER * (errand.wish.only != "model")
    return lambda made, tell: llamafiles.to_gguf(errand, plan, made, tell), needs


def _llama_plan(errand: Errand) -> tuple[Merge, float]:
    """Weights are added up in fp32, and counted as the file will keep them."""
    dtype = errand.wish.dtype or "f16"
    plan = replace(mergedfiles.planned(errand, "f32"), rounded=llamafiles.rounded_to(dtype))
    return plan, llamafiles.size(plan, dtype)


def _ollama(errand: Errand) -> tuple[Fill, float]:
    """A base and an adapter beside it, which no rounding touches; or one merged model."""
    modelfile.modelfile(errand.format, errand.vocabulary, "x")  # refuses before anything large is written
    if errand.wish.source:
        return lambda made, tell: _ollama_parts(errand, made, tell), _ADAPTER
    plan, size = _llama_plan(errand)
    if errand.wish.only == "model":
        return lambda made, tell: _ollama_whole(errand, plan, made, tell), size
    if errand.wish.only == "adapter":
        raise refuse("an adapter alone is no model.", "Name the base as Ollama knows it: --set from=NAME.")
    return lambda made, tell: _ollama_parts(errand, made, tell), size + _ADAPTER


def _ollama_parts(errand: Errand, made: Bundle, tell: Tell) -> None:
    dtype = errand.wish.dtype or "f16"
    made.facts |= {**errand.facts(), "onto": errand.wish.onto, "dtype": dtype}
    lora = made.folder / f"{errand.name}-lora.gguf"
    llamafiles.write_adapter(errand, lora, made, tell)
    source = errand.wish.source
    if not source:
        base = made.folder / f"{errand.base_name}-{dtype}.gguf"
        llamafiles.write_model(errand, llamafiles.bare_plan(errand), base, errand.base_name, made, tell)
        llamafiles.try_out(errand, made, tell, base, lora)
        source = f"./{base.name}"
    else:
        made.warnings.append(
            f"it stands on {source}, which must be {errand.opened.base.name} itself and no chat version"
        )
    _finish_ollama(errand, made, source, f"./{lora.name}")


def _ollama_whole(errand: Errand, plan: Merge, made: Bundle, tell: Tell) -> None:
    dtype = errand.wish.dtype or "f16"
    made.facts |= {**errand.facts(), "onto": errand.wish.onto, "dtype": dtype}
    whole = made.folder / f"{errand.name}-{dtype}.gguf"
    llamafiles.write_model(errand, plan, whole, errand.name, made, tell)
    mergedfiles.told_of_rounding(made, plan.count, dtype)
    llamafiles.try_out(errand, made, tell, whole)
    _finish_ollama(errand, made, f"./{whole.name}", None)


def _finish_ollama(errand: Errand, made: Bundle, source: str, adapter: str | None) -> None:
    text = modelfile.modelfile(errand.format, errand.vocabulary, source, adapter)
    (made.folder / "Modelfile").write_text(text, encoding="utf-8")
    made.warnings.append("Ollama itself was not run: its template is tested here by a reader of Go's language")
    made.next.append(("Ollama", f"cd into the folder; ollama create {errand.name.lower()} -f Modelfile"))
    made.next.append(("then", f"ollama run {errand.name.lower()}"))


def _presets(errand: Errand) -> tuple[Fill, float]:
    found = presets.presets(errand.format, errand.vocabulary, f"{errand.name}-{_title(errand.format_name)}")
    return lambda made, _tell: _fill_presets(errand, found, made), 2**20


def _title(name: str) -> str:
    return Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace(":", "-").replace("~", "-")


def _fill_presets(errand: Errand, found: presets.Presets, made: Bundle) -> None:
    made.facts |= errand.facts()
    for path, text in presets.list_of(found):
        place = made.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text, encoding="utf-8")
    for one in found.made:
        made.next.append((one.program, one.where))
        made.warnings += [f"{one.program}: {limit}" for limit in one.limits]
    for program, error in found.refused.items():
        made.warnings += [f"{program}: nothing written. {problem}" for problem in error.problems]
    made.verified.append("text-generation-webui: its template was run and gives training's own text")


_WAYS: Mapping[str, Callable[[Errand], tuple[Fill, float]]] = {
    "merged": _merged,
    "gguf": _gguf,
    "ollama": _ollama,
    "presets": _presets,
}
