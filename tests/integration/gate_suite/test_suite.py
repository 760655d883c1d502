"""The whole suite in one command: what it runs, and that it measures and stops as it says."""

import csv
import sys

import pytest

STUDY = "default_gate"


@pytest.fixture
def suite(monkeypatch, study):
    """The command's module; `study` puts `recipes/benchmarks` on the path."""
    import suite

    return suite


def test_every_study_of_the_gate_is_run(suite):
    studies = {
        path.parent.name
        for path in suite.HERE.glob("*/bench.py")
        if "from gate_harness" in path.read_text() or path.parent.name == "risk_estimate"
    }
    assert {study for study, _, _ in suite.COMMANDS} == studies
    assert all((suite.HERE / study / script).exists() for study, script, _ in suite.COMMANDS)


def test_time_of_each_study_is_written_and_a_failure_stops(suite, monkeypatch, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "bench.py").write_text("sum(range(10**7))")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "bench.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(
        suite,
        "COMMANDS",
        (("one", "bench.py", ()), ("two", "bench.py", ()), ("three", "absent.py", ())),
    )
    monkeypatch.setattr(sys, "argv", ["suite.py", "--quick", "--out", str(tmp_path / "out")])
    with pytest.raises(RuntimeError, match=r"two/bench.py --quick.* ended with 3"):
        suite.main()
    # what was to come did not begin: it would have failed with another message
    (table,) = (tmp_path / "out").glob("suite_*.csv")
    with table.open() as file:
        (row,) = csv.DictReader(file)
    assert row["study"] == "one"
    assert float(row["cpu_s"]) >= 0
