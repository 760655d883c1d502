"""Recipes of the stop: one line added to a script, the run ends, the picture is there."""

import json
import re
from pathlib import Path

import pytest

from poprisk_integrations.cli.main import main
from tests.helpers.recipe_script import load_script
from tests.integration.lightning import toy

pytestmark = [*toy.third_party_warnings, pytest.mark.usefixtures("one_thread")]
RECIPES = Path(__file__).parents[3] / "recipes"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*-stop-*/train.py"))
CALLBACKS = {"lightning": "PopRiskEarlyStopping()", "trainer": "PopRiskEarlyStoppingCallback()"}


def test_both_were_found():
    assert NAMES == ["lightning-stop-noisy-digits", "trainer-stop-noisy-digits"]
    index = (RECIPES / "README.md").read_text()
    assert all(f"[{name}]({name})" in index for name in NAMES)
    assert all((RECIPES / name / "poprisk_stop.png").stat().st_size > 5000 for name in NAMES)


@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize("name", NAMES)
def test_the_run_stops_and_shows_why(name, tmp_path, monkeypatch, capsys):
    text = (RECIPES / name / "train.py").read_text()
    assert text.count(CALLBACKS[name.partition("-")[0]]) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--out", "run"])
    load_script(name).main()
    printed = capsys.readouterr().out
    assert "stopped at epoch" in printed
    report = json.loads((tmp_path / "run" / "poprisk_stop.json").read_text())
    assert report["stopped"]
    assert report["best_step"] < report["stop_step"] < 40 * 38  # of 100 epochs
    assert report["stop_step"] == report["cooldown_step"] < report["global_step"]
    assert list(tmp_path.glob("run/**/*.ckpt")) or list(tmp_path.glob("run/*.safetensors"))
    assert main(["report", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("at step")
    # Seed 0, as the README has it; 77 to 80 % without the stop.
    accuracy = float(re.findall(r"([0-9.]+)% of clean images right", printed)[0])
    assert accuracy > 92.0
    assert (tmp_path / "run" / "poprisk_stop.png").stat().st_size > 20_000
    assert not list(tmp_path.rglob("*.tmp*"))


def test_the_estimate_beside_the_truth(tmp_path, monkeypatch, capsys):
    """The truth is measured on images that are not trained on, at the middle of each window."""
    script = load_script("trainer-stop-noisy-digits", "against_truth.py")
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "x.png"), "--epochs", "5"])
    script.main()
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("loss: mean error")]
    assert float(line.split()[3].rstrip(";")) < 0.2  # from 2.3 nats to about 1.6
    assert (tmp_path / "x.png").stat().st_size > 20_000
