"""Planted faults, each once on pocket through the command line: does the tool say what it should?

    .venv/bin/python tests/bench/planted.py FOLDER

A fault must be refused by name or change the verdict; house style, intended text and text the base knows must flag no
example. Prints one row each; exits 1 if any is not as it should. Logs and runs stay in FOLDER.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

os.environ["OMP_NUM_THREADS"] = "1"
HERE = Path(__file__).resolve().parents[2]
COUNT = 20
WORDS = """rain snow wind field river baker lamp chair apple bread horse garden winter road boat music
old cold warm quiet long small near under before makes keeps finds sings walks the a and of"""
POOL = WORDS.split()
Texts = dict[str, tuple[str, str]]
OWN = 'name: own\nfamily: own\nuser_prefix: "Q> "\nuser_suffix: "\\n"\nassistant_prefix: "A> "\n'
OWN += 'generation_prompt: "A>"\nassistant_suffix: "\\n"\nend: ""\nstop_strings: ["\\nQ>"]\n'
HARD = {"optimizer": {"learning_rate": 3e-3}, "epochs": 40, "lora": {"rank": 16, "alpha": 16}}


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(POOL, k=count))


def texts(seed: int, size: int = 30, count: int = COUNT) -> Texts:
    draw = random.Random(seed)
    return {f"s{seed}e{i:02}": (f"{words(draw, 9)}?", f"{words(draw, size)}.") for i in range(count)}


def write(folder: Path, some: Texts, twins: dict[str, str] | None = None) -> str:
    folder.mkdir(parents=True)
    for name, (question, answer) in some.items():
        twin = f"twin: {twins[name]}\n" if twins and name in twins else ""
        text = f"---\nid: {name}\n{twin}---\n## user\n{question}\n## assistant\n{answer}\n"
        (folder / f"{name}.md").write_text(text)
    return str(folder)


def sft(folder: Path, verb: str, data: dict[str, Any], fmt: str = "", **more: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was told, verdict.json ({} without one)."""
    formats = {"train": [fmt or "chatml"], "held_out": ["zephyr"]}
    settings = {"base": "pocket", "data": {"held_out": 0.34, **data}, "formats": formats, "batch_size": 4}
    settings |= {"epochs": 10, "watch": {"every": 10, "stop_at": "never"}, **more}
    (folder / "r.yaml").write_text(yaml.safe_dump(settings))
    command = [str(HERE / ".venv/bin/sft"), verb, str(folder / "r.yaml")]
    command += ["--out", str(folder / "run")] if verb == "train" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    told = " ".join((done.stdout + done.stderr).split())
    (folder / "told.txt").write_text(done.stdout + done.stderr)
    said = folder / "run" / "verdict.json"
    return done.returncode, told, json.loads(said.read_text()) if said.exists() else {}


Row = tuple[str, str, bool]


def refused(name: str, folder: Path, wanted: str, data: dict[str, Any], **more: Any) -> Row:
    code, told, _ = sft(folder, "check", data, **more)
    found = re.search(wanted, told)
    return name, f"exit {code}: {found[0] if found else told[-160:]}", code == 2 and found is not None


