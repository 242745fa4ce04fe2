"""A headless Chromium to open a page in, driven over a pipe (no driver package is needed)."""

import fcntl
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import time
from typing import Any

EXECUTABLE = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)


class Browser:
    """One page of a headless Chromium.

    Attributes:
        problems: what the page wrote to its console as a warning or an error, and what it threw.
    """

    def __init__(self, profile: pathlib.Path):
        self.problems: list[str] = []
        self._ids = itertools.count(1)
        self._unread = b""
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # The browser reads from descriptor 3 and writes to 4; these must not be in the way.
        ours = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (commands, answers)]
        assert EXECUTABLE is not None
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio"]
        flags += ["--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "about:blank"]
        redirect = f'exec "$@" 3<&{ours[0]} 4>&{ours[1]}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", EXECUTABLE, *flags],
            pass_fds=ours,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (commands, answers, *ours):
            os.close(end)
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(self, url: str, width: int) -> None:
        """Opens a page in a window so many CSS pixels wide and waits for it."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, expression: str) -> Any:
        """Returns the JSON value of an expression; a promise is waited for."""
        found = self._call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 30.0) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < end, f"{expression} did not become true"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Presses a key of one character."""
        self._call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self._call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._answers)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._answers], [], [], 60)
            assert ready, "the browser does not answer"
            block = os.read(self._answers, 1 << 20)
            assert block, "the browser ended"
            self._unread += block
        message, self._unread = self._unread.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown" or (
            method == "Runtime.consoleAPICalled" and parameters["type"] in ("warning", "error")
        ):
            self.problems.append(json.dumps(parameters)[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("warning", "error"):
            self.problems.append(parameters["entry"]["text"])
