"""Whatever else was logged."""

from collections.abc import Sequence

from poprisk_integrations.cli.report.chart import Chart
from poprisk_integrations.cli.report.gate_charts import GATE_BASES
from poprisk_integrations.cli.report.key_names import parse_key
from poprisk_integrations.cli.report.loss_charts import (
    gradient_norm_bases,
    learning_rate_bases,
    loss_bases,
)
from poprisk_integrations.cli.report.plain_text import plain, short, shown
from poprisk_integrations.cli.report.preference_charts import PREFERENCE_BASES
from poprisk_integrations.cli.report.quantity_chart import group_charts, quantity_chart
from poprisk_integrations.cli.report.run import Run
from poprisk_integrations.cli.report.stop_charts import STOP_BASES

__all__ = ["other_charts"]

# Of time and progress, not of training.
_NOT_SHOWN = frozenset(
    {
        "epoch",
        "global_step",
        "model_preparation_time",
        "num_input_tokens_seen",
        "num_tokens",
        "runtime",
        "samples_per_second",
        "steps_per_second",
        "tokens_per_second",
        "total_flos",
    }
)


def other_charts(runs: Sequence[Run], most: int = 18) -> tuple[list[Chart], list[str], list[str]]:
    """Charts of the quantities that no other section shows.

    This package's own come first. A constant is no chart.

    Args:
        runs: Of the page.
        most: Charts at most.

    Returns:
        The charts, constants as "name = value", and names for which there was no more room.
    """
    shown_before = {
        *STOP_BASES,
        *GATE_BASES,
        *PREFERENCE_BASES,
        *_NOT_SHOWN,
        *loss_bases(runs),
        *learning_rate_bases(runs),
        *gradient_norm_bases(runs)[:1],
    }
    found = {parse_key(name).base for run in runs for name in run.curves} - shown_before
    names = sorted(found, key=lambda base: (not base.startswith("poprisk/"), base))
    values = {base: _values(runs, base) for base in names}
    constants = [f"{plain(b)} = {shown(min(values[b]))}" for b in names if len(values[b]) == 1]
    names = [base for base in names if len(values[base]) > 1]
    charts: list[Chart] = []
    left_out = []
    for base in names:
        title = short(plain(base), 60)
        more = [
            *quantity_chart(runs, title, {base: ""}),
            *(group_charts(runs, title, base) if base.startswith("poprisk/") else ()),
        ]
        if len(charts) + len(more) <= most:
            charts += more
        else:
            left_out.append(plain(base))
    return charts, constants, left_out


def _values(runs: Sequence[Run], base: str) -> set[float]:
    return {v for run in runs for _, curve in run.family(base) for v in curve.finite().values}
