"""A page in a real browser, without a driver: what it becomes, and what it complains of."""

import html as html_text
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "NEEDS_AXE",
    "NEEDS_CHROMIUM",
    "Loaded",
    "load",
    "probed",
    "screenshot",
    "with_axe",
    "with_probe",
]

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
_AXE = os.environ.get("AXE_CORE")
_RUN_AXE = """
axe.run(document, {resultTypes: ["violations"]}).then(result => {
  report({passes: result.passes.map(rule => rule.id),
    violations: result.violations.map(v => [v.impact, v.id, v.nodes[0].html])});
});
"""
_CHROMIUM = next((path for path in map(shutil.which, _NAMES) if path is not None), None)
NEEDS_CHROMIUM = [
    pytest.mark.slow,
    pytest.mark.skipif(_CHROMIUM is None, reason="no chromium found"),
]
NEEDS_AXE = pytest.mark.skipif(_AXE is None, reason="AXE_CORE, the path of axe.min.js, is not set")


@dataclass(frozen=True)
class Loaded:
    """A page after its scripts have run."""

    html: str
    complaints: list[str]  # errors and refusals that the browser's console shows


def load(page: Path, profile: Path, *, width: int = 1280, dark: bool = False) -> Loaded:
    """Open a file and wait for its scripts; `profile` is an empty directory."""
    if width < _NARROWEST:
        frame = page.with_name(f"{page.stem}-frame.html")
        source = _FRAME.replace("SOURCE", page.name).replace("WIDTH", str(width))
        frame.write_text(source, encoding="utf-8")
        page = frame
    size = f"--window-size={max(width, _NARROWEST)},844"
    done = _browse(page, profile, dark, size, "--dump-dom")
    lines = done.stderr.splitlines()
    return Loaded(done.stdout, [line for line in lines if ":CONSOLE" in line])


def screenshot(page: Path, out: Path, profile: Path, dark: bool) -> None:
    """The upper 2000 points of a page as a PNG."""
    _browse(page, profile, dark, "--window-size=1280,2000", f"--screenshot={out}")


def _browse(
    page: Path, profile: Path, dark: bool, *options: str
) -> "subprocess.CompletedProcess[str]":
    assert _CHROMIUM is not None
    options = (*options, f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    return subprocess.run(
        [_CHROMIUM, *_OPTIONS, *options, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


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


def with_axe(html: str) -> str:
    """The page with all of it unfolded, and at its end a report of what axe finds."""
    assert _AXE is not None
    axe = Path(_AXE).read_text(encoding="utf-8").replace("</script", "<\\/script")
    return with_probe(html.replace("<details>", "<details open>"), axe, _RUN_AXE)


def probed(loaded: Loaded) -> Any:
    """What a script gave to `report`, on a page that complains of nothing."""
    assert loaded.complaints == []
    found = re.search(r'data-probe="([^"]*)"', loaded.html)
    assert found is not None
    return json.loads(html_text.unescape(found[1]))
