"""Chromium without a window, spoken to through two pipes by its DevTools protocol."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
    "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
)  # fmt: skip


class Chromium:
    """One tab of a browser of its own.

    Args:
        folder: for its profile.
        size: of the window in pixels.
    """

    def __init__(self, folder: Path, size: tuple[int, int] = (1300, 900)) -> None:
        assert BROWSER is not None
        # It reads commands from 3 and writes to 4, so ours must not lie there.
        theirs_in, self._out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        self._in, theirs_out = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in os.pipe())
        quiet = os.open(os.devnull, os.O_WRONLY)
        command = [BROWSER, *_FLAGS, f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "about:blank"]
        actions = [(os.POSIX_SPAWN_DUP2, theirs_in, 3), (os.POSIX_SPAWN_DUP2, theirs_out, 4),
                   (os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2)]  # fmt: skip
        self._process = os.posix_spawn(BROWSER, command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (theirs_in, theirs_out, quiet):
            os.close(fd)
        self._numbers, self._rest = itertools.count(1), b""
        self._events: list[dict[str, Any]] = []
        self._session = ""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """A command's answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._read()).get("id") != number:
            self._events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            found = os.read(self._in, 1 << 20)
            assert found, "the browser has ended"
            self._rest += found
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def events(self, method: str) -> list[dict[str, Any]]:
        """What was told so far."""
        return [event["params"] for event in self._events if event.get("method") == method]

    def open(self, page: str) -> None:
        """Loads an address and waits until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=page)
        while not self.events("Page.loadEventFired"):
            self._events.append(self._read())

    def run(self, script: str) -> Any:
        """The value of an expression in the page, awaited where it is a promise."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, (script, found["exceptionDetails"])
        return found["result"].get("value")

    def until(self, script: str, seconds: float = 10) -> Any:
        """Waits for an expression to be true, and gives its value."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"not so after {seconds} s: {script}"
            time.sleep(0.02)
        return found

    def press(self, key: str, text: str = "") -> None:
        """A key pressed and let go, as a reader's."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = text or (key if len(key) == 1 else "\r" if key == "Enter" else "")
        given = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def type(self, text: str) -> None:
        for letter in text:
            self.press(letter)

    def click(self, selector: str) -> None:
        """A click in the middle of an element."""
        x, y = self.run(
            f"(() => {{const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        """What the window shows, as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Chromium]:
    """A browser for one test, which fails where the page's script does, or where it asks for anything outside its file."""
    if BROWSER is None:
        pytest.skip("no Chromium on this machine, so the page is not tried in a browser")
    chromium = Chromium(tmp_path / "profile")
    try:
        yield chromium
        assert not chromium.events("Runtime.exceptionThrown") and not chromium.events("Log.entryAdded")
        sent = [event["request"]["url"][:60] for event in chromium.events("Network.requestWillBeSent")]
        assert all(url.startswith(("file://", "data:image/")) for url in sent), sent
    finally:
        chromium.close()
