"""The noise playground in a browser: every setting, both themes, a phone's width, axe."""

import html as html_text
import itertools
import json
import os
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import Loaded, find_chromium, load, with_probe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="no chromium found"),
]
AXE = os.environ.get("AXE_CORE")
PAGE = Path(__file__).parents[2] / "recipes" / "playground" / "playground.html"

_CHOOSE = """
const slider = document.getElementById("noise");
const choose = (row, rate) => {
  slider.value = row; slider.dispatchEvent(new Event("input"));
  document.querySelectorAll("input[name=rate]")[rate].click();
};
const shown = () => ["result", "charts", "words"].map(id => document.getElementById(id).innerHTML);
"""
_CONTROLS = """
const text = id => document.getElementById(id).textContent;
const seen = [];
const note = () => seen.push([text("setting"), text("headline"), text("share"),
  slider.getAttribute("aria-valuetext"),
  document.getElementById("accuracy-l0").getAttribute("d").slice(0, 60)]);
note();
slider.stepDown(); slider.dispatchEvent(new Event("input")); note();
slider.stepUp(); slider.dispatchEvent(new Event("input")); note();
document.querySelectorAll("input[name=rate]")[0].click(); note();
const marks = [0, 1, 2, 3].map(
  i => document.getElementById("accuracy-m" + i).checkVisibility({visibilityProperty: true}));
const line = document.getElementById("wrong-l1");
const box = document.querySelectorAll("#lines input")[1];
const visible = [line.checkVisibility()]; box.click(); visible.push(line.checkVisibility());
box.click(); visible.push(line.checkVisibility());
const live = document.getElementById("headline").closest("[aria-live]");
const rates = [...document.querySelectorAll("input[name=rate]")];
report({seen, visible, marks, live: live.getAttribute("aria-live"), min: slider.min,
  max: slider.max, label: slider.labels[0].textContent,
  rates: rates.map(e => e.labels[0].textContent)});
"""
_LAYOUT = """
const root = document.documentElement;
const found = {width: root.scrollWidth, room: innerWidth};
found.overflowing = [...document.querySelectorAll("body *")].filter(e => !e.closest(".scroll")
  && !e.closest("svg") && !e.closest(".skip") && e.getBoundingClientRect().width > 0
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80));
const box = document.querySelector("svg.chart"), text = box.querySelector("text");
found.font = parseFloat(getComputedStyle(text).fontSize) * box.clientWidth / 350;
found.clashes = [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const all = [...svg.querySelectorAll("text")].map(e => e.getBoundingClientRect());
  return all.flatMap((a, i) => all.slice(i + 1).filter(b => a.left < b.right && b.left < a.right
    && a.top < b.bottom && b.top < a.bottom).map(b => svg.querySelector("title").textContent));
});
found.back = getComputedStyle(document.body).backgroundColor;
found.line = getComputedStyle(document.getElementById("accuracy-l0")).stroke;
found.dashes = [0, 1, 2, 3].map(
  i => getComputedStyle(document.getElementById("accuracy-l" + i)).strokeDasharray);
found.columns = new Set([...document.querySelectorAll("figure")].map(
  e => Math.round(e.getBoundingClientRect().left))).size;
const order = [...document.querySelectorAll("a,button,summary,input,[tabindex='0']")].filter(
  e => e.checkVisibility());
found.unfocused = order.filter(e => { e.focus({focusVisible: true});
  return document.activeElement !== e || getComputedStyle(e).outlineStyle === "none"; })
  .map(e => e.outerHTML.slice(0, 80));
scrollTo(0, 1e5);
const bar = document.getElementById("controls").getBoundingClientRect();
found.bar = [bar.top, bar.height];
report(found);
"""
_RUN_AXE = """
axe.run(document, {resultTypes: ["violations"]}).then(result => {
  report({passes: result.passes.map(rule => rule.id),
    violations: result.violations.map(v => [v.impact, v.id, v.nodes[0].html])});
});
"""


@pytest.fixture(scope="module")
def html() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Loaded]:
    count = itertools.count()

    def open_page(html: str, **options: Any) -> Loaded:
        name = f"page-{next(count)}"
        (tmp_path / f"{name}.html").write_text(html, encoding="utf-8")
        return load(tmp_path / f"{name}.html", tmp_path / name, **options)

    return open_page


def probed(loaded: Loaded) -> Any:
    assert loaded.complaints == []
    found = re.search(r'data-probe="([^"]*)"', loaded.html)
    assert found is not None
    return json.loads(html_text.unescape(found[1]))


