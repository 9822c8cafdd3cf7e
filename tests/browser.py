"""A real browser for tests of pages: headless Chromium, asked through a pipe. No driver, no network, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHY_NOT = "no chromium on this machine"


class Browser:
    """One page of one browser. `said`: what the page logged, security reports included."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest, self._count = to, back, b"", 0
        self.said: list[str] = []
        self.asked: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **params: Any) -> Any:
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        os.write(self._to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self._until(lambda told: told.get("id") == self._count)["result"]

    def _until(self, wanted: Any) -> Any:
        while True:
            told = self._next()
            method, about = told.get("method"), told.get("params", {})
            if method == "Log.entryAdded":
                self.said.append(about["entry"]["text"])
            elif method == "Runtime.exceptionThrown":
                self.said.append(str(about["exceptionDetails"]))
            elif method == "Network.requestWillBeSent":
                self.asked.append(about["request"]["url"])
            if wanted(told):
                if "error" in told:
                    raise RuntimeError(told["error"])
                return told

    def _next(self) -> Any:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 2**20)
            if not piece:
                raise RuntimeError("the browser is gone")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, path: Path, mark: str = "", width: int = 1280, dark: bool = False) -> None:
        """Load a file and wait until it is there."""
        self.said, self.asked = [], []
        media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self("Emulation.setEmulatedMedia", features=media)
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self("Page.navigate", url="about:blank")
        self._until(lambda told: told.get("method") == "Page.loadEventFired")
        self("Page.navigate", url=path.resolve().as_uri() + mark)
        self._until(lambda told: told.get("method") == "Page.loadEventFired")

    def run(self, expression: str) -> Any:
        """The value of an expression in the page."""
        about = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in about:
            raise RuntimeError(about["exceptionDetails"])
        return about["result"].get("value")

    def picture(self, path: Path, whole: bool = True) -> None:
        """A screenshot, of the whole page or of what is seen."""
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browser() -> Iterator[Browser]:
    """Start one; it ends with the block."""
    if FOUND is None:
        raise RuntimeError(WHY_NOT)
    with tempfile.TemporaryDirectory() as home:
        there, to = os.pipe()
        back, here = os.pipe()
        words = [FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={home}/profile", "--disable-dev-shm-usage", "--no-first-run"]
        script = f'exec "$@" 3<&{there} 4>&{here}'
        process = subprocess.Popen(
            ["bash", "-c", script, "bash", *words], pass_fds=(there, here), stderr=subprocess.DEVNULL, cwd=home
        )
        os.close(there)
        os.close(here)
        try:
            yield Browser(to, back)
        finally:
            process.terminate()
            process.wait()
            os.close(to)
            os.close(back)
