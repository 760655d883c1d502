"""Recipes of the stop: one line added to a script, the run ends, the picture is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from poprisk_integrations.cli.main import main

RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*-stop-*/train.py"))
CALLBACKS = {"lightning": "PopRiskEarlyStopping()", "trainer": "PopRiskEarlyStoppingCallback()"}


def test_both_were_found():
    assert NAMES == ["lightning-stop-noisy-digits", "trainer-stop-noisy-digits"]
    index = (RECIPES / "README.md").read_text()
    assert all(f"[{name}]({name})" in index for name in NAMES)
    assert all((RECIPES / name / "poprisk_stop.png").stat().st_size > 5000 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_run_stops_and_shows_why(name, tmp_path, capsys):
    script = RECIPES / name / "train.py"
    assert script.read_text().count(CALLBACKS[name.partition("-")[0]]) == 1
    done = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "run"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "stopped at epoch" in done.stdout
    report = json.loads((tmp_path / "run" / "poprisk_stop.json").read_text())
    assert report["stopped"]
    assert report["stop_step"] < 20 * 38  # of 100 epochs
    assert list(tmp_path.glob("run/**/*.ckpt")) or list(tmp_path.glob("run/checkpoint-*"))
    assert main(["report", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stopped at step")
    assert (tmp_path / "run" / "poprisk_stop.png").stat().st_size > 20_000
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No poprisk_stop.json in it"),
        ("{half", "is not JSON"),
        ("[1, 2]", "is not a report of a stop"),
        ('{"history": [7], "reason": "x"}', "is not a report of a stop"),
        ('{"history": [], "reason": "no window is complete yet"}', "has no window to show"),
    ],
)
def test_bad_directories_get_one_line(content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / "poprisk_stop.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.glob("*.png"))


def test_windows_without_numbers_can_be_drawn(tmp_path):
    rows = [{"step": 8, "signal_ratio": None}, {"step": 16, "signal_ratio": 1.5}]
    (tmp_path / "poprisk_stop.json").write_text(json.dumps({"history": rows, "reason": "armed"}))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").stat().st_size > 5000
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "x.png")]) == 2
