"""What the search for leaked text costs, by megabytes of training text.

    .venv/bin/python tests/bench/leak_index.py [MEGABYTES]...

Text is drawn word by word from a chain over the words of datasets/minisymposium, two words of memory, so that it
repeats itself as much as prose does. Searched: 370 answers (74 prompts, five each) of about 2,000 characters, every
tenth of them with 300 characters of training text planted in it: a span at least as long must be found. `index`: the
suffix array alone; `style`: house style over all answers; `search`: all answers, altered copies too. CPU seconds, one
process each.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from finetune import corpus, sources, world
from finetune.conversation import Conversation, Origin, Turn
from finetune.masks import Vocabulary
from finetune.sources import Limits, Sources
from finetune.spans import Index

DATASET = Path(__file__).parent.parent.parent / "datasets" / "minisymposium"
ANSWERS, PLANTED, LONG = 370, 10, 300


class Prose:
    """A chain over words, two of memory."""

    def __init__(self, seed: int) -> None:
        words = " ".join(turn.text for one in corpus.read(DATASET) for turn in one.turns).split()
        self._next: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        for one, two, three in zip(words, words[1:], words[2:], strict=False):
            self._next[one, two].append(three)
        self._lot, self._starts = random.Random(seed), list(self._next)

    def text(self, characters: int) -> str:
        """About so many."""
        pair, found, size = self._lot.choice(self._starts), list[str](), 0
        while size < characters:
            after = self._next.get(pair)
            pair = (pair[1], self._lot.choice(after)) if after else self._lot.choice(self._starts)
            found.append(pair[1])
            size += len(pair[1]) + 1
        return " ".join(found)


def measure(megabytes: float) -> str:
    prose, lot = Prose(0), random.Random(1)
    texts = [prose.text(2000) for _ in range(max(1, round(megabytes * 500)))]
    answers = [prose.text(2000) for _ in range(ANSWERS)]
    planted = {}
    for number in range(0, ANSWERS, PLANTED):
        home = lot.randrange(len(texts))
        at = lot.randrange(len(texts[home]) - LONG)
        planted[number] = texts[home][at : at + LONG]
        answers[number] = answers[number][:900] + planted[number] + answers[number][900:]
    began = time.process_time()
    Index(texts)
    index = time.process_time() - began
    trained = [Conversation(str(n), (Turn("assistant", text),), Origin("x.md")) for n, text in enumerate(texts)]
    began = time.process_time()
    style = sources.style({one.id: [one.answer] for one in trained}, 8, 24)
    styled = time.process_time() - began
    # the chain repeats eight words so often that all would be house style: searched without it
    made = Sources(trained, {}, Vocabulary.load(world.SOURCE.parent).tokenizer, Limits(50, 150, 0.1))
    began = time.process_time()
    found = made.search(answers, [()] * ANSWERS)
    search = time.process_time() - began
    for number, text in planted.items():
        span = found[number].span
        assert span is not None
        assert made.limits.severity(span.tokens, span.characters) >= len("".join(text.split())) / 150, number
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    windows = sum(map(len, style.values()))
    return f"{megabytes:5g} {index:8.2f} {styled:8.2f} {search:8.2f} {memory:8.0f} {windows:9}"


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(measure(float(sys.argv[2])))
        return
    print(f"{'MB':>5} {'index':>8} {'style':>8} {'search':>8} {'MiB':>8} {'formulas':>9}")
    for megabytes in sys.argv[1:] or ["0.1", "1", "10"]:
        subprocess.run([sys.executable, __file__, "--one", megabytes], check=True)


if __name__ == "__main__":
    main()
