"""Pictures of a run's report as a phone and a desktop show it, in light and in dark, and what a browser has to say about the page.

python benchmarks/scripts/report_screenshot.py runs/first                  # -> runs/first/screenshots/report-{phone,desktop}-{light,dark}.png
python benchmarks/scripts/report_screenshot.py runs/seqft runs/gorp --out docs/img --only desktop-light --height 1250

Needs chromium or chrome on PATH, nothing of Python: it is spoken to through a pipe, in the DevTools protocol. Exit status 1 where a script ran, the console holds an error, or
the page is wider than the phone.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = (
    "no chromium on PATH. Debian, Ubuntu: apt-get install chromium; macOS: brew install chromium; or put Chrome on PATH under one of: "
    + ", ".join(BROWSERS)
)
DEVICES = {"phone": {"width": 390, "height": 844, "scale": 2, "mobile": True}, "desktop": {"width": 1200, "height": 900, "scale": 1, "mobile": False}}
SHADES = ("light", "dark")
# what is looked at besides the picture: what sticks out to the right, but for what may be scrolled in its own box
PROBE = """(() => ({
  scripts: document.scripts.length,
  width: document.documentElement.clientWidth,
  scroll: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    && !e.closest('.scroll, pre, .hidden')).map(e => e.tagName + '.' + e.className).slice(0, 5),
  text: document.body.innerText.length,
}))()"""

# the browser reads commands from its file 3 and answers on 4; first out of the way, since either may be 3 or 4 already. A shell's redirection knows no file above 9
PIPES = """import fcntl, os, sys
read, write = (fcntl.fcntl(int(f), fcntl.F_DUPFD, 10) for f in sys.argv[1:3])
os.dup2(read, 3), os.dup2(write, 4)
os.execv(sys.argv[3], sys.argv[3:])"""


def browser() -> str | None:
    """A chromium or chrome on PATH; None where there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """A headless browser with one page; `events` holds what it said unasked."""

    def __init__(self, path: str, scratch: str):
        here, there = os.pipe(), os.pipe()
        self.write, self.read = os.fdopen(here[1], "wb", buffering=0), os.fdopen(there[0], "rb", buffering=0)
        flags = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={scratch}",
            "--hide-scrollbars",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
        ]
        flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # root has no sandbox to be in
        command = [sys.executable, "-c", PIPES, str(here[0]), str(there[1]), path, *flags, "about:blank"]
        self.process = subprocess.Popen(command, pass_fds=(here[0], there[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(here[0])
        os.close(there[1])
        self.count, self.rest, self.events, self.session = 0, b"", [], None
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises RuntimeError with the browser's words where it refuses, or is gone."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        self.write.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self.next()
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not (read := self.read.read(1 << 20)):
                raise RuntimeError("the browser went away")
            self.rest += read
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path) -> None:
        """Load a page and wait until it is drawn; a dialog that a script opens is closed, and stays among the events."""
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            if self.next().get("method") == "Page.javascriptDialogOpening":
                self.ask("Page.handleJavaScriptDialog", accept=True)

    def evaluate(self, expression: str) -> Any:
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """What a page without scripts never causes: dialogs, errors on the console, anything fetched but the page itself."""
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Page.javascriptDialogOpening":
                found.append(f"a script opened a dialog: {params['message']}")
            elif method == "Runtime.exceptionThrown":
                found.append(f"an exception: {params['exceptionDetails']['text']}")
            elif method == "Runtime.consoleAPICalled":
                found.append(f"console.{params['type']}")
            elif method == "Log.entryAdded":
                found.append(f"{params['entry']['level']}: {params['entry']['text']}")
            elif method == "Network.requestWillBeSent" and params.get("type") != "Document":
                found.append(f"a request for {params['request']['url']}")
        return found


@contextlib.contextmanager
def started(path: str) -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        running = Browser(path, scratch)
        try:
            yield running
        finally:
            with contextlib.suppress(RuntimeError, OSError):
                running.session = None
                running.ask("Browser.close")
            try:
                running.process.wait(10)
            except subprocess.TimeoutExpired:
                running.process.kill()


def look(running: Browser, page: Path, device: str, shade: str, picture: Path | None, height: int | None = None) -> dict[str, Any]:
    """Show `page` on a device in a shade; its picture, of the whole page or its upper `height` pixels, goes to `picture`. Returns what PROBE and the console say."""
    shape = DEVICES[device]
    metrics = {"width": shape["width"], "height": shape["height"], "deviceScaleFactor": shape["scale"], "mobile": shape["mobile"]}
    running.ask("Emulation.setDeviceMetricsOverride", **metrics)
    running.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": shade}])
    running.open(page)
    found = running.evaluate(PROBE) | {"complaints": running.complaints()}
    if picture is not None:
        size = running.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": shape["width"], "height": min(size["height"], height or size["height"]), "scale": 1}
        shot = running.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip, optimizeForSpeed=False)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(shot["data"]))
    return found


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with a page that was looked at."""
    said = [*found["complaints"]]
    said += [f"{found['scripts']} script elements"] if found["scripts"] else []
    said += (
        [f"{found['scroll']} pixels wide on {found['width']}: {', '.join(found['wide'])}"]
        if found["scroll"] > found["width"] or found["wide"]
        else []
    )
    return said + ([] if found["text"] else ["the page is empty"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: screenshots in the first run folder")
    parser.add_argument("--only", help="one of them, such as desktop-light, written as report.png")
    parser.add_argument("--height", type=int, help="pixels from the top; default: the whole page")
    args = parser.parse_args()
    if (path := browser()) is None:
        print(f"error: {INSTALL}", file=sys.stderr)
        return 1
    from forgetless.report import write_report

    names = [f"{device}-{shade}" for device in DEVICES for shade in SHADES]
    if args.only and args.only not in names:
        parser.error(f"--only {args.only}: one of {', '.join(names)}")
    out, bad = args.out or args.runs[0] / "screenshots", 0
    with tempfile.TemporaryDirectory() as folder, started(path) as running:
        page = write_report(args.runs, Path(folder) / "report.html")
        for name in [args.only] if args.only else names:
            picture = out / ("report.png" if args.only else f"report-{name}.png")
            found = look(running, page, *name.split("-"), picture, args.height)
            said = faults(found)
            bad += bool(said)
            print(
                f"{picture}  {picture.stat().st_size // 1000} kB  {'; '.join(said) or 'no script, no console error, nothing fetched, no sideways scroll'}"
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
