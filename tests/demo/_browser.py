"""A headless Chromium, driven through its DevTools protocol over a pair of pipes: no other package is needed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio")
SECONDS = 60  # for any one answer

# Chromium reads commands from descriptor 3 and answers on 4; these two lines put them there and become Chromium.
_LAUNCH = """import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def program() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """A running Chromium: sends commands, collects events."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._count = b"", 0
        self._target: str | None = None
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") != self._count:
                self.events.append(answer)
                continue
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Wait for an event of a page."""
        while not any(event["method"] == method and event.get("sessionId") == session for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            readable, _, _ = select.select([self._answers], [], [], max(0, deadline - time.monotonic()))
            read = os.read(self._answers, 1 << 20) if readable else b""
            if not read:
                raise RuntimeError(f"Chromium said nothing more{'' if readable else f' in {SECONDS} seconds'}")
            self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, height: int = 844) -> Page:
        """Load a file as a phone or a desktop of that many CSS pixels would, to its end; closes the page before."""
        if self._target is not None:
            self.send("Target.closeTarget", targetId=self._target)
        self._target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable", session)
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", session, **size)
        self.send("Page.navigate", session, url=path.as_uri())
        self.wait("Page.loadEventFired", session)
        return Page(self, session)


class Page:
    """A loaded page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        answer = self._browser.send(
            "Runtime.evaluate", self._session, expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "the script failed"))
        return answer["result"].get("value")

    def errors(self) -> list[str]:
        """What went wrong on the page: uncaught exceptions, and errors and warnings of the console."""
        found = []
        for method, parameters in self._events():
            if method == "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                found.append(details.get("exception", {}).get("description", details["text"]))
            elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                found.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}"[:300])
            elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(part.get("value")) for part in parameters["args"]))
        return found

    def requests(self) -> list[str]:
        """Every address that the page asked for, its own included, data URIs left out."""
        asked = [parameters["request"]["url"] for method, parameters in self._events() if method.endswith("WillBeSent")]
        return [address for address in asked if not address.startswith("data:")]

    def screenshot(self, path: Path) -> None:
        """Save the whole page as PNG."""
        answer = self._browser.send("Page.captureScreenshot", self._session, format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _events(self) -> list[tuple[str, Mapping[str, Any]]]:
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [(event["method"], event["params"]) for event in mine]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile folder of its own, and end it afterwards."""
    pipes = [os.pipe(), os.pipe()]
    commands_read, answers_write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pipes[0][0], pipes[1][1]))
    options = [*OPTIONS, "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    home = {f"XDG_{name}_HOME": str(profile) for name in ("CACHE", "CONFIG", "DATA", "STATE")} | {"HOME": str(profile)}
    process = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, str(commands_read), str(answers_write), str(program()), *options],
        env={**os.environ, **home, "XDG_RUNTIME_DIR": str(profile)}, pass_fds=(commands_read, answers_write),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for descriptor in (commands_read, answers_write, pipes[0][0], pipes[1][1]):
        os.close(descriptor)
    try:
        yield Browser(pipes[0][1], pipes[1][0])
    finally:
        os.close(pipes[0][1])  # Chromium ends when its pipe does
        os.close(pipes[1][0])
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
