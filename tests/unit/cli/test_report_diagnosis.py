"""One diagnosis: the page, the demo and the probe say the same of the same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from poprisk_integrations.cli.main import main
from poprisk_integrations.cli.report.findings import sentences
from poprisk_integrations.cli.report.run import load_run
from poprisk_integrations.cli.report.sections import sections_of
from poprisk_integrations.cli.stop_figure import draw_stop
from poprisk_integrations.core import PHRASES


def window(step: int, ratio: float, se: float) -> dict[str, Any]:
    names = ("risk_decrease", "risk_decrease_se", "agreement", "agreement_se", "noise")
    row = dict.fromkeys(names, None)
    return {**row, "step": step, "steps": 10, "signal_ratio": ratio, "signal_ratio_se": se,
            "lr_sum": float(step), "reused": True}  # fmt: skip


def run_of(directory: Path, rows: list[dict[str, Any]], **more: Any) -> Any:
    report = {
        "stopped": True,
        "global_step": 60,
        "stop_step": 60,
        "onset_step": 30,
        "onset_at": 22.5,
        "reason": "stopped at step 60: made up",
        "settings": {"threshold": 1.0},
        "history": rows,
        **more,
    }
    (directory / "poprisk_stop.json").write_text(json.dumps(report))
    return load_run(directory)


ROWS = [window(10, 4.0, 0.1), window(20, 2.0, 0.1), window(30, 0.9, 0.1)]


@pytest.mark.parametrize(
    ("ratio", "se", "said"),
    [
        (0.996, 0.083, "Cannot tell yet whether batches still agree on a direction (F = 1 +- "),
        (0.5, 0.083, "Very probably memorising"),
        (0.9, 0.083, "Probably memorising"),
    ],
)
def test_the_page_says_how_sure_it_is(tmp_path: Path, ratio: float, se: float, said: str) -> None:
    """A text that some version wrote does not count: the numbers do."""
    rows = [*ROWS, window(40, ratio, se)]
    run = run_of(tmp_path, rows, diagnosis="batches agree no more than noise does: memorising")
    (found,) = [text for text in sentences(run) if "batches agree" in text or "whether" in text]
    assert found.startswith(said)
    assert "What to do: " in found
    assert sum("memorising" in text for text in sentences(run)) == ("emorising" in said)


def test_the_line_and_the_picture_say_it_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path, [*ROWS, window(40, 0.5, 0.083)])
    assert main(["report", str(tmp_path)]) == 0
    assert "made up; very probably memorising: " in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "poprisk_stop.json").read_text())
    assert "very probably memorising" in " ".join(draw_stop(report, "run").get_suptitle().split())


def test_no_window_is_not_a_finding(tmp_path: Path) -> None:
    run = run_of(tmp_path, [], onset_step=None, onset_at=None)
    text = " ".join(sentences(run)).lower()
    assert not any(phrase in text for phrase in PHRASES.values())


def test_the_onset_stands_where_the_curve_crosses(tmp_path: Path) -> None:
    """Windows are drawn at their middles; between 15 (F = 2) and 25 (F = 0.9) F falls below 1."""
    (section,) = [s for s in sections_of([run_of(tmp_path, ROWS)]) if s.name == "stop"]
    chart = section.charts[0]
    assert chart.lines[0].curve.steps == (5.0, 15.0, 25.0)
    (onset,) = [mark for mark in chart.marks if mark.kind == "onset"]
    assert onset.step == 22.5


def test_a_report_of_an_older_version_has_the_step_at_which_it_was_noticed(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "steps"} for row in ROWS]
    run = run_of(tmp_path, rows, onset_at=None)
    (section,) = [s for s in sections_of([run]) if s.name == "stop"]
    assert section.charts[0].lines[0].curve.steps == (10.0, 20.0, 30.0)
    assert [m.step for m in section.charts[0].marks if m.kind == "onset"] == [30.0]
