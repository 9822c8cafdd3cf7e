# Everyday commands; `just --list` shows them. All run in the venv of README.

export OMP_NUM_THREADS := "1"

# the checks of .ci/run on the working tree
check:
    .venv/bin/ruff check && .venv/bin/ruff format --check && .venv/bin/mypy && .venv/bin/pytest

# make pocket, the bundled base, again (about an hour on two cores)
pocket:
    .venv/bin/python -m finetune.pocket

# sft train against trl sft: same rows, tokens, dtype and threads in one run
bench-trl:
    .venv/bin/python tests/bench/against_trl.py

# kill a run five times at random and compare it with one that was left alone
bench-kill recipe="recipes/handwritten.yaml" *sets:
    .venv/bin/python tests/bench/kill_and_go_on.py {{recipe}} 5 {{sets}}

# one trained format, five, five and sampled ones: what holds where nothing was trained (about 15 minutes of one core)
bench-formats epochs="30" seeds="3":
    .venv/bin/python tests/bench/training_for_formats.py {{epochs}} {{seeds}}
