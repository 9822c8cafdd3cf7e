"""Run a recipe again and again, killed in between, until it is done. Started as a program of its own.

`python killed.py RECIPE RUN SEED` imports everything once, then forks a child per attempt. Each is killed: by the
parent after a random time, or by itself at a random file operation (around a rename, after so many bytes).
Prints how many kills it took.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
from pathlib import Path

from rich.console import Console

from finetune import disk, night, orders
from finetune.screen import Screen


def attempt(recipe: str, run: str) -> None:
    """One try, in a child."""
    task = orders.read(orders.Order(recipe, out=Path(run)))
    night.run(task, Screen(Console(file=io.StringIO())), save_every=0.0, page=False)


def die() -> None:
    """As the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_byte(limit: int) -> None:
    """Kill this process once it has written `limit` bytes through the run folder's own writer, torn in the middle."""
    left, real = [limit], os.write

    def write(handle: int, data: bytes) -> int:
        if len(data) >= left[0]:
            real(handle, bytes(data)[: left[0]])
            die()
        left[0] -= len(data)
        return real(handle, data)

    disk.os.write = write  # type: ignore[attr-defined]


def die_at_rename(count: int, after: bool) -> None:
    """Kill this process at its `count`-th rename, just before or just after it happened."""
    left = [count]

    def wrap(real):  # type: ignore[no-untyped-def]
        def rename(*names, **more):  # type: ignore[no-untyped-def]
            left[0] -= 1
            if left[0] == 0 and not after:
                die()
            done = real(*names, **more)
            if left[0] == 0:
                die()
            return done

        return rename

    os.replace, os.rename = wrap(os.replace), wrap(os.rename)  # type: ignore[assignment]


def child(recipe: str, run: str, draw: random.Random, kind: str) -> int:
    """Fork one attempt that may die; returns its wait status."""
    number = os.fork()
    if number:
        if kind == "time":
            time.sleep(draw.uniform(0.3, 2.0))
            os.kill(number, signal.SIGKILL)
        return os.waitpid(number, 0)[1]
    try:
        if kind == "byte":
            die_at_byte(draw.randrange(1, 12_000))
        elif kind == "rename":
            die_at_rename(draw.randrange(1, 20), draw.random() < 0.5)
        attempt(recipe, run)
        os._exit(0)
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        os._exit(1)


def main() -> None:
    recipe, run, seed = sys.argv[1:]
    draw, kills = random.Random(int(seed)), 0
    for number in range(60):
        kind = ("time", "rename", "byte")[number % 3] if number < 12 else "none"
        status = child(recipe, run, draw, kind)
        if os.WIFSIGNALED(status):
            kills += 1
        elif os.WEXITSTATUS(status) == 0:
            print(kills)
            return
        else:
            sys.exit("an attempt failed by itself")
    sys.exit("it never came to its end")


if __name__ == "__main__":
    main()
