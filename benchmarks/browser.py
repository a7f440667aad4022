"""Headless Chromium, to time pages and to take pictures of them."""

from __future__ import annotations

import base64
import json
import subprocess
import urllib.request
from pathlib import Path

# Resolves in the second frame after the load event, by when the first has been painted.
PAINTED = """
const done = arguments[arguments.length - 1];
const painted = () => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
document.readyState === "complete" ? painted() : addEventListener("load", painted);
"""
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-quic")  # fmt: skip


class Browser:
    """Chromium by ChromeDriver's protocol (W3C WebDriver), at one size of window."""

    def __init__(self, size: tuple[int, int]):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        assert self.driver.stdout is not None
        port = next(line.split()[-1].rstrip(".") for line in self.driver.stdout if "successfully on port" in line)
        self.url = f"http://127.0.0.1:{port}/session"
        options: dict[str, object] = {"args": [*QUIET, f"--window-size={size[0]},{size[1]}"]}
        options |= (
            {"mobileEmulation": {"deviceMetrics": {"width": size[0], "height": size[1]}}} if size[0] < 500 else {}
        )
        asked = {"capabilities": {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}}
        self.url += f"/{self._post('', asked)['sessionId']}"

    def open(self, page: Path) -> float:
        """Seconds until the page is painted."""
        self._post("/url", {"url": "about:blank"})
        self._post("/url", {"url": page.as_uri()})
        return self._post("/execute/async", {"script": PAINTED, "args": []}) / 1e3

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        with urllib.request.urlopen(f"{self.url}/screenshot", timeout=120) as reply:
            path.write_bytes(base64.b64decode(json.load(reply)["value"]))

    def close(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"))
        self.driver.terminate()
        self.driver.wait()

    def _post(self, path: str, body: dict) -> object:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            return json.load(reply)["value"]
