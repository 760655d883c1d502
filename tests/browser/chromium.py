"""A page in a real browser, without a driver: what it becomes, and what it complains of."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Loaded", "find_chromium", "load", "with_probe"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=5000",
)
_NARROWEST = 500  # window of a headless Chromium; below, the page stands in a frame
_FRAME = """<!DOCTYPE html><html lang="en"><title>frame</title>
<style>:root{color-scheme:light dark}body{margin:0}iframe{border:0}</style>
<body><iframe src="SOURCE" width="WIDTH" height="844"></iframe>
<script>addEventListener("message", e => { document.body.dataset.probe = e.data; });</script>"""
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Loaded:
    """A page after its scripts have run.

    Attributes:
        html: The document.
        complaints: Errors and refusals that the browser's console shows.
    """

    html: str
    complaints: list[str]


def find_chromium() -> str | None:
    """The browser's path, or None."""
    return next((path for path in map(shutil.which, _NAMES) if path is not None), None)


def load(page: Path, profile: Path, *, width: int = 1280, dark: bool = False) -> Loaded:
    """Open a file and wait for its scripts.

    Args:
        page: The file.
        profile: An empty directory.
        width: Of the window, CSS pixels.
        dark: Whether the system asks for dark colours.
    """
    if width < _NARROWEST:
        frame = page.with_name(f"{page.stem}-frame.html")
        source = _FRAME.replace("SOURCE", page.name).replace("WIDTH", str(width))
        frame.write_text(source, encoding="utf-8")
        page = frame
    browser = find_chromium()
    assert browser is not None
    done = subprocess.run(
        [
            browser,
            *_OPTIONS,
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--window-size={max(width, _NARROWEST)},844",
            f"--user-data-dir={profile}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stderr.splitlines()
    return Loaded(done.stdout, [line for line in lines if ":CONSOLE" in line])


def with_probe(html: str, *scripts: str) -> str:
    """The page without its policy, which forbids it, and with scripts at its end.

    What a script gives to `report` is the attribute `data-probe` of the body in `Loaded.html`.
    """
    assert _POLICY.search(html)
    report = """function report(found) {
      const text = JSON.stringify(found);
      document.body.dataset.probe = text;
      if (parent !== window) { parent.postMessage(text, "*"); }
    }"""
    added = "".join(f"<script>{script}</script>" for script in (report, *scripts))
    return _POLICY.sub("", html).replace("</body>", f"{added}</body>")
