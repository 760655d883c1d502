"""`poprisk report`: what it says, the page as HTML, what it writes, and what it refuses."""

import itertools
import json
import os
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from poprisk_integrations.cli.main import main
from tests.browser.made_up_run import write_dpo_run, write_lightning_run, write_stop
from tests.integration.cli.report_cases import (
    BROKEN,
    EVIL,
    GOLDENS,
    RISK,
    RUNS,
    empty_directory,
    refused,
    risk_report,
    said,
    write,
)

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Outline(HTMLParser):
    """Tags with their attributes, and texts with the names of the elements around them."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == [], "not all elements are closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
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

    def texts_of(self, *end: str) -> list[str]:
        return [text for path, text in self.texts if path[-len(end) :] == end]


@pytest.fixture(scope="module", params=RUNS)
def page(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """Name of the case, what is said, and the page."""
    with empty_directory():
        return request.param, *said(request.param)


def test_what_is_said(page: tuple[str, str, str]) -> None:
    """One of these texts would like to be a script."""
    name, text, _ = page
    assert name != "odd" or EVIL in text
    assert text == (GOLDENS / f"{name}.txt").read_text(encoding="utf-8")


def test_structure(page: tuple[str, str, str]) -> None:
    html = page[2]
    outline = Outline(html)
    assert html.startswith("<!DOCTYPE html>\n")
    assert outline.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in outline.all("meta")
    assert "width=device-width, initial-scale=1" in [a.get("content") for a in outline.all("meta")]
    once = ("header", "nav", "main", "footer", "h1", "style", "script")
    assert [len(outline.all(tag)) for tag in once] == [1] * len(once)
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [t for _, a in outline.tags for n in ("aria-labelledby", "aria-describedby")
               for t in a.get(n, "").split()]  # fmt: skip
    targets += re.findall(r"url\(#([^)]+)\)", html)
    links = [a["href"] for tag, a in outline.tags if tag in ("a", "use")]
    assert links[0] == "#main"  # the way past the navigation comes first
    assert {*targets, *(link.removeprefix("#") for link in links)} <= {*ids}


def test_charts_and_tables_can_be_read_without_eyes(page: tuple[str, str, str]) -> None:
    outline = Outline(page[2])
    charts = outline.all("svg")
    assert len(charts) == len(outline.all("figure")) > 0
    assert all(c["role"] == "img" and c["tabindex"] == "0" and c["viewbox"] for c in charts)
    titles = outline.texts_of("figure", "h3")
    assert outline.texts_of("svg", "title") == titles
    assert len(outline.texts_of("svg", "desc")) == len(charts)
    captions = [path for path, _ in outline.texts if path[-1:] == ("caption",)]
    numbers = [path for path in captions if "figure" in path]
    assert len(numbers) == len(charts)
    assert all("details" in path for path in numbers)
    boxes = [a for a in outline.all("div") if a.get("class") == "scroll"]
    assert len(boxes) == len(captions) == len(outline.all("table"))
    assert all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert all(head.get("scope") in ("col", "row") for head in outline.all("th"))


def test_nothing_is_loaded_and_one_script_may_run(page: tuple[str, str, str]) -> None:
    html = page[2]
    outline = Outline(html)
    for tag, attributes in outline.tags:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form", "image", "b")
        assert not {"src", "srcset", "data", "action", "ping", "xlink:href"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"(?i)https?:|//[a-z]|@import|expression\(|url\((?!#)", html)
    assert not re.search("[\x00-\x08\x0b-\x1f]", html)
    (policy,) = [a["content"] for a in outline.all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline'; script" in policy  # of styles, not of scripts
    assert "unsafe-eval" not in policy


def test_charts_have_colours_of_the_theme_only(page: tuple[str, str, str]) -> None:
    html = page[2]
    body = html[html.index("<body>") :]
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", body)
    for colour in {"ink", "muted", *re.findall(r"var\(--(\w+)\)", body)}:
        assert html.count(f"--{colour}:#") == 3  # light, dark by the system, dark by the button


def test_the_same_logs_make_the_same_page() -> None:
    pages = []
    for _ in range(2):
        with empty_directory():
            pages.append(said("risk_logged")[1])
    assert pages[0] == pages[1]


def test_refused_in_one_line() -> None:
    expected = (GOLDENS / "refused.txt").read_text(encoding="utf-8").splitlines()
    for name, line in zip(BROKEN, expected, strict=True):
        with empty_directory():
            assert refused(name) == f"{line}\n"
            assert sorted(p.name for p in Path("run").iterdir()) == sorted(BROKEN[name])


def names(directory: Path, *suffixes: str) -> list[str]:
    """Files with one of these endings, one of which may stand before the last."""
    return sorted(p.name for p in directory.rglob("*") if set(p.suffixes) & set(suffixes))


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_lightning_run(tmp_path / "run")
    assert main(["report", str(run)]) == 0
    assert names(run, ".png", ".html") == ["poprisk_report.html", "poprisk_report.png"]
    write_stop(run)
    assert main(["report", str(run)]) == 0  # its own files are no logs
    paths = [run / f"poprisk_{name}" for name in ("stop.png", "report.png", "report.html")]
    assert capsys.readouterr().out.splitlines()[-3:] == list(map(str, paths))
    assert all(path.stat().st_size > 20_000 for path in paths)
    for name, written in (("x.html", ["x.html", "x.png", "x_stop.png"]), ("x.png", ["x.png"])):
        out = tmp_path / name[1:] / name
        out.parent.mkdir()
        assert main(["report", str(run), "--out", str(out)]) == 0
        assert names(out.parent, ".png", ".html") == written
    other = write_lightning_run(tmp_path / "other")
    assert main(["report", str(run), str(other)]) == 0
    assert "poprisk_comparison.html" in names(run, ".html")
    assert names(other, ".png", ".html", ".tmp") == []


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_lightning_run(tmp_path / "run")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trainer_state.json").write_text("{half")
    one, out = str(run), ["--out", str(tmp_path / "x.png")]
    for arguments, complaint in (
        ([], "none given"),
        ([one, str(tmp_path / "bad")], "is not JSON"),
        ([str(tmp_path / "bad" / "trainer_state.json")], "is not JSON"),
        ([str(tmp_path / "none")], "There is no such directory"),
        ([one, f"{one}/../run"], "given twice"),
        ([one] * 9, "9 of them"),
        ([one, *out], "No poprisk_stop.json in it"),
        ([one, str(tmp_path), *out], "a .png of the stop is of one run"),
        ([one, "--out", str(tmp_path / "no" / "x.html")], "Its directory does not exist"),
        ([one, "--out", str(tmp_path / "x.pdf")], "Must end in .html"),
        ([one, "--out", str(tmp_path / "d.html")], "is a directory"),
    ):
        (tmp_path / "d.html").mkdir(exist_ok=True)
        assert main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("poprisk: Invalid ")
        assert complaint in error
        assert error.count("\n") == 1
    assert names(tmp_path, ".png", ".html", ".tmp") == ["d.html"]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_lightning_run(tmp_path / name) for name in "ab")
    report = write_stop(one)
    report["history"][0]["noise"] = float("nan")
    (one / "poprisk_stop.json").write_text(json.dumps(report))
    assert main(["report", str(one), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    report["history"][0]["noise"] = None
    assert found.items() >= report.items()
    assert found["page"] == str(one / "poprisk_report.html")
    assert found["figures"]["stop"] == "39"
    assert "Eval loss went from 1.5 to 1.75; its lowest was 1.5 at step 19." in found["sentences"]
    assert main(["report", str(one), str(two), "--json"]) == 0
    both = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [run["headline"][:7] for run in both["runs"]] == ["Stopped", "The log"]


@pytest.mark.parametrize(
    ("last", "se", "changes", "said"),
    [
        (1.4, 0.1, {}, "Yes: .* was lowest at step 20, 1 .*, and 1.4"),
        (1.1, 0.1, {"cooldown_step": 40}, "Hardly: "),
        (1.4, 0.1, {"best_model_path": None}, "It could have: "),
        (1.1, 0.1, {"best_model_path": None}, "There was nothing to save: .* within its error"),
        (0.9, 0.1, {}, "There was nothing to save: .* the last window"),
        (None, None, {}, "This log cannot tell"),
    ],
)
def test_did_it_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: float, se: float, changes: dict,
    said: str,
) -> None:  # fmt: skip
    now = {"estimated_test_loss": last, "estimated_test_loss_se": se}
    history = [*RISK[:2], {**RISK[3], **now}]
    if last is None:
        history = [{**row, **now} for row in history]
    run = write(tmp_path / "run", poprisk_stop__json=risk_report(history=history, **changes))
    assert main(["report", str(run), "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert re.match(said, answers["Did it help?"])
    assert list(answers) == ["Did it help?", "Why did it end?", "What now?"]


def test_a_run_that_was_ended_is_not_told_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page has options as code, and a value on one line with its error."""
    now = {"estimated_test_loss": 1.1, "estimated_test_loss_se": 0.1}
    for ended, advice in (
        (40, "Use the weights it ended with; a larger `patience`"),
        (None, "Train"),
    ):
        report = risk_report(
            history=[*RISK[:2], {**RISK[3], **now}], cooldown_step=ended, stopped=False
        )
        run = write(tmp_path / advice[:3], poprisk_stop__json=report)
        assert main(["report", str(run), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["answers"]["What now?"].startswith(advice)
        page = Path(found["page"]).read_text(encoding="utf-8")
        assert ("<code>patience</code>" in page) == (ended is not None)
        assert "1.1\u00a0\u00b1\u00a00.1" in page


def test_which_state_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, step, planned in (("a", 20, 100), ("a/checkpoint-9", 9, 100), ("b", 30, 30),
                                ("a/checkpoint-30", 30, 100)):  # fmt: skip
        (tmp_path / name).mkdir(exist_ok=True)
        state = {"global_step": step, "max_steps": planned, "log_history": [{"step": 1, "loss": 1}]}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    for name, line in (
        ("a", "The log ends at step 30 of 100: still running, interrupted, or ended by something"),
        ("a/checkpoint-9", "The log ends at step 9 of 100"),
        ("a/checkpoint-30/trainer_state.json", "The log ends at step 30 of 100"),
        ("b", "Ran all 30 planned steps."),
    ):
        assert main(["report", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.startswith(line)


def test_settings_that_multiply_stay_few(tmp_path: Path) -> None:
    run = write_lightning_run(tmp_path)
    lines = ["a0: &a0 {x: 1, y: 2, z: 3, v: 4, w: 5}"]
    for i in range(1, 20):
        lines.append(f"a{i}: &a{i} {{{', '.join(f'{c}: *a{i - 1}' for c in 'xyzvw')}}}")
    (run / "hparams.yaml").write_text("\n".join(lines))
    assert main(["report", str(run)]) == 0
    assert "Settings (200)" in (run / "poprisk_report.html").read_text()


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The complaint names the file that was wanted, not the temporary one."""
    run = write_lightning_run(tmp_path)
    (run / "poprisk_report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(os, "replace", full)
    assert main(["report", str(run)]) == 2
    wanted = str(run / "poprisk_report.png")
    complaint = f"poprisk: cannot write {wanted!r} (No space left on device)\n"
    assert capsys.readouterr().err == complaint
    assert (run / "poprisk_report.html").read_text() == "old"
    assert names(run, ".png", ".tmp") == []


def test_a_long_run_stays_small_and_quick(tmp_path: Path) -> None:
    """10,000 steps, all keys logged every 10. The bound on CPU time is generous."""
    run = write_dpo_run(tmp_path / "run", 10_000, 10, groups=24)
    start = time.process_time()
    assert main(["report", str(run)]) == 0
    assert time.process_time() - start < 30
    assert (run / "poprisk_report.html").stat().st_size < 3_000_000
