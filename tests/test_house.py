"""The house keeps its shape: floors, shelves without Python, sizes. A reader decides the rest."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

ROOT = Path(__file__).parent.parent
ROOMS = {path.stem: path for path in (ROOT / "finetune").glob("*.py") if path.stem != "__init__"}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in ROOMS.items()}
# From the ground up: a room imports only from the lines above its own. Floors 0 and 1 of the house are split where one
# of their rooms stands on another.
FLOORS = (
    "errors conversation overlap format fields draw disk machine seals memory chance runlength private tables until"
    " terminal asking",
    "yamlfile markdown rows masks template filling manner reading formula regroup transfer likeness pane spans almost",
    "places shelf habits passage recital allowed sources scaffold scripts phrases facts",
    "grammar",
    "recipe corpus prompts estimate runs curve starters world batches bases",
    "sheet card lint rules lineup suite",
    "clients wordlist gguffile llamacpp",
    "jinjaform modelfile",
    "presets",
    "wardrobe replay evidence forgotten trend burden",
    "plan earlier slices depot orders inventory signs heard bundle varlen peaks",
    "packed rates",
    "model lots",
    "head odds",
    "train speak prefix pocket looks loggers wording ledger byheart foreign merge",
    "reach replies calibrate",
    "echo leak robustness drift selfreplay plots outlook loading verdict",
    "opened",
    "ear keeping grid minutes voice subject siblings gathered pages untouched",
    "rota",
    "hearing bench reciters shades heat tokenwise journey sections errand reread",
    "talk dial mergedfiles",
    "sitting parcel llamafiles",
    "commands",
    "vigil report sidebyside chat export hub screen preview",
    "audience",
    "night examine",
    "sweep results",
    "morning",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
HEAVY = {"torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate"}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, inside functions too; our own rooms as `finetune.room`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = ".".join(filter(None, ("finetune" if node.level else "", node.module)))
            yield from ((node.lineno, f"{whole}.{one.name}") for one in node.names)


def test_every_room_stands_on_a_floor() -> None:
    lost = ROOMS.keys() - FLOOR.keys()
    assert not lost, f"{sorted(lost)} on no floor: add to FLOORS in {Path(__file__).name}, as low as its imports allow"


def test_a_room_imports_only_from_lower_floors() -> None:
    wrong = []
    for room, tree in TREES.items():
        for line, name in imports(tree):
            target = name.split(".")[1] if name.startswith("finetune.") else ""
            if FLOOR.get(target, -1) >= FLOOR.get(room, len(FLOORS)):
                wrong.append(f"finetune/{room}.py:{line} imports {target}, which is not on a lower floor")
    assert not wrong, "\n".join(wrong)


def test_no_room_below_the_machine_imports_torch() -> None:
    papers = [room for room in TREES if FLOOR.get(room, 99) < FLOOR["plan"]]
    heavy = [(room, line) for room in papers for line, name in imports(TREES[room]) if name.split(".")[0] in HEAVY]
    assert not heavy, heavy


def test_shelves_hold_no_python() -> None:
    shelves = [ROOT / "datasets", ROOT / "recipes", ROOT / "eval", *(ROOT / "finetune").glob("*/")]
    found = [file for shelf in shelves for file in shelf.rglob("*.py") if shelf.is_dir()]
    assert not found, found
    assert not ROOMS.keys() & {"data", "datasets", "eval", "utils", "common", "base", "core"}


def test_every_room_says_what_it_does() -> None:
    silent = [room for room, tree in TREES.items() if not ast.get_docstring(tree)]
    assert not silent, silent


def test_sizes_stay_readable() -> None:
    """Prints the medians (`pytest -rP`); fails only over the hard limits."""
    over, lengths = [], []
    modules = {room: len(path.read_text(encoding="utf-8").splitlines()) for room, path in ROOMS.items()}
    over += [f"finetune/{room}.py has {length} lines, over 400" for room, length in modules.items() if length > 400]
    for room, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
                names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                where = f"finetune/{room}.py:{node.lineno} {node.name}"
                over += [f"{where} has {lengths[-1]} lines, over 60"] if lengths[-1] > 60 else []
                taken = [name for name in names if name not in ("self", "cls")]
                over += [f"{where} takes {len(taken)} parameters, over 8"] if len(taken) > 8 else []
    print(f"modules: median {median(modules.values())}, longest {max(modules.values())}")
    print(f"functions: median {median(lengths)}, p90 {quantiles(lengths, n=10)[-1]:.0f}, longest {max(lengths)}")
    assert not over, "\n".join(over)
