"""What every test begins with: one thread, no network, no telemetry, its own cache. Set before anything loads torch."""

import atexit
import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="sft-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
