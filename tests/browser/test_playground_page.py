"""The noise playground in a browser: every setting, both themes, a phone's width, axe."""

import json
import math
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.chromium import (
    NEEDS_AXE,
    NEEDS_CHROMIUM,
    Loaded,
    probed,
    screenshot,
    with_axe,
    with_probe,
)

pytestmark = NEEDS_CHROMIUM
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
const marks = [0, 1, 2, 3].map(i => document.getElementById("accuracy-m" + i) !== null);
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


@pytest.fixture(scope="module")
def html() -> str:
    return PAGE.read_text(encoding="utf-8")


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
    broken = html.replace('id="signal-rows"', 'id="signal-gone"')
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


def test_lines_are_where_their_numbers_are(html: str, opened: Callable[..., Loaded]) -> None:
    """All settings differ; first and last point of a line, and a mark, by hand; and back again."""
    data = data_of(html)
    row, last = data["noises"].index(30), len(data["rates"]) - 1
    tour = f"""const before = shown(); const seen = new Set();
    for (let i = 0; i < {len(data["noises"])}; i++) {{
      for (let j = 0; j <= {last}; j++) {{ choose(i, j); seen.add(shown()[1]); }} }}
    choose({row}, {last}); const after = shown();
    const at = (id, name) => document.getElementById(id).getAttribute(name);
    report({{count: seen.size, equal: before.map((part, i) => part === after[i]),
      line: at("accuracy-l0", "d"), band: at("wrong-b3", "d"), mark: at("accuracy-m0", "transform"),
      signal: at("signal-l1", "d"), said: document.getElementById("accuracy-desc").textContent,
      cells: [...document.querySelectorAll("#accuracy-rows tr:last-child td")].map(
        e => e.textContent)}});"""
    found = probed(opened(with_probe(html, _CHOOSE, tour)))
    assert found["count"] == len(data["noises"]) * (last + 1)
    assert found["equal"] == [True, True, True]

    def points(path: str) -> list[list[float]]:
        return [[float(x) for x in pair.split(",")] for pair in path.strip("MZ").split("L")]

    arms = data["settings"][row][last]["arms"]
    means = arms[0]["accuracy"][0]  # from 40 % at the bottom, 158, to 100 % at the top, 8
    ends = [[40, 8 + 150 * (1000 - means[0]) / 600], [338, 8 + 150 * (1000 - means[-1]) / 600]]
    line = points(found["line"])
    assert [line[0], line[-1]] == [pytest.approx(end, abs=0.06) for end in ends]
    middle, below, above = arms[3]["wrong"]
    band = points(found["band"])
    assert band[-1][1] == pytest.approx(8 + 150 * (1000 - middle[0] + below[0]) / 1000, abs=0.06)
    assert band[0][1] == pytest.approx(8 + 150 * (1000 - middle[0] - above[0]) / 1000, abs=0.06)
    epoch, share = arms[0]["stop"][:2]
    x = 40 + 298 * math.sqrt(epoch / data["epochs"])
    mark = found["mark"].removeprefix("translate(").rstrip(")")
    assert points(mark) == [pytest.approx([x, 8 + 150 * (1000 - share) / 600], abs=0.06)]
    height = 8 + 150 * math.log2(1600 / arms[1]["signal"][0][0]) / 6
    assert points(found["signal"])[0][1] == pytest.approx(height, abs=0.06)
    assert f"{means[-1] / 10:.1f} % in epoch 60." in found["said"]
    assert found["cells"][0].startswith(f"{means[-1] / 10:.1f} % (")


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


@NEEDS_AXE
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)], ids=["light", "dark"])
def test_axe(html: str, opened: Callable[..., Loaded], width: int, dark: bool) -> None:
    found = probed(opened(with_axe(html), width=width, dark=dark))
    assert {"color-contrast", "label", "svg-img-alt"} <= {*found["passes"]}
    assert found["violations"] == []
