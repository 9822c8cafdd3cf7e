"""What every test begins with: one thread, no network, no telemetry, its own cache. Set before anything loads torch."""

import atexit
import os
import shutil
import tempfile

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sft-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture
def short_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks ask a quarter of what they ask about drift: half of a small run's time would go there."""
    from finetune import suite

    known = suite.read()
    few = known.pocket.model_copy(update={"texts": 4, "dialogues": 2, "facts": 4})
    short = known.model_copy(update={"held_out": 2, "openings_after": 1, "pocket": few})
    monkeypatch.setattr(suite, "read", lambda _path=None: short)
