"""What the echo map costs beside generating the same evidence, on one finished run's trained examples.

    .venv/bin/python tests/bench/echo_cost.py RUN

The same evidence by generation: from every token of every answer on, greedy decoding of the rest with a KV cache, which
shows where each prefix is continued verbatim; cuts with equally many tokens to go share a batch. Only every 16th cut is
generated and the time multiplied: the whole would take too long to wait for, which is the point.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetune import ear, echo, opened

STRIDE, ROUNDS = 16, 3


def timed(act: Callable[[], object]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def main() -> None:
    of = opened.read(Path(sys.argv[1]))
    worn = opened.wear(of)
    listener = ear.ear(of.plan)
    passages = list(listener.passages("train"))
    base = ear.base(of.run).of(worn.speaker, passages)
    limits = echo.limits()

    def map_() -> object:
        return echo.measure(worn.speaker, passages, base, limits)

    cuts = []
    for one in passages:
        at = [t for t, read in enumerate(one.read) if read]
        cuts += [(one.ids[:t], at[-1] + 1 - t) for t in at[::STRIDE]]

    def generate() -> None:
        for size in sorted({left for _, left in cuts}):
            some = [ids for ids, left in cuts if left == size]
            worn.speaker.complete(some, [], size)

    map_()
    cheap = statistics.median(timed(map_) for _ in range(ROUNDS))
    dear = timed(generate) * STRIDE
    tokens = sum(sum(one.read) for one in passages)
    print(f"{len(passages)} answers, {tokens} tokens, {tokens} cuts")
    told = f"generating: {dear:.1f} s (from every {STRIDE}th cut); {dear / cheap:.0f} x"
    print(f"map: {cheap:.2f} s, median of {ROUNDS}; {told}")


if __name__ == "__main__":
    main()
