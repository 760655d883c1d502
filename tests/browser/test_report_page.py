"""The report's page in a browser: no error, both themes, a phone's width, keyboard, axe."""

import re
from collections.abc import Callable

import pytest

from poprisk_integrations.cli.report.charts import sections_of
from poprisk_integrations.cli.report.page import page_of
from poprisk_integrations.cli.report.sources import load_runs
from tests.browser.chromium import (
    NEEDS_AXE,
    NEEDS_CHROMIUM,
    Loaded,
    probed,
    with_axe,
    with_probe,
)
from tests.browser.made_up_run import write_dpo_run, write_flips, write_lightning_run

pytestmark = NEEDS_CHROMIUM
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two runs, one of which would like to run scripts."""
    root = tmp_path_factory.mktemp("runs")
    dpo = write_dpo_run(root / "gate", 400, 4)
    write_flips(dpo / "flip_report.csv", [EVIL, *(f"pair-{i}" for i in range(30))])
    runs = load_runs([dpo, write_lightning_run(root / f"x{EVIL.replace('/', '')}")])
    return page_of(runs, sections_of(runs))


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
    found = probed(opened(with_probe(page, _PROBE), width=width, dark=dark))
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


@NEEDS_AXE
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)], ids=["light", "dark"])
def test_axe(page: str, opened: Callable[..., Loaded], width: int, dark: bool) -> None:
    found = probed(opened(with_axe(page), width=width, dark=dark))
    assert {"color-contrast", "scrollable-region-focusable", "svg-img-alt"} <= {*found["passes"]}
    assert found["violations"] == []
