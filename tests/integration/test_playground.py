"""The noise playground: its page is of its table, its table of its runs, its sentences of both."""

import base64
import csv
import hashlib
import html
import json
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from benchmarks.harness.arms import ARMS
from benchmarks.harness.stacked_adam import StackedAdam
from benchmarks.noisy_labels import study
from playground import sentences
from playground.__main__ import main as make
from playground.page import page_of
from playground.runs import WatchedAdam
from playground.table import Cell, Run, cell_of, read_runs, stop_step
from torch import nn

from poprisk_integrations.cli.main import main
from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDER = RECIPES / "playground"
PAGE = FOLDER / "playground.html"
TABLE = FOLDER / "results" / "runs.csv"


@pytest.fixture(scope="module")
def runs():
    return read_runs(TABLE)


def row_of(**wanted):
    with TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.items() >= wanted.items()]


def data_of(page):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page)[1])


def drawn_apart(page):
    """The page, and its picture: other versions of matplotlib draw other pixels."""
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    return page.replace(picture, ""), base64.b64decode(picture)


def test_the_page_is_what_the_table_makes(runs):
    made, found = (page_of(runs), PAGE.read_text(encoding="utf-8"))
    assert drawn_apart(made)[0] == drawn_apart(found)[0]
    assert all(drawn_apart(page)[1].startswith(b"\x89PNG") for page in (made, found))


def test_the_page_is_one_file_that_loads_nothing():
    text, _ = drawn_apart(PAGE.read_text(encoding="utf-8"))
    assert PAGE.stat().st_size < 1_000_000
    assert "http" not in text.replace("http-equiv", "")
    assert re.findall(r"\b(?:src|srcset|@import|url\()=?[\"'(]?(?!#)[a-z]+:[^\"]*", text) == [
        'src="data:image/png;base64,'
    ]
    script = re.findall(r"<script>(.*?)</script>", text, re.S)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html.unescape(text)
    # Without scripts: one setting in words, and its charts as a picture.
    for section in ('"controls" aria-label="Setting"', '"charts" aria-labelledby="charts-head"'):
        assert f'<section id={section} hidden="hidden">' in text
    assert "<noscript><p>Scripts are off" in text
    assert '<noscript><p><img class="picture"' in text
    assert "AdamW ends with 73.8\u00a0% of new images right" in text


def test_the_numbers_on_the_page_are_those_of_the_runs():
    """By hand from the table, for one setting."""
    data = data_of(PAGE.read_text(encoding="utf-8"))
    place = data["noises"].index(40), data["rates"].index("0.003")
    setting = data["settings"][place[0]][place[1]]
    for index, arm in enumerate(("AdamW", "soft-32", "norm(soft-32)", "paper")):
        rows = row_of(arm=arm, noise="40", lr="0.003")
        assert [row["seed"] for row in rows] == ["0", "1", "2", "3", "4"]
        for name, chart in (("fitted_wrong", "wrong"), ("accuracy", "accuracy"), ("open", "open")):
            values = [[int(v) for v in row[name].split()] for row in rows]
            for at in (0, 7, -1):
                column = [v[at] for v in values]
                mean, below, above = (part[at] for part in setting["arms"][index][chart])
                assert mean == pytest.approx(fmean(column), abs=0.51)
                assert (mean - below, mean + above) == (min(column), max(column))
        last = fmean(int(row["accuracy"].split()[-1]) for row in rows)
        assert setting["results"][index][0] == f"{last / 10:.1f} %"
        assert data["lasts"][place[0]][index][place[1]] == pytest.approx(last, abs=0.51)
    assert data["settings"][0][0]["results"][0][4] == "-"  # no wrong labels to learn


def test_figures_of_the_readme():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    data = data_of(PAGE.read_text(encoding="utf-8"))
    lasts = dict(zip(data["noises"], data["lasts"], strict=True))
    rows = re.findall(r"^\| (\d+) % \| ([\d. |]+) \|$", text, re.M)
    assert [int(noise) for noise, _ in rows] == [0, 10, 20, 30, 40, 50]
    for noise, cells in rows:
        shown = [f"{value / 10:.1f}" for arm in lasts[int(noise)][:3] for value in arm]
        assert cells.split(" | ") == shown
    noisy = [found for noise, found in lasts.items() if noise]
    for rate, points in zip((3, 2, 1, 0), ("+4.8", "+6.6", "+1.5", "-1.2"), strict=True):
        mean = fmean(gate[rate] - adam[rate] for adam, gate, *_ in noisy) / 10
        assert f"{mean:+.1f}" == points
        assert f"{points} " in text
    tuned = [round((max(gate) - max(adam)) / 10, 1) for adam, gate, *_ in lasts.values()]
    assert (min(tuned), max(tuned)) == (-0.4, 0.5)


