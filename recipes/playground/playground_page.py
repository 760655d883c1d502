"""The page: one setting as it is, and the numbers and sentences of all others in it."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree.ElementTree import Element

from playground_charts import figure, geometry, numbers, rates_figure, sample
from playground_kinds import ARMS, CHARTS
from playground_sentences import findings, headline, result_row
from playground_table import Cell, Runs, cell_of

from poprisk_integrations.cli.report.html_tree import serialized, table, tag
from poprisk_integrations.cli.report.page_style import SCRIPT, STYLE

__all__ = ["page_of"]

HERE = Path(__file__).parent
TITLE = "Noise playground"
LISTS = {"better": "Better here", "worse": "Worse here", "unclear": "Small, or not in all seeds"}
RESULTS = (
    "new images right, end",
    "new images, best (epoch)",
    "new images, at the stop",
    "stop in epoch",
    "wrong labels learned, end",
    "wrong labels, at the stop",
    "right labels fitted, end",
    "right labels, at the stop",
)
WORDS = {0: "careful", -1: "impatient"}
INTRODUCTION = (
    "A small network learns to read digits from 800 images, and some of their labels are wrong. "
    "Choose how many, and how large a step it takes. You see what AdamW does, what the gate of "
    "PopRiskAdamW does, and where the stop, which looks at training gradients only, would have "
    "ended the run."
)
ABOUT = (
    "AdamW, steps as short: AdamW whose every step is made as long as the gate's step in the same "
    "place of its run. What it does as well, the gate does not deserve the credit for.",
    "Gate as published: Algorithm 1 of the paper; the default gate of this package is milder.",
    "The stop is the package's rule with its defaults, replayed on what was recorded, one window "
    "per epoch. Accuracy at the stop is read at the end of that epoch; a run that it does not "
    "stop counts with its last epoch.",
    "Lines are means, bands reach from the lowest to the highest seed. Better and worse here: by "
    "half a point or more in the mean, and in every seed. That is no test of significance.",
    "Where AdamW is best at the smallest rate here, a smaller one might be better still.",
    "One small task: a network with one hidden layer, wrong labels drawn evenly, constant learning "
    "rates. Nothing here speaks of large models that see each example once.",
)


def page_of(runs: Runs, noise: int | None = None, lr: float | None = None) -> str:
    """The whole page.

    Args:
        runs: From the table.
        noise: Of the setting that is shown first, per cent; by default 30, or the middle one.
        lr: Its learning rate; by default the largest.
    """
    noises, lrs = (sorted({key[place] for key in runs}) for place in (1, 2))
    if noise is None:
        noise = 30 if 30 in noises else noises[len(noises) // 2]
    lr = lrs[-1] if lr is None else lr
    epochs = len(next(iter(runs.values()))[0].open)
    data = _data(runs, noises, lrs, epochs)
    shown = data["settings"][noises.index(noise)][lrs.index(lr)]
    script = SCRIPT + (HERE / "playground.js").read_text(encoding="utf-8")
    html = tag(
        "html",
        _head(script),
        tag(
            "body",
            tag("a", "Skip to the result", class_="skip", href="#result"),
            tag(
                "header",
                tag("h1", TITLE),
                tag("button", "Dark colours", id="theme", type="button", hidden="hidden"),
                tag("p", INTRODUCTION, class_="intro"),
                tag("noscript", tag("p", "Scripts are off: the page shows this one setting.")),
            ),
            tag(
                "main",
                _controls(noises, lrs, noise, lr),
                _setting_chosen(shown),
                _charts(data, shown, noises.index(noise), lrs, lr),
                _words(shown),
                _about(len(next(iter(runs.values())))),
                id="main",
            ),
            tag("footer", tag("p", "Written by recipes/playground/make.py from results/runs.csv.")),
            tag(
                "script",
                json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
                id="data",
                type="application/json",
            ),
            tag("script", script),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{serialized(html)}\n"


def _data(runs: Runs, noises: list[int], lrs: list[float], epochs: int) -> dict[str, Any]:
    settings, lasts = [], []
    for noise in noises:
        cells = {
            (arm.arm, lr): cell_of(runs[arm.arm, noise, lr], noise) for arm in ARMS for lr in lrs
        }
        settings.append([_setting(runs, cells, noise, lr, epochs) for lr in lrs])
        lasts.append(
            [[int(10 * fmean(cells[arm.arm, lr].last) + 0.5) for lr in lrs] for arm in ARMS]
        )
    return {
        "noises": noises,
        "rates": [f"{lr:g}" for lr in lrs],
        "geometry": geometry(epochs, lrs),
        "lasts": lasts,
        "settings": settings,
    }


def _setting(
    runs: Runs, cells: Mapping[tuple[str, float], Cell], noise: int, lr: float, epochs: int
) -> dict[str, Any]:
    found = findings(cells, noise, lr, epochs)
    return {
        "name": _unbroken(f"{noise} % wrong labels, learning rate {lr:g}"),
        "headline": _unbroken(headline(cells, lr, epochs)),
        **{kind: [_unbroken(f.text) for f in found if f.kind == kind] for kind in LISTS},
        "results": [result_row(cells[arm.arm, lr], noise) for arm in ARMS],
        "arms": [numbers(runs[arm.arm, noise, lr], noise) for arm in ARMS],
    }


def _unbroken(text: str) -> str:
    """A per cent sign stays with its number."""
    return text.replace(" %", "\u00a0%")


def _head(script: str) -> Element:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    style = STYLE + (HERE / "playground.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", **{"http-equiv": "Content-Security-Policy", "content": policy}),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{TITLE}: wrong labels, a gate and a stop"),
        tag("style", style),
    )


def _controls(noises: list[int], lrs: list[float], noise: int, lr: float) -> Element:
    slider = tag(
        "input",
        id="noise",
        type="range",
        min="0",
        max=str(len(noises) - 1),
        step="1",
        value=str(noises.index(noise)),
        autocomplete="off",
        aria_valuetext=f"{noise} %",
    )
    choices = []
    for place, rate in enumerate(lrs):
        word = WORDS.get(place, WORDS.get(place - len(lrs), ""))
        button = tag("input", type="radio", name_="rate", value=str(place), autocomplete="off")
        if rate == lr:
            button.set("checked", "checked")
        label = tag("label", button, f"{rate:g}")
        if word:
            label.append(tag("span", f" {word}", class_="word"))
        choices.append(label)
    return tag(
        "section",
        tag(
            "div",
            tag("label", "Wrong labels", for_="noise"),
            slider,
            tag("output", f"{noise} %", id="share", for_="noise"),
            class_="slider",
        ),
        tag(
            "fieldset",
            tag("legend", "Learning rate"),
            *choices,
        ),
        id="controls",
        aria_label="Setting",
        hidden="hidden",
    )


def _setting_chosen(shown: Mapping[str, Any]) -> Element:
    """Read out when it changes."""
    return tag(
        "section",
        tag(
            "div",
            tag("h2", shown["name"], id="setting"),
            tag("p", shown["headline"], id="headline", class_="headline"),
            aria_live="polite",
            aria_atomic="true",
        ),
        id="result",
        tabindex="-1",
        aria_labelledby="setting",
    )


def _words(shown: Mapping[str, Any]) -> Element:
    cards = []
    for kind, heading in LISTS.items():
        items = [tag("li", text) for text in shown[kind] or ["Nothing."]]
        cards.append(tag("div", tag("h3", heading), tag("ul", *items, id=kind), class_="card"))
    rows = [[arm.name, *cells] for arm, cells in zip(ARMS, shown["results"], strict=True)]
    results = table("Mean over seeds", ["run", *RESULTS], rows)
    body = results.find(".//tbody")
    assert body is not None
    body.set("id", "results")
    return tag(
        "section",
        tag("h2", "The same in words", id="words-head"),
        tag("div", *cards, class_="cards"),
        tag("div", results, class_="card"),
        id="words",
        aria_labelledby="words-head",
    )


def _charts(
    data: Mapping[str, Any], shown: Mapping[str, Any], row: int, lrs: list[float], lr: float
) -> Element:
    epochs = data["geometry"]["epochs"]
    boxes = [
        tag(
            "label",
            tag("input", type="checkbox", value=str(place), checked="checked", autocomplete="off"),
            sample(place),
            arm.name,
        )
        for place, arm in enumerate(ARMS)
    ]
    lines = tag("fieldset", tag("legend", "Lines shown"), *boxes, id="lines", hidden="hidden")
    figures = [figure(chart, shown["arms"], epochs) for chart in CHARTS]
    figures.insert(1, rates_figure(data["lasts"][row], lrs, lrs.index(lr)))
    return tag(
        "section",
        tag("h2", "Over training", id="charts-head", class_="near"),
        lines,
        tag("div", *figures, class_="charts"),
        id="charts",
        aria_labelledby="charts-head",
    )


def _about(seeds: int) -> Element:
    return tag(
        "section",
        tag("h2", "What this is, and what it is not", id="about-head"),
        tag("ul", *(tag("li", text) for text in ABOUT)),
        tag("p", f"{seeds} seeds for each line; they change split, wrong labels, start and order."),
        id="about",
        aria_labelledby="about-head",
    )
