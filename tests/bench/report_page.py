"""How large the page of a long run is, and how long it takes to write: 200 trained examples, 60 looks, 600 epochs.

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/report_page.py

The night is made up (tests/nights.py), its files are not. Seconds of the processor: others may share the machine.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nights import Shape, night

from finetune.report import Writer

LOOKS = (1, 2, 5, *range(10, 571, 10))


def main() -> None:
    """Two sizes of answers; the first page of a process, then another."""
    for words in (150, 450):
        with tempfile.TemporaryDirectory() as folder:
            run = night(Path(folder), Shape(examples=250, epochs=600, looks=LOOKS, words=words))
            rows = sum(len(path.read_bytes().splitlines()) for path in run.glob("*.jsonl"))
            writer, told = Writer(run), []
            for _ in range(2):
                began = time.process_time()
                page = writer.write()
                told.append(time.process_time() - began)
            size = page.stat().st_size / 2**20
            print(f"{words} words an answer, {len(LOOKS)} looks, {rows} rows: {size:.2f} MiB;", end=" ")
            print(f"first {told[0]:.1f} s with every look judged, then {told[1]:.1f} s")


if __name__ == "__main__":
    main()
