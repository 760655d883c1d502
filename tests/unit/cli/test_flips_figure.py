"""Every pair is in the histogram once, and the curve ends at the sums."""

import io
import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from poprisk_integrations.cli.flips_figure import draw_flips
from poprisk_integrations.trl.flip_report import FlipReport


def report(margins: list[float], probabilities: list[float], **changes: Any) -> FlipReport:
    return FlipReport(
        pair_id=range(len(margins)),
        row=range(len(margins)),
        probability_wrong=probabilities,
        margin=margins,
        step=[0] * len(margins),
        **changes,
    )


def heights(figure: Figure) -> dict[str, float]:
    """Pairs in the bars of each entry of the legend."""
    axis = figure.axes[0]
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    bars = [sum(bar.get_height() for bar in container) for container in axis.containers]
    return dict(zip(names, bars, strict=True))


def written(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


MARGINS = [-2.0, -1.0, -0.5, 0.0, 1.0, 2.0, 3.0, math.nan]
PROBABILITIES = [0.95, 0.7, 0.6, 0.3, 0.2, 0.08, 0.0, math.nan]


def test_pairs_by_action() -> None:
    figure = draw_flips(report(MARGINS, PROBABILITIES), "run $x$ $\\y$")
    assert heights(figure) == {"swap (1)": 1, "drop (2)": 2, "review (1)": 1, "keep (3)": 3}
    (expected,) = [line for line in figure.axes[1].lines if "expected" in str(line.get_label())]
    assert list(expected.get_ydata()) == pytest.approx(
        [0, 0.95, 1.65, 2.25, 2.55, 2.75, 2.83, 2.83]
    )
    assert "8 pairs, 2.8 wrong" in figure.get_suptitle()
    assert written(figure).startswith(b"\x89PNG")


def test_pairs_by_truth() -> None:
    figure = draw_flips(report(MARGINS, PROBABILITIES), "run", swapped_rows={0, 2, 6, 7})
    assert heights(figure) == {"swapped on purpose (3)": 3, "not swapped (4)": 4}
    (true,) = [line for line in figure.axes[1].lines if "purpose" in str(line.get_label())]
    assert list(true.get_ydata()) == [0, 1, 1, 2, 2, 2, 2, 3]
    written(figure)


def test_thresholds_are_where_the_actions_change() -> None:
    figure = draw_flips(report(MARGINS, PROBABILITIES), "run")
    at = {str(line.get_label()).split(":")[0]: line.get_xdata() for line in figure.axes[1].lines}
    assert [at[name][0] for name in ("swap", "drop", "review")] == [1, 3, 4]


@pytest.mark.parametrize(
    ("margins", "probabilities"),
    [([1.5], [0.2]), ([0.0] * 5, [0.3] * 5), ([1e30, -1e30], [0.0, 1.0])],
    ids=["one pair", "one value", "huge"],
)
def test_small_and_odd_reports_are_drawn(margins: list[float], probabilities: list[float]) -> None:
    figure = draw_flips(report(margins, probabilities), "run")
    assert sum(heights(figure).values()) == len(margins)
    written(figure)


def test_far_margins_are_counted_and_do_not_squeeze_the_rest() -> None:
    margins = [index / 1000 for index in range(1000)] + [500.0]
    figure = draw_flips(report(margins, [0.1] * 1001), "run")
    assert heights(figure) == {"keep (1001)": 1001}
    assert figure.axes[0].get_xlim()[1] < 2
    assert "outermost bars hold 1 from beyond" in figure.axes[0].get_xlabel()


def test_other_actions_are_not_lost() -> None:
    edited = report(MARGINS[:2], PROBABILITIES[:2], action=["too_long", "drop"])
    assert heights(draw_flips(edited, "run")) == {"drop (1)": 1, "no action (1)": 1}
