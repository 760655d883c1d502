"""The page of all benchmarks is what READMEs and result files say."""

import re

import pytest

from tests.integration.gate_suite.conftest import BENCHMARKS, modules


@pytest.fixture(scope="module")
def summary(harness):
    with modules(BENCHMARKS) as found:
        yield found.summary


def test_the_page_is_up_to_date(summary):
    written = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert summary.page() == written, "run python recipes/benchmarks/summary.py"


def test_every_study_is_on_it_with_a_verdict(summary):
    table = summary.verdicts()[2:]
    folders = {path.parent.name for path in BENCHMARKS.glob("*/bench.py")}
    assert len(table) == len(folders)
    for line in table:
        folder, verdict = re.fullmatch(r"\| \[.+\]\((\w+)\) \| (.{20,}) \|", line).groups()
        folders.remove(folder)
        assert "|" not in verdict


def test_cells_are_the_scores(summary, harness):
    """One cell by hand: mean over seeds of the mean over conditions of relative differences."""
    scores = harness.comparison.read_scores(BENCHMARKS, ["noisy_labels"], "scores")["noisy_labels"]
    at = {(r["arm"], r["condition"], r["seed"]): float(r["tuned"]) for r in scores}
    differences = [
        (value - at["AdamW", condition, seed]) / at["AdamW", condition, seed]
        for (arm, condition, seed), value in at.items()
        if arm == "soft-32"
    ]
    mean = 100 * sum(differences) / len(differences)
    lines = summary.gates(draws=100)
    row = next(line for line in lines if line.startswith("| [noisy_labels]"))
    place = summary.SHOWN.index("soft-32") + 2
    assert row.split("|")[place].split("[")[0].strip() == f"{mean:+.1f}"
