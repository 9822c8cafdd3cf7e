"""A hundred pushes of one run while 30 % of all requests fail at random: do all arrive whole, and does any run fail?

    OMP_NUM_THREADS=1 .venv/bin/python tests/bench/hundred_pushes.py [PUSHES] [SHARE]

Waiting is cut to a thousandth, the client's own and ours; every other thing is real. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hub_stand_in as stand_in

KINDS = (500, 502, 503, 504, 429, "drop", "lost", "half", "slow")


def main(pushes: int, share: float) -> None:
    with stand_in.serving() as server, tempfile.TemporaryDirectory() as place:
        os.environ |= {"HF_ENDPOINT": server.url, "HF_TOKEN": stand_in.TOKEN, "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"HF_HOME": place, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        import finished

        from finetune import hub, parcel
        from finetune.parcel import Wish
        from finetune.runs import RunFolder

        run, dice, real = RunFolder(finished.run(Path(place))), random.Random(0), time.sleep
        time.sleep = lambda seconds: real(min(seconds / 1000, 0.05))
        server.faults = lambda _method, _path: dice.choice(KINDS) if dice.random() < share else None
        whole = raised = told = 0
        began = time.monotonic()
        for number in range(pushes):
            finished.changed(run.path, "verdict.json", reason=f"Push {number}.")
            made = parcel.make(run, Wish(f"me/rain-{number}"))
            lines: list[str] = []
            try:
                hub.push(made, lines.append)
            except Exception:  # counted: that is what is measured
                raised += 1
                continue
            told += len(lines)
            repo = server.repos[f"me/rain-{number}"]
            same = all(repo.files.get(item.name) == item.bytes() for item in (*made.items, made.readme({})))
            whole += same and repo.private and len(repo.commits) == 2  # the first is the Hub's own
        found = {"pushes": pushes, "share": share, "whole": whole, "raised": raised, "requests": len(server.seen)}
        print(json.dumps({**found, "waits_of_ours": told, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100, float(sys.argv[2]) if len(sys.argv) > 2 else 0.3)
