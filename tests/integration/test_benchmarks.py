"""Every benchmark runs in its quick form; committed results belong to the present script."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
NEEDS_GPU = ["optimizer_step_gpu"]
FOLDERS = sorted({p.parent.name for p in BENCHMARKS.glob("*/bench.py")} - set(NEEDS_GPU))


def header(table):
    return table.read_text().splitlines()[0]


def test_all_were_found():
    assert FOLDERS == [
        "default_gate",
        "dpo_step_cost",
        "early_stopping",
        "fsdp2_step",
        "grokking",
        "inr",
        "monitor_cost",
        "noise_rate_coverage",
        "noisy_dpo",
        "noisy_dpo_demo",
        "noisy_labels",
        "open_fraction",
        "optimizer_step",
        "pinn",
        "risk_estimate",
        "small_lm",
        "sparse_signal",
        "stop_cost",
        "stop_digits",
        "where_it_hurts",
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "noisy_dpo_demo" else n for n in FOLDERS],
)
def test_quick_form_runs(name, tmp_path):
    flags = ["--seeds", "1"] if name == "noisy_dpo_demo" else []
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name / "bench.py", "--quick", "--out", tmp_path, *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (table,) = tmp_path.glob("*.csv")
    assert table.with_suffix(".png").stat().st_size > 5000
    committed = [header(path) for path in (BENCHMARKS / name / "results").glob("2*.csv")]
    assert header(table) in committed


@pytest.mark.parametrize("name", FOLDERS)
def test_results_are_committed_with_a_plot_and_a_rule(name):
    tables = list((BENCHMARKS / name / "results").glob("2*.csv"))
    assert tables
    assert all(table.with_suffix(".png").exists() for table in tables)
    assert "Decision rule" in (BENCHMARKS / name / "README.md").read_text()


@pytest.mark.parametrize("name", NEEDS_GPU)
def test_without_a_device_it_says_so(name, tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / name / "bench.py", "--quick", "--out", tmp_path],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "not run: no CUDA device"
    assert not list(tmp_path.iterdir())
    assert "Decision rule" in (BENCHMARKS / name / "README.md").read_text()