def test_quick_form_is_resumed_and_its_page_is_of_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["playground", "--quick", "--out", str(tmp_path)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of the other tests too
    make()
    assert capsys.readouterr().out.count(" members, ") == 8
    page = (tmp_path / "playground.html").read_bytes()
    make()
    assert " members, " not in capsys.readouterr().out
    assert (tmp_path / "playground.html").read_bytes() == page
    table = tmp_path / "results" / "runs.csv"
    quick_runs = read_runs(table)
    assert page_of(quick_runs).encode() == page
    with table.open() as quick, TABLE.open() as full:
        assert quick.readline().startswith(full.readline().rstrip())


def test_windows_are_those_of_the_package():
    """Two members, gradients that are pure noise in some coordinates and constant zero in one."""
    sizes, steps = [6, 4], 10
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(3 * steps, 2, 10, generator=generator)
    grads[..., :3] += torch.tensor([1.0, 0.5, 3.0])
    grads[..., 9] = 0.0
    arm = ARMS["AdamW"]
    watched = WatchedAdam(
        arm, sizes, torch.tensor([0.1, 0.1]), torch.zeros(2), [0, 1], window=steps
    )
    plain = StackedAdam(arm, sizes, torch.tensor([0.1, 0.1]), torch.zeros(2), [0, 1])
    theta, other = torch.zeros(2, 10), torch.zeros(2, 10)
    for grad in grads:
        watched.step(theta, grad)
        plain.step(other, grad)
    assert torch.equal(theta, other)  # it only looks
    found = watched.arrays()
    assert found["window_ratio"].shape == (3, 2)
    for member in range(2):
        params = [nn.Parameter(torch.zeros(size)) for size in sizes]
        window = GradientWindow(steps, accumulator="exact")
        results = []
        for grad in grads[:, member]:
            for param, part in zip(params, grad.split(sizes), strict=True):
                param.grad = part.clone()
            window.add(params)
            if window.is_full:
                results.append(window.close())
        for index, result in enumerate(results):
            assert found["window_ratio"][index, member] == pytest.approx(result.ratio, rel=1e-5)
            assert found["window_ratio_se"][index, member] == pytest.approx(
                result.ratio_se, rel=1e-5
            )
            assert found["window_noise_sum"][index, member] == pytest.approx(
                float(result.noise.sum()), rel=1e-5
            )


def test_the_replay_is_the_rule_fed_step_by_step():
    """Also where the onset is forgotten, and where no window ever armed it."""
    generator = torch.Generator().manual_seed(0)
    lr, length, stops = 0.01, 7, []
    for case in range(150):
        start = 0.4 + 3 * float(torch.rand((), generator=generator))
        jumps = 0.5 * torch.randn(30, generator=generator)
        fall = torch.linspace(0, -1.2, 30)
        ratios = (torch.tensor(start).log() + fall + jumps).exp().tolist()
        errors = (0.2 * torch.rand(30, generator=generator)).tolist()
        noises = torch.rand(30, generator=generator).tolist()
        rule, expected, onsets = StoppingRule(), None, set()
        for step in range(1, 30 * length + 1):
            at, more = step // length - 1, step % length
            window = {"ratio": ratios[at], "ratio_se": errors[at], "noise": noises[at]}
            decision = rule.update(
                step=step, lr=lr, **({"reused": at > 0, **window} if more == 0 else {})
            )
            onsets.add(rule.state.onset_step)
            if decision.stop:
                expected = step
                break
        found = stop_step(lr, length, ratios, errors, noises)
        assert found == expected, case
        stops.append((expected, len(onsets - {None}) > 1))
    assert any(stop is not None and stop % length for stop, _ in stops)
    assert any(again for _, again in stops)


def test_a_signal_that_returns_at_the_very_step_of_the_stop_wins():
    """Onset at 17.5 steps, so the stop is due at step 35; two windows above 1.3 end there too."""
    for last, expected in ((1.2, 35), (2.0, None)):
        ratios = [3.0, 2.0, 0.9999, 2.0, last]
        assert stop_step(0.01, 7, ratios, [0.0] * 5, [1.0] * 5) == expected


@pytest.mark.parametrize("seed", [0, 3])
def test_a_run_by_itself_stops_where_the_table_says(runs, seed):
    """torch's own AdamW, one network, window and rule live, to the end of the epoch of the stop."""
    expected = runs["AdamW", 30, 0.01][seed]
    drawn = study.draw("digits 30%", seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    order_of = torch.Generator().manual_seed(40_000 + seed)
    window, rule, stop, step = GradientWindow(25), StoppingRule(), None, 0
    while stop is None or step % 25:
        if step % 25 == 0:
            order = torch.randperm(800, generator=order_of)
        rows = order[step % 25 * 32 :][:32]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(drawn.x[rows]), drawn.y[rows]).backward()
        window.add(model.parameters())
        optimizer.step()
        step += 1
        closed = window.close() if window.is_full else None
        seen = {}
        if closed is not None:
            seen = {"ratio": closed.ratio, "ratio_se": closed.ratio_se}
            seen |= {"noise": float(closed.noise.sum()), "reused": step > 25}
        if rule.update(step=step, lr=0.01, **seen).stop and stop is None:
            stop = step
        assert step < 500
    assert -(-stop // 25) == expected.stop_epoch
    with torch.no_grad():
        right = (model(drawn.test_x).argmax(-1) == drawn.test_y).float().mean()
    assert 1000 * float(right) == pytest.approx(expected.at_stop("accuracy"), abs=10)


def cell(last, stopped=None, best=None, stops=(), learned=50.0, best_epoch=4):
    """A made-up cell of two seeds."""
    return Cell(
        last=last,
        stopped=stopped or last,
        best=best or last,
        best_epoch=best_epoch,
        stop_epochs=stops,
        learned=learned,
        learned_stopped=3.0,
        fitted=97.0,
        fitted_stopped=90.0,
    )


def cells_of(*, adam, gate, short, paper, adam_small, **more):
    small = cell(adam_small)
    return {
        ("AdamW", 0.01): cell(adam, **more),
        ("soft-32", 0.01): cell(gate),
        ("norm(soft-32)", 0.01): cell(short),
        ("paper", 0.01): cell(paper),
        **{(arm, 0.001): small for arm in ("AdamW", "soft-32", "norm(soft-32)", "paper")},
    }


def said(cells, noise=20):
    found = sentences.findings(cells, noise, 0.01, 60)
    return [(finding.kind, finding.text) for finding in found]


GAINS = {
    "adam": [70.0, 72.0], "gate": [80.0, 81.0], "short": [77.0, 80.0], "paper": [60.0, 60.0],
    "adam_small": [90.0, 91.0], "stopped": [86.0, 88.0], "best": [90.0, 89.0], "stops": (3, 4),
}  # fmt: skip
LOSES = {
    "adam": [95.0, 96.0], "gate": [90.0, 95.8], "short": [94.0, 93.0], "paper": [97.0, 97.0],
    "adam_small": [80.0, 80.0], "stopped": [92.0, 90.0], "stops": (2,),
}  # fmt: skip
# The kind of each sentence, and what it says.
SAID = {
    "gains": (GAINS, 20, [
        ("better", "the gate is 9.5 points above AdamW. It has learned 50 % of the wrong labels"),
        ("better", "ends at 78.5 %: the gate is 2.0 points above it. Of the gate's 9.5 points over "
         "AdamW, the shorter step makes 7.5."),
        ("worse", "A smaller learning rate alone, 0.001, takes AdamW to 90.5 % at the last epoch. "
         "The gate at 0.01 is 10.0 points below that."),
        ("unclear", "gate 90.5 % (0.001), AdamW 90.5 % (0.001)"),
        ("worse", "The gate is 9.0 points below AdamW"),
        ("better", "The stop ends AdamW in epochs 3 to 4, at 87.0 %. That is 16.0 points above its "
         "last epoch, and 2.5 below its best one, which nobody knows without clean labels. By then "
         "3 % of the wrong labels are learned, at the end 50 %."),
        ("unclear", "The stop lets the gate's run go on to epoch 60 in all seeds."),
        ("worse", "The gate as published ends at 60.0 %, 11.0 points below AdamW."),
    ], "The stop would have ended AdamW in epoch 4, at 87.0 %; its best epoch, 4, had 89.5 %. At "
       "learning rate 0.001 AdamW ends with 90.5 %."),
    "loses": (LOSES, 0, [
        ("worse", "At the last epoch the gate is 2.6 points below AdamW."),
        ("unclear", "the gate is 0.6 points below it on average, in 1 of 2 seeds."),
        ("worse", "(0.01), AdamW 95.5 % (0.01)"),  # the chosen rate is the best: no other
        ("worse", "The gate is 2.6 points below AdamW"),
        ("worse", "The stop ends AdamW in epoch 2 in 1 of 2 seeds, at 91.0 %."),
        ("unclear", "The stop lets the gate's run go on"),
        ("better", "The gate as published ends at 97.0 %"),
    ], "The stop ends 1 of 2 runs of AdamW before epoch 60; its best epoch, 4, had 95.5 %."),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_sentences(case):
    numbers, noise, expected, headline = SAID[case]
    cells = cells_of(**numbers)
    found = said(cells, noise=noise)
    for (kind, text), (expected_kind, words) in zip(found, expected, strict=True):
        assert (kind, words) == (expected_kind, words if words in text else text)
    assert sentences.headline(cells, 0.01, 60).endswith(headline)
    assert ("wrong labels" in " ".join(text for _, text in found)) is (noise > 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "words"),
    [
        ([91.0, 93.0], [90.0, 90.0], "better", "2.0 points above it"),
        ([91.0, 89.0], [92.0, 92.0], "worse", "2.0 points below it"),
        ([95.0, 89.0], [90.0, 90.0], "unclear", "2.0 points above it on average, in 1 of 2 seeds"),
        ([90.0, 92.0], [90.0, 90.0], "unclear", "1.0 points above it on average, in 1 of 2 seeds"),
        ([90.4, 90.4], [90.0, 90.0], "unclear", "level with it (+0.4 points)"),
        ([89.98, 90.0], [90.0, 90.0], "unclear", "level with it (+0.0 points)"),
    ],
)
def test_who_is_ahead(ours, theirs, kind, words):
    found = sentences.compare(ours, theirs)
    assert (found.kind, found.against("it")) == (kind, words)


def test_a_cell_sums_up_its_runs():
    shapes = [([100, 900, 800], 1), ([100, 700, 900], None), ([100, 950, 600], 2)]
    runs = [
        Run(
            accuracy=values,
            fitted_right=values,
            fitted_wrong=[0, 100, 300],
            open=[800, 500],
            ratio=[2.0, 0.5],
            stop_epoch=stop,
        )
        for values, stop in shapes
    ]
    found = cell_of(runs, 30)
    assert found.last == [80.0, 90.0, 60.0]
    assert found.stopped == [90.0, 90.0, 60.0]
    assert (found.best_epoch, found.best) == (1, [90.0, 70.0, 95.0])
    assert (found.stop_epochs, found.middle_stop) == ([1, 2], 2)
    assert (found.learned, found.learned_stopped) == (30.0, pytest.approx(70 / 3))
    assert sentences.result_row(found, 30)[3] == "1 to 2, 1 never"
    never = cell_of([runs[1]] * 3, 0)
    assert never.middle_stop is None
    assert sentences.result_row(never, 0)[3:6] == ["never", "-", "-"]


def test_poprisk_report_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--playground"]) == 0
    assert capsys.readouterr().out == "poprisk_playground.html\n"
    assert (tmp_path / "poprisk_playground.html").read_bytes() == PAGE.read_bytes()
    assert main(["report", "--playground", "--out", "x.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "x.html"}
    assert (tmp_path / "x.html").read_bytes() == PAGE.read_bytes()
    for arguments, words in (
        (["--playground", "--out", "no/x.html"], "does not exist"),
        ([], "Name a run, or give --playground"),
    ):
        assert main(["report", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poprisk_playground.html", "x.html"]
    empty = tmp_path / "recipes"
    empty.mkdir()
    monkeypatch.setattr("poprisk_integrations.cli.report.command.recipes_root", lambda: empty)
    assert main(["report", "--playground"]) == 2
    assert "no playground at" in capsys.readouterr().err
