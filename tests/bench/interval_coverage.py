"""How often the bounds of a mean of paired differences hold, for 10, 14, 20 and 50 examples; they promise 95 %.

    .venv/bin/python tests/bench/interval_coverage.py [RUN_FOLDER] [DRAWS]

Samples are drawn from a normal law, from skewed ones, from one with rare outliers, and, given a run folder, with
replacement from its real held-out differences of NLL(T*) to the base, whose mean is then the truth. `low` and `high`:
shares of samples whose one-sided bound lies on the right side of the truth; `t`: the same for Student's t alone;
`width`: median, beside Student's; `flagged`: samples labelled approximate.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from finetune import chance, evidence, runs
from finetune.evidence import Setting

SIZES = (10, 14, 20, 50)
Draw = Callable[[random.Random], float]
LAWS: dict[str, tuple[Draw, float]] = {
    "normal": (lambda lot: lot.gauss(0, 1), 0.0),
    "exponential (skew 2)": (lambda lot: lot.expovariate(1), 1.0),
    "lognormal, sigma 1 (skew 6)": (lambda lot: lot.lognormvariate(0, 1), math.exp(0.5)),
    "t, 3 degrees (heavy tails)": (lambda lot: lot.gauss(0, 1) / math.sqrt(lot.gammavariate(1.5, 2) / 3), 0.0),
    "one in ten is 3 higher": (lambda lot: lot.gauss(3, 1) if lot.random() < 0.1 else lot.gauss(0, 0.5), 0.3),
}


def real(folder: Path) -> dict[str, tuple[Draw, float]]:
    """The differences of every look of a run, one law each."""
    rows = [runs.read_lines(folder / name) for name in ("metrics.jsonl", "examples.jsonl")]
    first = next(row["format"] for row in rows[1] if row["split"] == "held_out")
    found = {}
    for one in evidence.facts(rows[0], rows[1], [], Setting(first)):
        if len(one.gain) > 2:
            name = f"{folder.name}, epoch {one.epoch:g} ({len(one.gain)} examples)"
            found[name] = (_resampled(one.gain), statistics.fmean(one.gain))
    return found


def _resampled(values: Sequence[float]) -> Draw:
    return lambda lot: lot.choice(values)


def coverage(draw: Draw, truth: float, n: int, draws: int) -> list[float]:
    """low, high, t low, t high, width, flagged."""
    lot, counts, widths = random.Random(n), [0, 0, 0, 0, 0], []
    for _ in range(draws):
        values = [draw(lot) for _ in range(n)]
        found = chance.mean(values)
        if found is None:
            raise ValueError("a sample without bounds")
        reach = chance.t_quantile(chance.LEVEL, n - 1) * statistics.stdev(values) / math.sqrt(n)
        slack = 1e-12 * abs(truth)  # a sample of equal values has bounds of no width
        low, high = truth - found.low >= -slack, found.high - truth >= -slack
        plain = truth - (found.value - reach) >= -slack, found.value + reach - truth >= -slack
        counts = [a + b for a, b in zip(counts, (low, high, *plain, found.approximate), strict=True)]
        widths.append((found.high - found.low) / (2 * reach) if reach else 1.0)
    shares = [one / draws for one in counts]
    return [*shares[:4], statistics.median(widths), shares[4]]


def main() -> None:
    folders = [Path(one) for one in sys.argv[1:] if not one.isdigit()]
    draws = next((int(one) for one in sys.argv[1:] if one.isdigit()), 2000)
    laws = LAWS | {name: law for folder in folders for name, law in real(folder).items()}
    error = math.sqrt(0.95 * 0.05 / draws)
    print(f"{draws} samples each, standard error of a share about {error:.1%}")
    print(f"{'law':44}{'n':>4}{'low':>8}{'high':>8}{'t low':>8}{'t high':>8}{'width':>8}{'flagged':>9}")
    for name, (draw, truth) in laws.items():
        for n in SIZES:
            low, high, t_low, t_high, width, flagged = coverage(draw, truth, n, draws)
            shares = "".join(f"{one:8.1%}" for one in (low, high, t_low, t_high))
            print(f"{name:44}{n:4}{shares}{width:8.2f}{flagged:9.0%}")


if __name__ == "__main__":
    main()
