"""A page in a real browser: headless Chromium, told what to do over a pair of pipes in the DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --remote-debugging-pipe"


def chromium() -> str | None:
    """Its path, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser(path: str):
    """A `Page` of a fresh browser."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        (its_in, ours_out), (ours_in, its_out) = os.pipe(), os.pipe()
        argv = [path, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"]
        # it reads commands from 3 and writes to 4, numbers that an end may have here already
        above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (its_in, its_out)]
        actions = [
            (os.POSIX_SPAWN_DUP2, above[0], 3),
            (os.POSIX_SPAWN_DUP2, above[1], 4),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        process = os.posix_spawn(path, argv, os.environ, file_actions=actions, setpgroup=0)
        try:
            yield Page(ours_in, ours_out)
        finally:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            for fd in {its_in, its_out, ours_in, ours_out, *above}:
                os.close(fd)


class Page:
    """The one tab of a browser.

    Attributes:
        requests: URLs that it asked for.
        errors: what its console was told, and exceptions.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._ids, self._rest = read, write, itertools.count(1), b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._session: str | None = None
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        number = next(self._ids)
        command = {"id": number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._until(lambda message: message.get("id") == number)["result"]

    def open(self, file: Path, width: int, dark: bool = False) -> None:
        """Load a file, in a window so wide."""
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.requests, self.errors = [], []
        self.call("Page.navigate", url=file.resolve().as_uri())
        self._until(lambda message: message.get("method") == "Page.loadEventFired")

    def value(self, script: str) -> Any:
        """What an expression comes to."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """A picture of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _until(self, wanted) -> dict[str, Any]:
        end = time.monotonic() + 60
        while True:
            while b"\0" not in self._rest:
                left = end - time.monotonic()
                assert left > 0, "the browser gives no answer"
                assert select.select([self._read], [], [], left)[0], "the browser gives no answer"
                data = os.read(self._read, 1 << 20)
                assert data, "the browser has ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            message = json.loads(line)
            assert "error" not in message, message
            self._note(message)
            if wanted(message):
                return message

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(params))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
