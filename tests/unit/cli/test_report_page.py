"""The page by a checker that knows HTML and nothing of ours: complete, safe, named, in order."""

import csv
import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from poprisk_integrations.cli.report.page import page_of
from poprisk_integrations.cli.report.run import load_runs
from poprisk_integrations.cli.report.sections import sections_of
from tests.browser.made_up_run import write_dpo_run, write_flips, write_lightning_run

EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Outline(HTMLParser):
    """What a page holds.

    Attributes:
        tags: Each tag with its attributes, in order.
        texts: (names of the open elements, text).
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "not all elements are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in {tag}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self._open), data))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, *inside: str) -> str:
        return " ".join(t for path, t in self.texts if set(inside) <= set(path))


def page(*directories: Path) -> str:
    runs = load_runs(directories)
    return page_of(runs, sections_of(runs))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("runs")
    dpo = write_dpo_run(root / "gate", 400, 4)
    other = write_dpo_run(root / "plain & <b>bold", 300, 3, seed=1)
    return {
        "dpo": page(dpo),
        "lightning": page(write_lightning_run(root / "digits")),
        "two": page(dpo, other),
    }


@pytest.fixture(params=["dpo", "lightning", "two"])
def html(request: pytest.FixtureRequest, pages: dict[str, str]) -> str:
    return pages[request.param]


def test_structure(html: str) -> None:
    outline = Outline(html)
    assert html.startswith("<!DOCTYPE html>\n")
    assert outline.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in outline.all("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in outline.all(
        "meta"
    )
    for landmark in ("header", "nav", "main", "footer", "h1", "title", "style"):
        # a chart has a title too
        found = [a for a in outline.all(landmark) if "id" not in a or landmark == "main"]
        assert len(found) == 1, landmark
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
        for value in attributes.values():
            for target in re.findall(r"url\(#([^)]+)\)", value):
                assert target in ids
    links = [a["href"] for tag, a in outline.tags if tag in ("a", "use")]
    assert links[0] == "#main"  # the way past the navigation comes first
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_every_chart_has_a_name_a_description_and_its_numbers(html: str) -> None:
    outline = Outline(html)
    charts = outline.all("svg")
    assert len(charts) >= 5
    assert len(outline.all("figure")) == len(charts)
    assert not outline.all("img")
    for chart in charts:
        assert chart["role"] == "img"
        assert chart["tabindex"] == "0"
        assert "viewbox" in chart
    descriptions = [t for path, t in outline.texts if path[-2:] == ("svg", "desc")]
    titles = [t for path, t in outline.texts if path[-2:] == ("svg", "title")]
    assert len(descriptions) == len(titles) == len(charts)
    assert all("over optimizer steps." in d or "Histogram." in d for d in descriptions)
    in_figures = [
        path for path, _ in outline.texts if path[-1:] == ("caption",) and "figure" in path
    ]
    assert len(in_figures) == len(charts)
    assert all("details" in path for path in in_figures)


def test_tables_have_captions_heads_and_a_box_to_scroll_in(html: str) -> None:
    outline = Outline(html)
    tables = outline.all("table")
    assert len(tables) == len(outline.all("caption"))
    assert all(head.get("scope") in ("col", "row") for head in outline.all("th"))
    boxes = [a for a in outline.all("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(tables)
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)


def test_nothing_is_loaded_and_one_script_may_run(html: str) -> None:
    outline = Outline(html)
    for tag, attributes in outline.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form", "image")
        assert not {"src", "srcset", "data", "action", "ping", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"(?i)https?:|//[a-z]|@import|expression\(", html)
    assert not re.search(r"url\((?!#)", html)
    assert len(outline.all("script")) == 1
    (policy,) = [a["content"] for a in outline.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline'; script" in policy  # of styles, not of scripts
    assert "unsafe-eval" not in policy


def test_charts_have_colours_of_the_theme_only(html: str) -> None:
    body = html[html.index("<body>") :]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", body)
    for colour in set(re.findall(r"var\(--(\w+)\)", body)):
        assert html.count(f"--{colour}:#") == 3  # light, dark by the system, dark by the button
    assert re.search(r"fill: ?var\(--ink\)|fill: ?var\(--muted\)", body)


def test_sections(pages: dict[str, str]) -> None:
    heads = [t for path, t in Outline(pages["dpo"]).texts if path[-1:] == ("h2",)]
    assert heads == [
        "What happened",
        "Loss and learning rate",
        "Signal and noise",
        "Gate",
        "Preferences and wrong labels",
        "Other logged values",
        "Settings and versions",
    ]
    text = Outline(pages["dpo"]).text("main")
    assert "Stopped early at step 400 of 500." in text
    assert "It is not the KL divergence" in text
    assert "95 % interval 15.0 to 26.0 %" in text
    assert "Never changed: skipped_nonfinite = 0" in text.replace("poprisk/", "")
    titles = [t for path, t in Outline(pages["dpo"]).texts if path[-1:] == ("h3",)]
    for title in (
        "Loss",
        "Learning rate",
        "How far batches agree (F)",
        "Open fraction",
        "Mean gate",
        "Update norm, gated / ungated",
        "Why coordinates are closed",
        "Open fraction by parameter group",
        "Reward accuracy",
        "Reward margins",
        "Drift on the data (kl_data)",
        "Estimated noise rate",
    ):
        assert title in titles, title
    assert "labels" not in [a.get("id") for a in Outline(pages["lightning"]).all("section")]


def test_suspect_pairs(pages: dict[str, str]) -> None:
    start = pages["dpo"].index("The 20 most suspect pairs</caption>")
    rows = re.findall(
        r"<tr>(.*?)</tr>", pages["dpo"][start : pages["dpo"].index("</table>", start)]
    )
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0] == ["pair", "probability wrong", "margin", "action", "swapped on purpose"]
    assert cells[1] == ["pair-0", "0.990", "-2", "swap", "yes"]
    assert len(cells) == 21


def test_two_runs_share_their_charts(pages: dict[str, str]) -> None:
    outline = Outline(pages["two"])
    text = outline.text("main")
    assert "The runs beside each other" in text
    loss = next(t for path, t in outline.texts if path[-2:] == ("svg", "desc"))
    assert "gate, train: 100 points" in loss
    assert "plain & <b>bold, eval: 10 points" in loss
    assert "Stop of run 2 at step 300" in loss
    assert not outline.all("b")
    assert "differs" in text  # settings


@pytest.mark.parametrize("name", ["column", "pair", "report", "settings", "card"])
def test_text_of_files_comes_out_as_text(name: str, tmp_path: Path) -> None:
    write_lightning_run(tmp_path)
    if name == "column":
        quoted = EVIL.replace('"', '""')
        (tmp_path / "metrics.csv").write_text(f'step,"{quoted}"\n1,2\n2,3\n')
    elif name == "pair":
        write_flips(tmp_path / "flip_report.csv", [EVIL.replace('"', "'"), "b", "c"])
    elif name == "report":
        report = {
            "reason": EVIL,
            "history": [{"step": 8}],
            "diagnosis": EVIL,
            "settings": {EVIL: 1},
        }
        (tmp_path / "poprisk_stop.json").write_text(json.dumps(report))
    elif name == "settings":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": EVIL}))
    else:
        (tmp_path / "README.md").write_text(f"## Framework versions\n\n- {EVIL}: {EVIL}\n")
    html = page(tmp_path)
    outline = Outline(html)
    assert len(outline.all("script")) == 1
    assert not outline.all("img")
    assert "<script>document" not in html
    assert "<script>document" in outline.text("body").replace("\ufffd", "")


def test_characters_that_break_pages(tmp_path: Path) -> None:
    rows = [
        {"step": s, "a\x00\x1b\ud800]]>-->": s, "$x^{$ \\frac{": 1 / s, "\U0001f600": s}
        for s in (1, 2)
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    html = page(tmp_path)
    html.encode("utf-8")
    assert "$x^{$ \\frac{" in Outline(html).text("main")
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)


def test_the_same_logs_make_the_same_page(tmp_path: Path) -> None:
    write_lightning_run(tmp_path)
    assert page(tmp_path) == page(tmp_path)


def labels_page(tmp_path: Path, rows: list[list[object]], noise: dict[str, object]) -> str:
    header = ["pair_id", "row", "probability_wrong", "margin", "step", "action", "prompt"]
    header += ["chosen", "rejected", "calibrated"]
    with (tmp_path / "flip_report.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    (tmp_path / "poprisk_noise.json").write_text(json.dumps(noise))
    return page(tmp_path)


def test_suspects_have_texts_a_histogram_and_a_next_step(tmp_path: Path) -> None:
    rows = [
        ["a", 0, 0.97, -2.0, 3, "swap", "Is it?", "<b>Yes", "No", "True"],
        ["b", 1, 0.2, 1.0, 3, "keep", "", "", "", "True"],
        ["c", 2, "", 0.0, 0, "not_judged", "", "", "", "True"],
    ]
    noise = {"rate": 0.44, "low": 0.38, "high": 0.49, "num_pairs": 2, "loss": "off"}
    html = labels_page(tmp_path, rows, noise | {"rate_in_use": 0.35})
    text = Outline(html).text("main")
    for part in (
        "Is it?",
        "<b>Yes",
        "1 not_judged",
        "2 of them judged",
        "1 of them with a negative",
    ):
        assert part in text, part
    assert "<b>Yes" not in html
    assert "leave out the surest: poprisk flips" in text
    assert 'id="margins0-title"' in html
    # One number: the cap of losses that are not in use is not said.
    assert "44.0 %" in text
    assert "noise rate 0.35" not in text


def test_a_ranking_is_not_called_a_probability(tmp_path: Path) -> None:
    rows = [["a", 0, 0.6, -2.0, 3, "review", "", "", "", "False"],
            ["b", 1, 0.2, 1.0, 3, "keep", "", "", "", "False"]]  # fmt: skip
    noise = {"rate": None, "low": 0.0, "high": 0.41, "num_pairs": 2, "loss": "off"}
    text = Outline(labels_page(tmp_path, rows, noise)).text("main")
    assert "The margins do not tell how many labels are wrong: 0.0 to 41.0 %" in text
    assert "is a ranking and no probability" in text
    assert "wrong labels expected" not in text
    assert "double_annotation_rate" in text


def test_a_capped_rate_in_use_is_explained(tmp_path: Path) -> None:
    rows = [["a", 0, 0.6, -2.0, 3, "drop", "", "", "", "True"]]
    noise = {"rate": 0.44, "low": 0.38, "high": 0.49, "num_pairs": 1, "loss": "rdpo"}
    text = Outline(labels_page(tmp_path, rows, noise | {"rate_in_use": 0.35})).text("main")
    assert "Loss mode: rdpo, with noise rate 0.35 (no larger one is used" in text
