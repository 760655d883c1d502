"""The noise playground: its page is of its table, its table of its runs, its sentences of both."""

import base64
import csv
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from poprisk_integrations.cli.main import main
from poprisk_integrations.core import StoppingRule
from poprisk_integrations.diagnostics import GradientWindow

RECIPES = Path(__file__).parents[2] / "recipes"
FOLDER = RECIPES / "playground"
PAGE = FOLDER / "playground.html"
TABLE = FOLDER / "results" / "runs.csv"


@pytest.fixture(scope="module")
def parts():
    """The folder's modules by name, not left importable for others."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPES / "benchmarks" / "noisy_labels"))
        patch.syspath_prepend(str(RECIPES / "benchmarks"))
        patch.syspath_prepend(str(FOLDER))
        names = [path.stem for path in FOLDER.glob("playground_*.py")]
        names += ["noisy_labels_task", "gate_harness.arms", "gate_harness.training"]
        names += ["gate_harness.stacked_adam", "gate_harness.tasks"]
        yield SimpleNamespace(
            **{name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        )
    for name in set(sys.modules) - before:
        if str(RECIPES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def runs(parts):
    return parts.playground_table.read_runs(TABLE)


def row_of(**wanted):
    with TABLE.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.items() >= wanted.items()]


def data_of(html):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html)[1])


def make(*arguments):
    done = subprocess.run(
        [sys.executable, FOLDER / "make.py", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_page_is_what_the_table_makes(parts, runs):
    assert parts.playground_page.page_of(runs) == PAGE.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_loads_nothing():
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"\b(src|srcset|@import|url\()=?[\"'(]?(?!#)[a-z]+:", text)
    assert re.findall(r"url\(([^)]*)\)", text)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert '<section id="controls" aria-label="Setting" hidden="hidden">' in text  # without scripts
    assert "<noscript><p>Scripts are off" in text


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


def test_quick_form_is_resumed_and_its_page_is_of_its_table(parts, tmp_path):
    first = make("--quick", "--out", tmp_path)
    assert first.count(" members, ") == 8
    page = (tmp_path / "playground.html").read_bytes()
    again = make("--quick", "--out", tmp_path)
    assert " members, " not in again
    assert (tmp_path / "playground.html").read_bytes() == page
    table = tmp_path / "results" / "runs.csv"
    quick_runs = parts.playground_table.read_runs(table)
    assert parts.playground_page.page_of(quick_runs).encode() == page
    with table.open() as quick, TABLE.open() as full:
        assert quick.readline() == full.readline()


def test_windows_are_those_of_the_package(parts):
    """Two members, gradients that are pure noise in some coordinates and constant zero in one."""
    sizes, steps = [6, 4], 10
    generator = torch.Generator().manual_seed(3)
    grads = torch.randn(3 * steps, 2, 10, generator=generator)
    grads[..., :3] += torch.tensor([1.0, 0.5, 3.0])
    grads[..., 9] = 0.0
    arm = parts.arms.ARMS["AdamW"]
    watched = parts.playground_windows.WatchedAdam(
        arm, sizes, torch.tensor([0.1, 0.1]), torch.zeros(2), [0, 1], window=steps
    )
    plain = parts.stacked_adam.StackedAdam(
        arm, sizes, torch.tensor([0.1, 0.1]), torch.zeros(2), [0, 1]
    )
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


def test_the_replay_is_the_rule_fed_step_by_step(parts):
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
        found = parts.playground_stop.stop_step(lr, length, ratios, errors, noises)
        assert found == expected, case
        stops.append((expected, len(onsets - {None}) > 1))
    assert any(stop is not None and stop % length for stop, _ in stops)
    assert any(again for _, again in stops)


def test_a_signal_that_returns_at_the_very_step_of_the_stop_wins(parts):
    """Onset at 17.5 steps, so the stop is due at step 35; two windows above 1.3 end there too."""
    for last, expected in ((1.2, 35), (2.0, None)):
        ratios = [3.0, 2.0, 0.9999, 2.0, last]
        assert parts.playground_stop.stop_step(0.01, 7, ratios, [0.0] * 5, [1.0] * 5) == expected


@pytest.mark.parametrize("seed", [0, 3])
def test_a_run_by_itself_stops_where_the_table_says(parts, runs, seed):
    """torch's own AdamW, one network, window and rule live, to the end of the epoch of the stop."""
    expected = runs["AdamW", 30, 0.01][seed]
    drawn = parts.noisy_labels_task.draw("digits 30%", seed)
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


