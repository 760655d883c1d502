"""The report's page in a browser: no error, both themes, a phone's width, keyboard, axe."""

import html as html_text
import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poprisk_integrations.cli.report.page import page_of
from poprisk_integrations.cli.report.run import load_runs
from poprisk_integrations.cli.report.sections import sections_of
from tests.browser.chromium import Loaded, find_chromium, load, with_probe
from tests.browser.made_up_run import write_dpo_run, write_flips, write_lightning_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium found"),
]
AXE = os.environ.get("AXE_CORE")
EVIL = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"

_PROBE = """
const scheme = () => getComputedStyle(document.body).backgroundColor;
const button = document.getElementById("theme"), first = document.querySelector("a");
const root = document.documentElement;
const found = {width: root.scrollWidth, room: innerWidth, title: document.title};
found.overflowing = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
  && !e.closest("svg") && !e.closest(".skip") && e.getBoundingClientRect().right > innerWidth + 1
  && e.getBoundingClientRect().width > 0).map(e => e.tagName);
found.columns = new Set([...document.querySelectorAll("figure")].map(
  e => Math.round(e.getBoundingClientRect().left))).size;
const text = document.querySelector("svg text"), box = document.querySelector("svg");
found.font = parseFloat(getComputedStyle(text).fontSize)
  * box.clientWidth / box.viewBox.baseVal.width;
found.hidden = button.hidden; found.label = button.textContent; found.before = scheme();
found.line = getComputedStyle(document.querySelector("svg path[style*='--s0']")).stroke;
button.click(); found.after = scheme(); found.labelAfter = button.textContent;
button.click(); found.again = scheme();
const order = [...document.querySelectorAll("a,button,summary,[tabindex='0']")];
found.order = order.slice(0, 3).map(e => e.className || e.id || e.tagName);
found.invisible = order.filter(e => { if (!e.checkVisibility()) return false;
  e.focus({focusVisible: true}); const style = getComputedStyle(e);
  return document.activeElement !== e || style.outlineStyle === "none"; }).map(e => e.outerHTML);
first.focus(); found.skip = first.getBoundingClientRect().left >= 0;
report(found);
"""
_RUN_AXE = """
axe.run(document, {resultTypes: ["violations"]}).then(result => {
  report({passes: result.passes.map(rule => rule.id),
    violations: result.violations.map(v => [v.impact, v.id, v.nodes[0].html])});
});
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs, one of which would like to run scripts."""
    root = tmp_path_factory.mktemp("runs")
    dpo = write_dpo_run(root / "gate", 400, 4)
    write_flips(dpo / "flip_report.csv", [EVIL, *(f"pair-{i}" for i in range(30))])
    runs = load_runs([dpo, write_lightning_run(root / f"x{EVIL.replace('/', '')}")])
    return page_of(runs, sections_of(runs))


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Loaded]:
    count = itertools.count()

    def open_page(html: str, **options: Any) -> Loaded:
        name = f"page-{next(count)}"
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        return load(tmp_path / f"{name}.html", tmp_path / name, **options)

    return open_page


def probed(loaded: Loaded) -> dict[str, Any]:
    found = re.search(r'data-probe="([^"]*)"', loaded.html)
    assert found is not None, loaded.complaints
    value: dict[str, Any] = json.loads(html_text.unescape(found[1]))
    return value


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_error_and_nothing_refused(page: str, opened: Callable[..., Loaded], dark: bool) -> None:
    loaded = opened(page, dark=dark)
    assert loaded.complaints == []
    button = re.search(r"<button[^>]*>([^<]*)", loaded.html)
    assert button is not None
    assert button[1] == ("Light colours" if dark else "Dark colours")
    assert "hidden" not in button[0]
    assert "<title>taken" not in loaded.html


def test_errors_would_be_seen(page: str, opened: Callable[..., Loaded]) -> None:
    assert len(opened(with_probe(page, "undefinedName()")).complaints) == 1
    refused = page.replace("</body>", "<script>1</script><img src='https://x.invalid/y'></body>")
    assert len(opened(refused).complaints) == 2


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["desktop", "phone"])
def test_layout_theme_and_keyboard(
    page: str, opened: Callable[..., Loaded], width: int, dark: bool
) -> None:
    loaded = opened(with_probe(page, _PROBE), width=width, dark=dark)
    assert loaded.complaints == []
    found = probed(loaded)
    assert found["room"] == width
    assert found["width"] <= width
    assert found["overflowing"] == []
    assert found["columns"] == (1 if width < 700 else 3)
    assert found["font"] > 8.5
    assert found["title"].startswith("Training report: gate and x<script>")
    light, night = "rgb(246, 247, 249)", "rgb(15, 19, 23)"
    assert found["before"] == (night if dark else light)
    assert found["after"] == (light if dark else night)
    assert found["again"] == found["before"]
    assert found["line"] == ("rgb(111, 180, 255)" if dark else "rgb(11, 96, 168)")
    assert not found["hidden"]
    assert {found["label"], found["labelAfter"]} == {"Light colours", "Dark colours"}
    assert found["order"] == ["skip", "theme", "A"]
    assert found["invisible"] == []
    assert found["skip"]


@pytest.mark.skipif(AXE is None, reason="AXE_CORE, the path of axe.min.js, is not set")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["light", "dark"])
def test_axe(page: str, opened: Callable[..., Loaded], width: int, dark: bool) -> None:
    assert AXE is not None
    axe = Path(AXE).read_text(encoding="utf-8").replace("</script", "<\\/script")
    opened_details = page.replace("<details>", "<details open>")
    found = probed(opened(with_probe(opened_details, axe, _RUN_AXE), width=width, dark=dark))
    assert {"color-contrast", "scrollable-region-focusable", "svg-img-alt"} <= {*found["passes"]}
    assert found["violations"] == []