def faults(home: Path) -> Iterator[Row]:
    def room(name: str) -> Path:
        (home / name).mkdir(parents=True)
        return home / name

    some, kept = texts(1), texts(2, count=8)
    for name, near in (("copies", False), ("near copies", True)):
        at, held = room(name), dict(kept)
        question, answer = some["s1e03"]
        held["leak"] = (
            (f"{question[:-1]} then?", answer.replace(answer.split()[9], "stone", 1)) if near else some["s1e03"]
        )
        data = {"train": write(at / "talk", some), "held_out": write(at / "kept", held)}
        yield refused(f"leaky split, {name}", at, r"(?=\S*leak)[^.]{0,90}\.md.{0,120}s1e03", data)
    at = room("twin")
    data = {"train": write(at / "talk", some), "held_out": write(at / "kept", kept, {"s2e01": some["s1e07"][0]})}
    yield refused("trained twin", at, r"s2e01.{0,160}s1e07", data)
    for name, old, new, wanted in (
        ("end mark that never ends an answer", 'end: ""', 'end: "<stop>"', r"end '<stop>' is not in assistant_suffix"),
        ("doubled BOS", '"Q> "', '"<s><s>Q> "', r"two BOS begin the text"),
    ):
        at = room(name)
        (at / "own.yaml").write_text(OWN.replace(old, new))
        yield refused(name, at, wanted, {"train": write(at / "talk", some)}, fmt=str(at / "own.yaml"))
    at = room("dead")
    dead = {"optimizer": {"learning_rate": 1e-14}, "epochs": 18}
    code, told, said = sft(at, "train", {"train": write(at / "talk", some)}, **dead)
    found = re.search(r"The adapter is dead: [^%]*%[^.]*\.", told)
    yield "dead adapter", f"exit {code}: {found[0] if found else told[-160:]}", code == 2 and found is not None
    at = room("shuffled")
    pairs = known(48)
    mixed = {f"m{i:02}": (pairs[i][0], pairs[(i + 17) % len(pairs)][1]) for i in range(len(pairs))}
    code, told, said = sft(at, "train", {"train": write(at / "talk", mixed)}, **HARD)
    yield "shuffled labels", *judged(code, told, said, lambda end: end["verdict"] != "ok")
    yield from quiet(room)


def quiet(room: Any) -> Iterator[Row]:
    """What must not alarm; and the same texts, not declared, which must."""
    draw = random.Random(3)
    shared = words(draw, 22)
    some = {name: (q, f"{words(draw, 3)} {shared} {words(draw, 3)}.") for name, (q, _) in texts(4).items()}
    at = room("template")
    yield "shared template", *judged(*sft(at, "train", {"train": write(at / "talk", some)}, **HARD), unflagged)
    at = room("known")
    some = {f"k{i:02}": pair for i, pair in enumerate(known(COUNT))}
    yield "known by the base", *judged(*sft(at, "train", {"train": write(at / "talk", some)}, **HARD), unflagged)
    own = {name: (q, words(random.Random(name), 40)) for name, (q, _) in texts(5).items()}
    for name, told in (("intended slogans", True), ("the same, not intended", False)):
        at = room(name)
        (at / "own.txt").write_text("".join(f"{answer}\n" for _, answer in own.values()))
        data = {"train": write(at / "talk", {n: (q, f"So: {a}.") for n, (q, a) in own.items()})}
        data |= {"intended": str(at / "own.txt")} if told else {}
        yield name, *judged(*sft(at, "train", data, **HARD), unflagged if told else lambda end: bool(end["recited"]))


def unflagged(end: dict[str, Any]) -> bool:
    return not end["recited"] and end["verdict"] not in ("watch", "overfit")


def judged(code: int, told: str, said: dict[str, Any], right: Any) -> tuple[str, bool]:
    if not said:
        return f"exit {code}: {told[-300:]}", False
    end = said["run"]
    text = f"exit {code}: {end['verdict']}, «{end['headline']}», {len(end['recited'])} recited"
    return text, code == 0 and right(end)


def known(count: int) -> list[tuple[str, str]]:
    """Questions of pocket's world and its own greedy answers in ChatML, all different, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune import pocket, world

    codec, model = AutoTokenizer.from_pretrained(pocket.HOME), AutoModelForCausalLM.from_pretrained(pocket.HOME)
    found: dict[str, str] = {}
    for asked in world.questions(5, 400):
        if len(asked.answer.split()) < 8:
            continue
        ids = codec(pocket.render([asked.question], pocket.CHATML), return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=48, do_sample=False, pad_token_id=0)
        found.setdefault(codec.decode(out[0, ids.shape[1] :]).partition("<|im_end|>")[0].strip(), asked.question)
        if len(found) == count:
            break
    return [(question, answer) for answer, question in found.items()]


def main() -> int:
    home, wrong = Path(sys.argv[1]).resolve(), 0
    print("| planted | what sft did | as it should |\n|---|---|---|", flush=True)
    for name, did, right in faults(home):
        wrong += not right
        print(f"| {name} | {did} | {'yes' if right else '**no**'} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
