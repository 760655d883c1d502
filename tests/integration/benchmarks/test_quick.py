"""Every study runs in its quick form; committed results belong to the present code."""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks.harness import gate_study
from benchmarks.harness.provenance import BENCHMARKS, PROVENANCE, hardware, read_csv
from benchmarks.noisy_labels import study as noisy
from benchmarks.sparse_signal import study as sparse

LONG = ("dpo_step_cost", "fsdp2_step", "learning_rate", "monitor_cost", "noisy_dpo_demo",
        "open_fraction", "optimizer_step", "small_lm")  # fmt: skip
PARTS = (("cleaned_pairs", "ranking"), ("cleaned_pairs", "structured"),
         ("optimizer_step", "sources"), ("optimizer_step", "llama"),
         ("optimizer_step", "compile_time"), ("stop_cost", "sit_out"),
         ("stop_digits", "window_length"))  # fmt: skip
BY_THEMSELVES = (*LONG, "noise_rate_coverage")  # a process, or several, each
FROZEN = ("early_stopping", "grokking", "inr", "noisy_dpo", "pinn", "risk_estimate")
STUDIES = command.studies()


def columns(path):
    """Of a table, without what made it."""
    return [name for name in path.read_text().splitlines()[0].split(",") if name not in PROVENANCE]


def run(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=BENCHMARKS.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return done.returncode, done.stderr[-3000:]


def known(thing):
    """Whether git has this object."""
    line = ["git", "-C", str(BENCHMARKS), "cat-file", "-e", thing]
    return subprocess.run(line, capture_output=True).returncode == 0


def test_all_studies_were_found():
    assert command.studies() == [
        "cleaned_pairs",
        "default_gate",
        "dpo_defaults",
        "dpo_step_cost",
        "fsdp2_step",
        "learning_rate",
        "monitor_cost",
        "noise_rate_coverage",
        "noisy_dpo_demo",
        "noisy_labels",
        "open_fraction",
        "optimizer_step",
        "ordinary_use",
        "reservoir",
        "small_lm",
        "sparse_signal",
        "stop_cost",
        "stop_digits",
        "where_it_hurts",
    ]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in STUDIES],
)
@pytest.mark.filterwarnings("default")  # of the libraries that are measured
def test_quick_form_runs(name, tmp_path, monkeypatch):
    words = [name, "--quick", "--out", str(tmp_path)]
    if name in BY_THEMSELVES:
        status, error = run("-m", "benchmarks", *words)
        assert status == 0, error
    else:  # the libraries are imported once for all
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        before = torch.get_num_threads()
        command.main()
        torch.set_num_threads(before)
    (table,) = tmp_path.glob("2*.csv")  # the others, which sum it up, begin with a word
    assert table.with_suffix(".png").stat().st_size > 5000
    results = (BENCHMARKS / name / "results").glob("2*.csv")
    assert columns(table) in [columns(path) for path in results]


@pytest.mark.parametrize(
    ("study", "task", "more"),
    [
        (noisy.STUDY, noisy.NoisyLabelsTask, ["fitted", "rates_breast_cancer", "rates_digits"]),
        (sparse.STUDY, sparse.SparseSignalTask, ["rates_linear", "rates_net", "weights"]),
    ],
    ids=["noisy_labels", "sparse_signal"],
)
def test_a_whole_report_has_all_tables_and_pictures(study, task, more, tmp_path, monkeypatch):
    arms = ("AdamW", "soft-32", "norm(soft-32)", "ratio(soft-32)")
    monkeypatch.setattr(gate_study, "ARMS", arms)
    small = replace(study, families=study.quick, build=lambda some, _: task(some, steps=12))
    args = {"quick": False, "selection": False, "arms": ["snr-32"], "seeds": [0, 1]}
    lines = small.main(argparse.Namespace(**args, traces=tmp_path / "runs", out=tmp_path))
    assert [line.split(":")[0] for line in lines if line[:2] == "=>"] == ["=> soft-32", "=> snr-32"]
    pictures = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert pictures[1:] == [f"{name}_{hardware()}" for name in more]
    for path in tmp_path.glob("*.csv"):
        if path.stem != pictures[0]:
            name = path.stem.removesuffix(hardware())
            (old,) = (study.folder / "results").glob(f"{name}*.csv")
            assert columns(path) == columns(old)
    scores = read_csv(tmp_path / f"scores_{hardware()}.csv")
    rows = read_csv(tmp_path / f"summary_{hardware()}.csv")
    assert [{k: row[k] for k in row if k not in PROVENANCE} for row in rows] == small.summary(
        scores
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "part"), PARTS)
def test_parts_run(name, part, tmp_path):
    status, error = run("-m", "benchmarks", name, "--part", part, "--quick", "--out", tmp_path)
    assert status == 0, error
    (table,) = tmp_path.glob(f"{part}_*.csv")
    (old,) = (BENCHMARKS / name / "results").glob(f"{part}_*.csv")
    assert columns(table) == columns(old)


@pytest.mark.parametrize("name", [*STUDIES, *FROZEN])
def test_results_are_committed_with_a_plot_and_a_rule(name):
    tables = list((BENCHMARKS / name / "results").glob("2*.csv"))
    assert tables
    assert all(table.with_suffix(".png").exists() for table in tables)
    text = (BENCHMARKS / name / "README.md").read_text(encoding="utf-8")
    assert "Decision rule" in text
    if name in FROZEN:
        commit, script = re.search(
            r"add ../frozen ([0-9a-f]{40})\n.*\nPYTHONPATH=. python (\S+)", text
        ).groups()
        assert script == f"recipes/benchmarks/{name}/bench.py"
        if known(commit):  # a shallow clone does not have it
            assert known(f"{commit}:{script}")
    else:
        assert f"python -m benchmarks {name}" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("nothing", "invalid choice: 'nothing'"),
        ("", "name a study first: cleaned_pairs, "),
        ("all", "all needs --out DIR"),
        ("open_fraction --quick", "--quick writes a toy: name a folder with --out"),
        ("open_fraction --selection", "unrecognized arguments: --selection"),
        ("small_lm --size 2m", "Invalid --size: '2m'. One of ['tiny', "),
        ("stop_digits --part x", "Invalid --part: 'x'. One of ['window_length']."),
        ("ordinary_use --only x", "Invalid --only: 'x'. One of ['digits-mlp-400', "),
    ],
)
def test_mistakes_are_one_line_before_any_work(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code != 0
    said = f"{capsys.readouterr().err}{stopped.value.code}".splitlines()
    assert any(says in line for line in said[-2:])


def test_time_of_each_study_is_written_and_a_failure_stops(tmp_path, monkeypatch):
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__main__.py").write_text("import sys\nsys.exit(3 if sys.argv[1] == 'two' else 0)")
    monkeypatch.setattr(command, "BENCHMARKS", package)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="two --quick ended with 3"):
        command.everything(out, quick=True, jobs=1, names=["one", "two", "default_gate"])
    (table,) = out.glob("suite_*.csv")
    (row,) = read_csv(table)  # what waits for the others did not begin
    assert (row["study"], row["options"]) == ("one", "--quick")
    assert float(row["cpu_s"]) >= 0