def cell(parts, last, stopped=None, best=None, stops=(), learned=50.0, best_epoch=4):
    """A made-up cell of two seeds."""
    return parts.playground_table.Cell(
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


def cells_of(parts, *, adam, gate, short, paper, adam_small, **more):
    small = cell(parts, adam_small)
    return {
        ("AdamW", 0.01): cell(parts, adam, **more),
        ("soft-32", 0.01): cell(parts, gate),
        ("norm(soft-32)", 0.01): cell(parts, short),
        ("paper", 0.01): cell(parts, paper),
        **{(arm, 0.001): small for arm in ("AdamW", "soft-32", "norm(soft-32)", "paper")},
    }


def said(parts, cells, noise=20):
    found = parts.playground_sentences.findings(cells, noise, 0.01, 60)
    return [(finding.kind, finding.text) for finding in found]


def test_sentences_where_the_gate_gains(parts):
    cells = cells_of(
        parts,
        adam=[70.0, 72.0],
        gate=[80.0, 81.0],
        short=[77.0, 80.0],
        paper=[60.0, 60.0],
        adam_small=[90.0, 91.0],
        stopped=[86.0, 88.0],
        best=[90.0, 89.0],
        stops=(3, 4),
    )
    found = said(parts, cells)
    assert found[0] == (
        "better",
        "At the last epoch the gate is 9.5 points above AdamW. It has learned 50 % of the wrong "
        "labels by heart, AdamW 50 %.",
    )
    assert found[1] == (
        "better",
        "AdamW with steps as short as the gate's ends at 78.5 %: the gate is 2.0 points above it. "
        "Of the gate's 9.5 points over AdamW, the shorter step makes 7.5.",
    )
    assert found[2] == (
        "worse",
        "A smaller learning rate alone, 0.001, takes AdamW to 90.5 % at the last epoch. The gate "
        "at 0.01 is 10.0 points below that.",
    )
    assert found[3][0] == "unclear"
    assert "gate 90.5 % (0.001), AdamW 90.5 % (0.001)" in found[3][1]
    assert found[5] == (
        "better",
        "The stop ends AdamW in epochs 3 to 4, at 87.0 %. That is 16.0 points above its last "
        "epoch, and 2.5 below its best one, which nobody knows without clean labels. By then 3 % "
        "of the wrong labels are learned, at the end 50 %.",
    )
    assert found[6] == ("unclear", "The stop lets the gate's run go on to epoch 60 in all seeds.")
    assert found[7][0] == "worse"
    assert found[7][1].startswith("The gate as published ends at 60.0 %, 11.0 points below AdamW.")
    headline = parts.playground_sentences.headline(cells, 0.01, 60)
    assert headline == (
        "AdamW ends with 71.0 % of new images right, the gate with 80.5 %. The stop would have "
        "ended AdamW in epoch 4, at 87.0 %; its best epoch, 4, had 89.5 %. At learning rate 0.001 "
        "AdamW ends with 90.5 %."
    )


def test_sentences_where_gate_and_stop_lose(parts):
    cells = cells_of(
        parts,
        adam=[95.0, 96.0],
        gate=[90.0, 95.8],
        short=[94.0, 93.0],
        paper=[97.0, 97.0],
        adam_small=[80.0, 80.0],
        stopped=[92.0, 90.0],
        stops=(2,),
    )
    found = said(parts, cells, noise=0)
    assert found[0] == ("worse", "At the last epoch the gate is 2.6 points below AdamW.")
    assert found[1][0] == "unclear"
    assert found[1][1].endswith("the gate is 0.6 points below it on average, in 1 of 2 seeds.")
    assert "(0.01), AdamW 95.5 % (0.01)" in found[2][1]  # the chosen rate is the best: no other
    assert found[4][0] == "worse"
    assert found[4][1].startswith("The stop ends AdamW in epoch 2 in 1 of 2 seeds, at 91.0 %.")
    assert "wrong labels" not in " ".join(text for _, text in found)
    assert found[6][0] == "better"
    headline = parts.playground_sentences.headline(cells, 0.01, 60)
    assert headline.endswith(
        "The stop ends 1 of 2 runs of AdamW before epoch 60; its best epoch, 4, had 95.5 %."
    )


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
def test_who_is_ahead(parts, ours, theirs, kind, words):
    found = parts.playground_sentences.compare(ours, theirs)
    assert (found.kind, found.against("it")) == (kind, words)


def test_a_cell_sums_up_its_runs(parts):
    Run = parts.playground_table.Run
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
    found = parts.playground_table.cell_of(runs, 30)
    assert found.last == [80.0, 90.0, 60.0]
    assert found.stopped == [90.0, 90.0, 60.0]
    assert (found.best_epoch, found.best) == (1, [90.0, 70.0, 95.0])
    assert (found.stop_epochs, found.middle_stop) == ([1, 2], 2)
    assert (found.learned, found.learned_stopped) == (30.0, pytest.approx(70 / 3))
    assert parts.playground_sentences.result_row(found, 30)[3] == "1 to 2, 1 never"
    never = parts.playground_table.cell_of([runs[1]] * 3, 0)
    assert never.middle_stop is None
    assert parts.playground_sentences.result_row(never, 0)[3:6] == ["never", "-", "-"]


def test_poprisk_report_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--playground"]) == 0
    assert capsys.readouterr().out == "poprisk_playground.html\n"
    assert (tmp_path / "poprisk_playground.html").read_bytes() == PAGE.read_bytes()
    assert main(["report", "--playground", "--out", "x.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"page": "x.html"}
    assert (tmp_path / "x.html").read_bytes() == PAGE.read_bytes()
    for arguments, words in (
        (["--playground", "run"], "Leave RUN_DIR out"),
        (["--playground", "--out", "x.png"], "is an .html page"),
        (["--playground", "--out", "no/x.html"], "does not exist"),
        ([], "Name a run, or give --playground"),
    ):
        assert main(["report", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["poprisk_playground.html", "x.html"]
    empty = tmp_path / "recipes"
    empty.mkdir()
    monkeypatch.setattr("poprisk_integrations.cli.commands.report.recipes_root", lambda: empty)
    assert main(["report", "--playground"]) == 2
    assert "no playground at" in capsys.readouterr().err