def data_of(html: str) -> Any:
    found = re.search(r'<script id="data"[^>]*>(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_no_error_and_nothing_refused(html: str, opened: Callable[..., Loaded], dark: bool) -> None:
    loaded = opened(html, dark=dark)
    assert loaded.complaints == []
    controls = re.search(r'<section id="controls"[^>]*>', loaded.html)
    assert controls is not None
    assert "hidden" not in controls[0]


def test_errors_would_be_seen(html: str, opened: Callable[..., Loaded]) -> None:
    assert len(opened(html.replace('id="signal-desc"', 'id="signal-gone"')).complaints) == 0
    broken = with_probe(
        html.replace('id="signal-desc"', 'id="signal-gone"'), _CHOOSE, "choose(0, 0)"
    )
    assert len(opened(broken).complaints) >= 1


def test_controls_change_the_text_and_the_lines(html: str, opened: Callable[..., Loaded]) -> None:
    data = data_of(html)
    found = probed(opened(with_probe(html, _CHOOSE, _CONTROLS)))
    first, less, again, small = found["seen"]
    assert first == again
    row, last = data["noises"].index(30), len(data["rates"]) - 1
    for seen, (noise, rate) in ((first, (row, last)), (less, (row - 1, last)), (small, (row, 0))):
        setting = data["settings"][noise][rate]
        assert seen[:2] == [setting["name"], setting["headline"]]
        assert seen[2] == seen[3] == f"{data['noises'][noise]} %"
    assert len({seen[4] for seen in (first, less, small)}) == 3
    assert found["visible"] == [True, False, True]
    stops = [arm["stop"] for arm in data["settings"][row][0]["arms"]]
    assert found["marks"] == [stop is not None for stop in stops]
    assert None in stops
    assert found["live"] == "polite"
    assert (found["min"], found["max"]) == ("0", str(len(data["noises"]) - 1))
    assert found["label"] == "Wrong labels"
    assert [label.split()[0] for label in found["rates"]] == data["rates"]


def test_the_script_draws_what_python_draws(html: str, opened: Callable[..., Loaded]) -> None:
    """All settings and back: the first must be there again to the letter, drawn by the script."""
    data = data_of(html)
    row, last = data["noises"].index(30), len(data["rates"]) - 1
    tour = f"""const before = shown(); let same = 0;
    for (let i = 0; i < {len(data["noises"])}; i++) {{
      for (let j = 0; j <= {last}; j++) {{ choose(i, j); same += shown()[1] === before[1]; }} }}
    choose({row}, {last}); const after = shown();
    report({{same, equal: before.map((part, i) => part === after[i])}});"""
    found = probed(opened(with_probe(html, _CHOOSE, tour)))
    assert found == {"same": 1, "equal": [True, True, True]}


@pytest.mark.parametrize(
    ("width", "dark"),
    [(1280, False), (1280, True), (360, False), (360, True)],
    ids=["desktop-light", "desktop-dark", "phone-light", "phone-dark"],
)
def test_layout_keyboard_and_picture(
    html: str, opened: Callable[..., Loaded], tmp_path: Path, width: int, dark: bool
) -> None:
    found = probed(opened(with_probe(html, _LAYOUT), width=width, dark=dark))
    assert found["room"] == width
    assert found["width"] <= width
    assert found["overflowing"] == []
    assert found["clashes"] == []
    assert found["font"] > 8.5
    assert found["columns"] == (1 if width < 700 else 3)
    assert found["back"] == ("rgb(15, 19, 23)" if dark else "rgb(246, 247, 249)")
    assert found["line"] == ("rgb(111, 180, 255)" if dark else "rgb(11, 96, 168)")
    assert len(set(found["dashes"])) == 4
    assert found["unfocused"] == []
    assert found["bar"][0] < 1  # stays in sight
    assert found["bar"][1] < 120
    picture = tmp_path / "page.png"
    screenshot(PAGE, picture, tmp_path / "profile", dark)
    content = picture.read_bytes()
    assert struct.unpack(">II", content[16:24]) == (1280, 2000)
    assert len(content) > 50_000


def screenshot(page: Path, out: Path, profile: Path, dark: bool) -> None:
    browser = find_chromium()
    assert browser is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    options += ["--virtual-time-budget=3000", "--window-size=1280,2000", f"--screenshot={out}"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    options += [f"--user-data-dir={profile}", page.as_uri()]
    subprocess.run([browser, *options], capture_output=True, timeout=120, check=True)


@pytest.mark.skipif(AXE is None, reason="AXE_CORE, the path of axe.min.js, is not set")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["light", "dark"])
def test_axe(html: str, opened: Callable[..., Loaded], width: int, dark: bool) -> None:
    assert AXE is not None
    axe = Path(AXE).read_text(encoding="utf-8").replace("</script", "<\\/script")
    unfolded = html.replace("<details>", "<details open>")
    found = probed(opened(with_probe(unfolded, axe, _RUN_AXE), width=width, dark=dark))
    assert {"color-contrast", "label", "svg-img-alt"} <= {*found["passes"]}
    assert found["violations"] == []
