"""Chromium without a window, driven over its DevTools protocol through a pipe: no further package."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip


class Page:
    """A page of the browser.

    Attributes:
      requests: addresses that it has asked for.
      dialogs: texts of alerts and the like.
      errors: what its scripts and its policy complained of.
    """

    def __init__(self, writing: int, reading: int) -> None:
        self._writing, self._reading, self._rest = writing, reading, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = next(self._numbers)
        sent = {"id": number, "method": method, "params": params}
        if self._session is not None:
            sent["sessionId"] = self._session
        os.write(self._writing, json.dumps(sent).encode() + b"\0")
        while True:
            message = self._message(60)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._happened(message)

    def js(self, code: str) -> Any:
        """The value of an expression, awaited."""
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, code: str, seconds: float = 60) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(code):
            assert time.monotonic() < end, f"{code} stays false"
            time.sleep(0.05)

    def open(self, url: str, width: int = 1280, *, dark: bool = False) -> None:
        """Goes to an address, as wide as a screen and in light or dark; waits until its script has run."""
        height = 900 if width > 600 else 844
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def point(self, selector: str) -> None:
        """Moves the mouse to the middle of the first element."""
        self.js(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
        box = self.js(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getClientRects()[0];"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    def picture(self, file: Path, *, whole: bool = False) -> None:
        """Writes a picture of the page: of what is seen, or of all."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))

    def _message(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._reading], [], [], seconds)[0], "the browser says nothing"
            more = os.read(self._reading, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        found, _, self._rest = self._rest.partition(b"\0")
        return json.loads(found)

    def _happened(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(params["message"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"].get("exception", {}).get("description", "?"))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own.

    Args:
      profile: an empty folder for it.
    """
    assert CHROMIUM is not None
    theirs_in, writing = os.pipe()
    reading, theirs_out = os.pipe()
    # The protocol's pipes are the descriptors 3 and 4.
    start = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
    words = ["bash", "-c", start, "chromium", CHROMIUM, f"--user-data-dir={profile}", *OPTIONS]
    process = subprocess.Popen(
        words, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(writing, reading)
    finally:
        os.close(writing)  # at which it ends
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(reading)
